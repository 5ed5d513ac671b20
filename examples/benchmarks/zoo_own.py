"""Models as people write them by hand: what no library's list holds, each in a small configuration."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from simple_cnn import SimpleCNN
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Builder = Callable[[], nn.Module]
BATCH, WORDS, WIDTH, TIME = 2, 30, 8, 7


# ---- recurrent networks


class LanguageModel(nn.Module):
    """Two recurrent layers with dropout between them, carried state, and a decoder tied to the embedding."""

    def __init__(self, recurrent: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(WORDS, WIDTH), nn.Dropout(0.1)
        self.recurrent = recurrent(WIDTH, WIDTH, num_layers=2, dropout=0.2, batch_first=batch_first)
        self.decoder = nn.Linear(WIDTH, WORDS)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, state = self.recurrent(self.drop(self.embedding(tokens)), state)
        return self.decoder(outputs), state


class Tagger(nn.Module):
    """A bidirectional recurrence over tokens, one label for each."""

    def __init__(self, recurrent: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.recurrent = recurrent(WIDTH, WIDTH, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
        self.head = nn.Linear(2 * WIDTH, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0])


class CellLoop(nn.Module):
    """`nn.LSTMCell` in a loop of Python over the time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


def state(layers: int, lstm: bool) -> Any:
    """What such a network carries from one batch to the next: (layers, B, WIDTH), two of them for an LSTM."""
    h = torch.zeros(layers, BATCH, WIDTH)
    return (h, h.clone()) if lstm else h


def tokens(batch_first: bool = True) -> Tensor:
    """Token numbers (B, T), or (T, B)."""
    made = torch.randint(WORDS, (BATCH, TIME))
    return made if batch_first else made.t().contiguous()


# ---- attention


class SequenceClassifier(nn.Module):
    """torch's own transformer encoder over embedded tokens, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=padding).mean(1))


class Decoder(nn.Module):
    """torch's own transformer decoder, sequence-first, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        return self.head(self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True))


class ByHand(nn.Module):
    """Attention written out, a class token written in place, and the norms that are rare in libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.instance, self.rms = nn.InstanceNorm1d(8, affine=True), nn.RMSNorm(8)
        self.queries, self.keys, self.values = (nn.Linear(8, 8) for _ in range(3))
        self.token, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 1:] = self.instance(x.transpose(1, 2)).transpose(1, 2)[:, 1:]
        y[:, 0] = self.token
        y = self.rms(y)
        scores = (self.queries(y) @ self.keys(y).transpose(1, 2) / 8**0.5).softmax(-1)
        return self.head((scores @ self.values(y))[:, 0])


class PatchTransformer(nn.Module):
    """Class token, positions, layer scale and a relative position bias: all bare parameters."""

    def __init__(self, patches: int = 4, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.patch, self.heads = nn.Conv2d(1, width, 14, 14), heads
        self.token, self.position = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(patches + 1, width)),
        )
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias, self.scale = nn.Parameter(torch.zeros(heads, 2 * patches + 1)), nn.Parameter(torch.ones(width))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, 3)
        index = torch.arange(patches + 1)
        self.register_buffer("index", index[:, None] - index[None, :] + patches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, self.index])
        x = x + self.scale * self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(self.drop(x[:, 0]))


# ---- functions instead of modules, computed weights


class FunctionalDropouts(nn.Module):
    """Dropout as functions, of channels and of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(self.first(x).relu(), 0.2, self.training)
        x = self.second(x).relu().mean((2, 3))
        return self.head(F.dropout(x, p=0.1, training=self.training))


class WeightNormalised(nn.Module):
    """Weights that are computed before use: weight norm and spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.head = parametrizations.spectral_norm(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


# ---- several inputs and outputs; frozen, held and mixed-precision parts


@dataclass
class Prediction:
    """What `TwoHeads` gives back."""

    label: Tensor
    features: tuple[Tensor, Tensor]
    auxiliary: dict[str, Tensor]


class TwoHeads(nn.Module):
    """Image and vector -> a dataclass of tensors, tuples and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.drop = nn.Conv2d(1, 8, 3, 2), nn.Linear(3, 8), nn.Dropout(0.2)
        self.first, self.second = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, image: Tensor, vector: Tensor, *, gain: Tensor) -> Prediction:
        left, right = self.image(image).relu().mean((2, 3)), self.vector(vector)
        joint = self.drop(left * right)
        return Prediction(self.first(joint), (left, right), {"second": self.second(joint) * gain[:, None]})


class Siamese(nn.Module):
    """Two images encoded as one batch of twice the size, and taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = self.encoder(torch.cat([left, right])).mean((2, 3)).chunk(2)
        return self.head((left - right).abs())


class DetachedTarget(nn.Module):
    """Gates by features through which no gradient is to flow."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).tanh()
        return self.head(self.drop(x * x.detach().sigmoid()))


class FineTuned(nn.Module):
    """A frozen backbone with its batch norm held in evaluation mode, run without gradients, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()).requires_grad_(False)
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 4)

    def train(self, mode: bool = True) -> "FineTuned":
        """The backbone's statistics stay as they are."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(self.drop(self.neck(x).mean((2, 3))))


class FrozenNorms(nn.Module):
    """Trained throughout, with batch norms held in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 4)

    def train(self, mode: bool = True) -> "FrozenNorms":
        """As detection models are trained, on small batches."""
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class PartlyAutocast(nn.Module):
    """The trunk in bfloat16, the head and its softmax in full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.trunk(x)
        return self.head(x.to(self.head.weight.dtype)).log_softmax(-1)


def custom_layer() -> Any:
    """The module of ``examples/custom_rule.py``: a layer with an operator of its own, and the rules that know it."""
    path = Path(__file__).parents[1] / "custom_rule.py"
    spec = importlib.util.spec_from_file_location("custom_rule", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_models() -> dict[str, tuple[Builder, tuple[Any, ...] | dict[str, Any]]]:
    """By name: how it is built, and a batch for it."""
    image = torch.randn(BATCH, 1, 28, 28)
    padding = torch.zeros(BATCH, TIME, dtype=torch.bool)
    padding[1, -2:] = True
    first: dict[str, tuple[Builder, Any]] = {
        f"{name} language model, {order} first": (
            lambda recurrent=recurrent, order=order: LanguageModel(recurrent, order == "batch"),
            (tokens(order == "batch"), state(2, name == "lstm")),
        )
        for name, recurrent in {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}.items()
        for order in ("sequence", "batch")
    }
    return first | {
        "lstm tagger, bidirectional": (lambda: Tagger(nn.LSTM), (tokens(),)),
        "gru tagger, bidirectional": (lambda: Tagger(nn.GRU), (tokens(),)),
        "lstm cells in a loop": (CellLoop, (torch.randn(BATCH, TIME, WIDTH),)),
        "transformer encoder with padding": (SequenceClassifier, (tokens(), padding)),
        "transformer decoder, causal": (Decoder, (torch.randn(5, BATCH, 16), torch.randn(4, BATCH, 16))),
        "transformer": (
            lambda: nn.Transformer(16, 2, 2, 2, 32),
            (torch.randn(5, BATCH, 16), torch.randn(4, BATCH, 16)),
        ),
        "attention by hand": (ByHand, (torch.randn(BATCH, 5, 8),)),
        "bare parameters": (PatchTransformer, (image,)),
        "simple cnn": (SimpleCNN, (image,)),
        "autoencoder": (
            lambda: nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.GELU(), nn.ConvTranspose2d(8, 1, 4, 2, 1)),
            (image,),
        ),
        "functional dropout": (FunctionalDropouts, (image,)),
        "weight norm and spectral norm": (WeightNormalised, (torch.randn(BATCH, 3, 8, 8),)),
        "several inputs, dataclass output": (
            TwoHeads,
            {"image": image, "vector": torch.randn(BATCH, 3), "gain": torch.randn(BATCH)},
        ),
        "siamese": (Siamese, (image, torch.randn(BATCH, 1, 28, 28))),
        "detached gate": (DetachedTarget, (torch.randn(BATCH, 8),)),
        "partly frozen fine-tuning": (FineTuned, (image,)),
        "batch norms in evaluation mode": (FrozenNorms, (image,)),
        "partly under autocast": (PartlyAutocast, (torch.randn(BATCH, 16),)),
    }
