"""Models as users write them, one per construct: the table that `test_own_models.py` runs against the oracles.

`rule_cases.py` has one module per rule; these join several rules, and whatever a forward may do around them.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rule_cases import Case, Fn, noise, sequence_first, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

SITES = "dropout(shared),weight_decay"
OWN: list[Case] = []


def own(name: str, build: Any, inputs: Any, hparams: str = SITES, **options: Any) -> None:
    """Add a model; what is left goes to `Subject`."""
    structures = options.pop("structures", ())
    tangents = options.pop("tangents", True)
    OWN.append(Case(name, build, inputs, (), hparams, options, structures, tangents))


# ---- torch's own transformers: features of 8, two heads, dropout 0.1

WIDTH, HEADS, INNER = 8, 2, 12
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def encoder(layers: int = 2, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.1, **options)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)


def decoder(layers: int = 2, **options: Any) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, 0.1, **options)
    return nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(WIDTH))


def padding(length: int, batch: int) -> Tensor:
    """(B, T), true where a token is padding; at least two tokens of each example are not."""
    return torch.arange(length).expand(batch, length) >= 2 + torch.arange(batch).reshape(-1, 1) % (length - 1)


def two_sequences(batch_first: bool = True) -> Any:
    """Source (B, 5, 8) and target (B, 4, 8), or sequence first."""

    def inputs(batch: int) -> tuple[Tensor, ...]:
        pair = (noise(5, WIDTH)(batch)[0], noise(4, WIDTH)(batch + 50)[0][:batch])
        return pair if batch_first else tuple(x.transpose(0, 1).contiguous() for x in pair)

    return inputs


own("encoder", lambda: encoder(batch_first=True), noise(5, WIDTH))
own("encoder, sequence first", encoder, sequence_first(6, WIDTH), batch_axis=1, name_axis=True)
own("encoder, norm first", lambda: encoder(batch_first=True, norm_first=True, activation="gelu"), noise(5, WIDTH))
own(
    "encoder, causal mask",
    lambda: Fn(lambda m, x: m.e(x, mask=CAUSAL, is_causal=True), e=encoder(batch_first=True)),
    noise(5, WIDTH),
)
own(
    "encoder, key padding mask",
    lambda: Fn(lambda m, x, mask: m.e(x, src_key_padding_mask=mask), e=encoder(batch_first=True)),
    lambda b: (*noise(5, WIDTH)(b), padding(5, b)),
)
own(
    "encoder, both masks",
    lambda: Fn(lambda m, x, mask: m.e(x, mask=CAUSAL, src_key_padding_mask=mask), e=encoder(batch_first=True)),
    lambda b: (*noise(5, WIDTH)(b), padding(5, b)),
)
own(
    "decoder",
    lambda: Fn(lambda m, memory, x: m.d(x, memory), d=decoder(batch_first=True)),
    two_sequences(),
)
own(
    "decoder, sequence first, causal",
    lambda: Fn(lambda m, memory, x: m.d(x, memory, tgt_mask=CAUSAL[:4, :4], tgt_is_causal=True), d=decoder()),
    two_sequences(batch_first=False),
    batch_axis=1,
    name_axis=True,
)
own(
    "transformer",
    lambda: nn.Transformer(WIDTH, HEADS, 1, 1, INNER, 0.1, batch_first=True),
    two_sequences(),
)
own(
    "transformer, sequence first",
    lambda: nn.Transformer(WIDTH, HEADS, 1, 1, INNER, 0.1),
    two_sequences(batch_first=False),
    batch_axis=1,
    name_axis=True,
)
own(
    "transformer, masks and padding",
    lambda: Fn(
        lambda m, x, y, mask: m.t(
            x, y, tgt_mask=CAUSAL[:4, :4], src_key_padding_mask=mask, memory_key_padding_mask=mask
        ),
        t=nn.Transformer(WIDTH, HEADS, 1, 1, INNER, 0.1, batch_first=True),
    ),
    lambda b: (*two_sequences()(b), padding(5, b)),
)


class LanguageModel(nn.Module):
    """Tokens with padding -> logits: tied embedding, learned positions, causal encoder, functional dropout."""

    def __init__(self, vocabulary: int = 11, length: int = 5) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, WIDTH), nn.Parameter(torch.randn(length, WIDTH))
        self.encoder, self.p = encoder(1, batch_first=True), 0.1
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.embed(tokens) + self.position[: tokens.shape[1]], self.p, training=self.training)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        return self.head(self.encoder(x, mask=mask, is_causal=True))


own("language model with tied embeddings", LanguageModel, tokens(5))

# ---- functional dropout, bare parameters


class FunctionalDropouts(nn.Module):
    """Every kind of dropout as a function, and `training=` by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)
        self.p, self.dropout = 0.2, 0.1

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(self.conv(x), self.p, self.training)
        x = F.dropout(F.relu(self.mix(x)), p=self.dropout, training=self.training)
        return self.head(F.dropout(x.mean((2, 3)), self.p, training=self.training, inplace=True))


own("functional dropouts", FunctionalDropouts, noise(2, 5, 5), "dropout,weight_decay")


class PatchTransformer(nn.Module):
    """Class token, position embedding, layer scales and a relative position bias, all bare parameters."""

    def __init__(self, patches: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, WIDTH))
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(HEADS, 2 * patches + 1))
        self.scale = nn.Parameter(torch.full((WIDTH,), 1e-6))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(WIDTH, 3)
        index = torch.arange(patches + 1)
        self.register_buffer("index", index[:, None] - index[None, :] + patches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, self.index])
        x = x + self.scale * self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(self.drop(x[:, 0]))


own("bare parameters", PatchTransformer, noise(1, 4, 4), structures=("exact",))

# ---- computed weights


own(
    "weight norm throughout",
    lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 4, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        parametrizations.weight_norm(nn.Linear(36, 3)),
    ),
    noise(2, 5, 5),
    structures=("effective",),
)
# ---- several inputs and outputs


@dataclass
class Prediction:
    """What `TwoHeads` gives back."""

    logits: Tensor
    features: tuple[Tensor, Tensor]
    loss_weights: dict[str, Tensor]


class TwoHeads(nn.Module):
    """Image and vector -> a dataclass of tensors, tuples and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(1, 4, 3), nn.Linear(3, 4)
        self.drop, self.first, self.second = nn.Dropout(0.2), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, image: Tensor, vector: Tensor, *, gain: Tensor) -> Prediction:
        left, right = self.image(image).relu().mean((2, 3)), self.vector(vector)
        joint = self.drop(left * right)
        return Prediction(self.first(joint), (left, right), {"second": self.second(joint) * gain[:, None]})


own(
    "several inputs, a nested dataclass as output",
    lambda: Fn(lambda m, *, image, vector, gain: m.heads(image, vector, gain=gain), heads=TwoHeads()),
    lambda b: {"image": noise(1, 5, 5)(b)[0], "vector": noise(3)(b)[0], "gain": noise()(b)[0]},
)


class Siamese(nn.Module):
    """Two batches encoded as one, and taken apart by `chunk`, whose parts torch.export cannot tell to be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = torch.chunk(self.encoder(torch.cat([left, right])).mean((2, 3)), chunks=2, dim=0)
        return self.head((left - right).abs())


own("siamese, two batches as one", Siamese, lambda b: (*noise(1, 5, 5)(b), noise(1, 5, 5)(b)[0].sin()))

# ---- no_grad, frozen and held parts


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def frozen_backbone() -> nn.Module:
    """Partly frozen fine-tuning: frozen first layers with batch norms in evaluation mode, a trained rest."""
    backbone = frozen(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    return nn.Sequential(
        backbone, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 3)
    )


own("partly frozen fine-tuning", frozen_backbone, noise(2, 5, 5))


def backbone_without_grad() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = m.backbone(x).relu()
        return m.head(m.drop(features))

    return Fn(forward, backbone=nn.Linear(5, 6), drop=nn.Dropout(0.2), head=nn.Linear(6, 3))


own("backbone under no_grad", backbone_without_grad, noise(5), tangents=False)


def held_in_evaluation() -> nn.Module:
    """Trained layers; norms and one dropout held in evaluation mode inside a training model."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(36, 3),
    )
    model[1].eval()
    model[2].eval()
    return model


own("norms and a dropout held in evaluation mode", held_in_evaluation, noise(2, 5, 5))


def with_shared_block() -> nn.Module:
    block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.1))
    return nn.Sequential(nn.Linear(5, 6), block, block, copy.deepcopy(block), nn.Linear(6, 2))


own("one block used twice", with_shared_block, noise(5))


# ---- complex values


class FourierMixing(nn.Module):
    """A learned complex filter on the spectrum of a sequence, as in global filter networks."""

    def __init__(self, length: int = 6) -> None:
        super().__init__()
        self.layer, self.drop, self.head = nn.Linear(5, WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, 3)
        self.filter = nn.Parameter(torch.randn(length // 2 + 1, WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        return self.head(self.drop(torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho").tanh()))


own("a filter of the spectrum", FourierMixing, noise(6, 5), structures=("exact",))
own(
    "absolute values of a spectrum",
    lambda: Fn(
        lambda m, x: m.g(m.d(torch.fft.rfft(m.f(x)).abs())), f=nn.Linear(5, 6), d=nn.Dropout(0.2), g=nn.Linear(4, 3)
    ),
    noise(5),
)

# ---- recomputation in the backward


def checkpointed(use_reentrant: bool) -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = checkpoint(m.block, m.stem(x), use_reentrant=use_reentrant)
        return m.head(x)

    return Fn(
        forward,
        stem=nn.Linear(5, 6),
        block=nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.2)),
        head=nn.Linear(6, 3),
    )


own("activation checkpointing", lambda: checkpointed(False), noise(5))
own("activation checkpointing, reentrant", lambda: checkpointed(True), noise(5), tangents=False)
