"""The models of the zoo: how each is built, small, with random weights, and what a batch for it looks like.

torchvision: every classifier, and the segmentation, flow, video and detection models; timm: the smallest model of each
of its model modules (``timm_smallest.csv``, made by ``smallest_timm_models``); transformers: tiny configurations.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from zoo_own import custom_layer, own_models

from stn_fx.rules import Registry

BATCH = 2
SIDES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 384, 512)
"""Tried in turn.  Below 64, the last batch norms of a network see one pixel and two examples, which says nothing."""
KEPT_BLOCKS = 2
SMALLEST_TIMM = Path(__file__).with_name("timm_smallest.csv")

Builder = Callable[[], nn.Module]


@dataclass(frozen=True)
class Prepared:
    """A model with a batch for it; ``reduced`` says what was left out of the library's model."""

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    reduced: str = ""
    rules: Registry | None = None
    """Where the model needs more than the built-in rules."""


@dataclass(frozen=True)
class Entry:
    """One model of a library; ``prepare(full_depth)`` builds it in float32."""

    library: str
    name: str
    prepare: Callable[[bool], Prepared]
    size: float = 0.0
    """For the order: parameters of the library's model, in millions."""


def entries(library: str) -> list[Entry]:
    """The models of one library, small ones first."""
    return sorted(_LIBRARIES[library](), key=lambda entry: entry.size)


# ---- what all libraries share


def shorten(model: nn.Module, kept: int = KEPT_BLOCKS) -> str:
    """Keep the first ``kept`` of identical blocks in a row; returns what was left out, in words."""
    before = after = 0
    for container in list(model.modules()):
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        blocks = [(name, _signature(child)) for name, child in container.named_children()]
        runs = [[name for name, _ in run] for signature, run in groupby(blocks, key=lambda b: b[1]) if signature[1]]
        dropped = [name for run in runs for name in run[kept:]]
        if not dropped:
            continue
        before, after = before + len(blocks), after + len(blocks) - len(dropped)
        if isinstance(container, nn.ModuleList):
            for name in reversed(dropped):
                del container[int(name)]
        else:
            for name in dropped:
                del container._modules[name]
    return f"{after} of {before} blocks" if before else ""


def _signature(module: nn.Module) -> tuple[type, tuple[Any, ...]]:
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def smallest_images(
    build: Callable[[int], nn.Module], full_depth: bool, shape: Callable[[int], tuple[int, ...]]
) -> Any:
    """The model on the smallest side that it takes, with at most ``KEPT_BLOCKS`` identical blocks in a row."""
    failure: Exception | None = None
    for side in SIDES:
        for shortened in (False,) if full_depth else (True, False):
            try:
                model = build(side)
                reduced = shorten(model) if shortened else ""
                inputs = (torch.randn(shape(side)),)
                with torch.no_grad():
                    for mode in (True, False):  # auxiliary classifiers, which run in training only, may need more
                        model.train(mode)(*inputs)
                return Prepared(model, inputs, reduced)
            except Exception as error:
                failure = error
    raise RuntimeError(f"no side from {SIDES[0]} to {SIDES[-1]} fits") from failure


def image_shape(side: int) -> tuple[int, ...]:
    """Colour images."""
    return (BATCH, 3, side, side)


# ---- torchvision


def _torchvision() -> Iterator[Entry]:
    models = torchvision.models
    for name in models.list_models(module=models):
        yield Entry("torchvision", name, lambda full, name=name: _classifier(name, full), _millions(name))
    for name in models.list_models(module=models.segmentation):
        yield Entry("torchvision", name, lambda full, name=name: _segmentation(name, full), _millions(name))
    for name in models.list_models(module=models.optical_flow):
        yield Entry("torchvision", name, lambda full, name=name: _flow(name), 90 + _millions(name))
    for name in models.list_models(module=models.video):
        yield Entry("torchvision", name, lambda full, name=name: _video(name, full), 90 + _millions(name))
    for name in models.list_models(module=models.detection):
        yield Entry("torchvision", name, lambda full, name=name: _detection(name), 300 + _millions(name))


def _millions(name: str) -> float:
    return torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"] / 1e6


def _classifier(name: str, full_depth: bool) -> Prepared:
    options: dict[str, Any] = {"num_classes": 10}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False

    def build(side: int) -> nn.Module:
        if name.startswith("vit"):
            side -= side % (14 if name == "vit_h_14" else int(name.rpartition("_")[2]))
            return torchvision.models.get_model(name, weights=None, image_size=side, **options)
        if name.startswith("maxvit"):
            return torchvision.models.get_model(name, weights=None, input_size=(side, side), **options)
        return torchvision.models.get_model(name, weights=None, **options)

    def shape(side: int) -> tuple[int, ...]:
        return image_shape(56 if name == "vit_h_14" else side)

    return smallest_images(build, full_depth, shape)


def _segmentation(name: str, full_depth: bool) -> Prepared:
    options = {"weights": None, "weights_backbone": None, "num_classes": 5}
    return smallest_images(lambda side: torchvision.models.get_model(name, **options), full_depth, image_shape)


def _flow(name: str) -> Prepared:
    model = torchvision.models.get_model(name, weights=None)
    images = {f"image{i}": torch.randn(BATCH, 3, 128, 128) for i in (1, 2)}
    return Prepared(model, {**images, "num_flow_updates": 2}, "2 of 12 flow updates")


def _video(name: str, full_depth: bool) -> Prepared:
    if name.startswith("mvit"):
        return _mvit(name)

    def shape(side: int) -> tuple[int, ...]:
        return (BATCH, 3, 16 if name == "s3d" else 8, side, side)

    return smallest_images(
        lambda side: torchvision.models.get_model(name, weights=None, num_classes=10), full_depth, shape
    )


def _mvit(name: str) -> Prepared:
    """The builders fix 16 frames of 224 x 224 pixels; the class itself takes less."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    second = name == "mvit_v2_s"
    blocks = [
        MSBlockConfig(1, 16, 32 if second else 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        MSBlockConfig(2, 32 if second else 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
    ]
    model = MViT(
        (64, 64), 4, blocks, residual_pool=second, residual_with_cls_embed=not second, rel_pos_embed=second,
        proj_after_attn=second, num_classes=10, stochastic_depth_prob=0.1,
    )  # fmt: skip
    return Prepared(model, (torch.randn(BATCH, 3, 4, 64, 64),), "3 of 16 blocks, 32 channels")


def _detection(name: str) -> Prepared:
    """Detectors take a list of images, and in training their boxes."""
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    images = [torch.rand(3, 64, 64) for _ in range(BATCH)]
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    if name.startswith("keypoint"):
        target["keypoints"] = torch.tensor([[[8.0, 8.0, 1.0]] * 17])
    if name.startswith("mask"):
        target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
    return Prepared(model, (images, [target] * BATCH))


# ---- timm


def _timm() -> Iterator[Entry]:
    with SMALLEST_TIMM.open() as file:
        for row in csv.DictReader(file):
            name, millions = row["model"], int(row["parameters"]) / 1e6
            yield Entry("timm", name, lambda full, name=name: _timm_model(name, full), millions)


def _timm_model(name: str, full_depth: bool) -> Prepared:
    def build(side: int) -> nn.Module:
        options: dict[str, Any] = {"num_classes": 10}
        try:
            return timm.create_model(name, img_size=side, **options)
        except TypeError:
            return timm.create_model(name, **options)

    return smallest_images(build, full_depth, image_shape)


def smallest_timm_models() -> Iterator[tuple[str, str, int]]:
    """(module, model, parameters) of the model with the fewest parameters of each module; takes some minutes."""
    for module in timm.list_modules():
        sizes = []
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                try:
                    sizes.append((sum(p.numel() for p in timm.create_model(name).parameters()), name))
                except Exception:  # some initialise by values
                    continue
        if sizes:
            yield module, min(sizes)[1], min(sizes)[0]


# ---- transformers


def _transformers() -> Iterator[Entry]:
    for name, build in _TRANSFORMERS.items():
        yield Entry("transformers", name, lambda full, build=build: build())


_HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_WORDS = {"vocab_size": 100}
_IMAGES = {"image_size": 32, "patch_size": 8, "num_labels": 5}


def _tokens(length: int = 9, padded: bool = True) -> dict[str, Tensor]:
    """Token inputs, the second example padded at its end."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if padded:
        mask[1, length - 3 :] = 0
    return {"input_ids": torch.randint(3, 100, (BATCH, length)), "attention_mask": mask}


def _text(model: str, config: str, **options: Any) -> Callable[[], Prepared]:
    def build() -> Prepared:
        made = getattr(transformers, config)(**{**_WORDS, **options})
        return Prepared(getattr(transformers, model)(made), _tokens(), "tiny configuration")

    return build


def _causal(family: str, **options: Any) -> Callable[[], Prepared]:
    own = {**_HIDDEN, "num_key_value_heads": 2, "use_cache": False, **options}
    return _text(f"{family}ForCausalLM", f"{family}Config", **own)


def _seq2seq(model: str, config: str, **options: Any) -> Callable[[], Prepared]:
    def build() -> Prepared:
        made = getattr(transformers, config)(**_WORDS, **options, use_cache=False)
        inputs = {**_tokens(), "decoder_input_ids": torch.randint(3, 100, (BATCH, 5))}
        return Prepared(getattr(transformers, model)(made), inputs, "tiny configuration")

    return build


def _vision(model: str, config: str, **options: Any) -> Callable[[], Prepared]:
    def build() -> Prepared:
        made = getattr(transformers, config)(**options)
        side = options.get("image_size", 32)
        return Prepared(
            getattr(transformers, model)(made), {"pixel_values": torch.randn(image_shape(side))}, "tiny configuration"
        )

    return build


def _clip(model: str, *names: str) -> Callable[[], Prepared]:
    def build() -> Prepared:
        config = transformers.CLIPConfig(
            text_config={**_WORDS, **_HIDDEN, "eos_token_id": 99, "bos_token_id": 98, "projection_dim": 16},
            vision_config={**_HIDDEN, "image_size": 32, "patch_size": 8},
            projection_dim=16,
            num_labels=5,
        )
        inputs = {**_tokens(), "pixel_values": torch.randn(BATCH, 3, 32, 32)}
        inputs["input_ids"][:, 5] = 99
        own = config.text_config if "Text" in model else config
        return Prepared(getattr(transformers, model)(own), {name: inputs[name] for name in names}, "tiny configuration")

    return build


_CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}


def _wav2vec2(model: str) -> Callable[[], Prepared]:
    def build() -> Prepared:
        config = transformers.Wav2Vec2Config(
            **_WORDS, **_HIDDEN, **_CONVOLUTIONS, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0, num_labels=5, classifier_proj_size=16,
        )  # fmt: skip
        return Prepared(
            getattr(transformers, model)(config), {"input_values": torch.randn(BATCH, 400)}, "tiny configuration"
        )

    return build


def _whisper() -> Prepared:
    config = transformers.WhisperConfig(
        **_WORDS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {
        "input_features": torch.randn(BATCH, 8, 40),
        "decoder_input_ids": torch.randint(3, 100, (BATCH, 5)),
    }
    return Prepared(transformers.WhisperForConditionalGeneration(config), inputs, "tiny configuration")


_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32,
}  # fmt: skip
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False}

_TRANSFORMERS: dict[str, Callable[[], Prepared]] = {
    "bert classifier": _text("BertForSequenceClassification", "BertConfig", **_HIDDEN),
    "bert masked lm": _text("BertForMaskedLM", "BertConfig", **_HIDDEN),
    "roberta classifier": _text("RobertaForSequenceClassification", "RobertaConfig", **_HIDDEN),
    "albert classifier": _text("AlbertForSequenceClassification", "AlbertConfig", **_HIDDEN, embedding_size=16),
    "distilbert classifier": _text("DistilBertForSequenceClassification", "DistilBertConfig", **_DISTIL),
    "electra classifier": _text("ElectraForSequenceClassification", "ElectraConfig", **_HIDDEN, embedding_size=16),
    "deberta-v2 classifier": _text(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", **_HIDDEN, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
    ),
    "gpt2 lm": _text("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "gpt2 classifier": _text("GPT2ForSequenceClassification", "GPT2Config", **_GPT2, pad_token_id=0),
    "llama lm": _causal("Llama"),
    "qwen2 lm": _causal("Qwen2"),
    "qwen3 lm": _causal("Qwen3", head_dim=8),
    "mistral lm": _causal("Mistral", sliding_window=4),
    "t5 lm": _seq2seq("T5ForConditionalGeneration", "T5Config", **_T5),
    "bart lm": _seq2seq("BartForConditionalGeneration", "BartConfig", **_BART),
    "vit classifier": _vision("ViTForImageClassification", "ViTConfig", **_HIDDEN, **_IMAGES),
    "swin classifier": _vision(
        "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2],
        num_heads=[2, 4], window_size=4, num_labels=5,
    ),
    "convnext classifier": _vision(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[16, 24], depths=[2, 2], num_stages=2,
        num_labels=5,
    ),
    "dinov2 classifier": _vision("Dinov2ForImageClassification", "Dinov2Config", **_HIDDEN, **_IMAGES),
    "clip image classifier": _clip("CLIPForImageClassification", "pixel_values"),
    "clip text": _clip("CLIPTextModelWithProjection", "input_ids", "attention_mask"),
    "clip contrastive": _clip("CLIPModel", "input_ids", "attention_mask", "pixel_values"),
    "wav2vec2 classifier": _wav2vec2("Wav2Vec2ForSequenceClassification"),
    "wav2vec2 ctc": _wav2vec2("Wav2Vec2ForCTC"),
    "whisper lm": _whisper,
}  # fmt: skip


# ---- own


def _own() -> Iterator[Entry]:
    for name, (build, inputs) in own_models().items():
        yield Entry("own", name, lambda full, build=build, inputs=inputs: Prepared(build(), inputs))
    yield Entry("own", "custom layer with its rule", lambda full: _custom_layer())


def _custom_layer() -> Prepared:
    example = custom_layer()
    model = nn.Sequential(nn.Linear(8, 16), example.Snake(16), nn.Dropout(0.1), nn.Linear(16, 3))
    return Prepared(model, (torch.randn(BATCH, 8),), rules=example.rules)


_LIBRARIES: dict[str, Callable[[], Iterator[Entry]]] = {
    "own": _own,
    "transformers": _transformers,
    "timm": _timm,
    "torchvision": _torchvision,
}
LIBRARIES = tuple(_LIBRARIES)
