"""Tiny modules, one per behaviour of a rule: the table that `test_rules.py` runs against the oracles."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import stn_fx

DEFAULT = "weight_decay,label_smoothing"
SITES = "dropout,weight_decay"
PATHS = "drop_path,weight_decay"


@dataclass(frozen=True)
class Case:
    """One module: `inputs(B)` gives a batch, `rules` names the rule classes that must be found in its graphs."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    rules: tuple[str, ...] = ()
    hparams: Any = DEFAULT
    options: dict[str, Any] = field(default_factory=dict)
    structures: tuple[str, ...] = ()
    """Structures that the plan must contain: "row-wise", "exact", "effective"."""
    tangents: bool = True
    """Whether forward mode judges it: it looks through `detach`, which backward mode and stn_fx stop at, and not every
    torch has it for every operator."""


class Fn(nn.Module):
    """A module from named submodules and parameters, and a forward function of (self, *inputs)."""

    def __init__(self, forward: Callable[..., Any], /, **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def noise(*shape: int) -> Callable[[int], tuple[Tensor]]:
    """Batches (B, *shape)."""

    def inputs(batch: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, *shape, generator=generator, dtype=torch.float64),)

    return inputs


def has_forward_mode(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> bool:
    """Whether this torch has one; of grid sampling since 2.15."""
    try:
        torch.func.jvp(function, inputs, inputs)
    except NotImplementedError:
        return False
    return True


def sequence_first(length: int, *shape: int) -> Callable[[int], tuple[Tensor]]:
    """Batches (T, B, *shape)."""
    return lambda batch: (noise(length, *shape)(batch)[0].transpose(0, 1).contiguous(),)


def tokens(length: int, vocabulary: int = 11, first: int = 0) -> Callable[[int], tuple[Tensor]]:
    """Integer batches (B, T)."""

    def inputs(batch: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return (first + torch.randint(vocabulary, (batch, length), generator=generator),)

    return inputs


CASES: list[Case] = []


def case(name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Any], *rules: str, **options: Any) -> None:
    """Add a case; `hparams` and `structures` by keyword, the rest goes to `Subject`."""
    known = {key: options.pop(key) for key in ("hparams", "structures", "tangents") if key in options}
    CASES.append(Case(name, build, inputs, rules, options=options, **known))


def seq(*layers: nn.Module) -> Callable[[], nn.Module]:
    """`nn.Sequential`, made anew at every call from freshly initialised copies."""
    return lambda: nn.Sequential(*[copy.deepcopy(layer) for layer in layers])


# ---- linear

LINEAR, MATMUL, ADDMM = "LinearRule", "MatmulRule", "AddmmRule"

case("linear", seq(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), noise(5), LINEAR, "PointwiseRule")
case("linear without bias", seq(nn.Linear(5, 4, bias=False)), noise(5), LINEAR)
case("linear on 4 axes", seq(nn.Linear(5, 4)), noise(2, 3, 5), LINEAR)
case(
    "matmul with a parameter",
    lambda: Fn(lambda m, x: x @ m.w + m.b, w=torch.rand(5, 4), b=torch.rand(4)),
    noise(5),
    MATMUL,
)
case("mm", lambda: Fn(lambda m, x: torch.mm(x, m.w), w=torch.rand(5, 4)), noise(5), MATMUL)
case(
    "addmm",
    lambda: Fn(lambda m, x: torch.addmm(m.b, x.view(-1, 5), m.w).view(-1, 3, 4), w=torch.rand(5, 4), b=torch.rand(4)),
    noise(3, 5),
    ADDMM,
)
case(
    "addmm, alpha and beta",
    lambda: Fn(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0), w=torch.rand(5, 4), b=torch.rand(4)),
    noise(5),
)
case("a parameter on the left of matmul", lambda: Fn(lambda m, x: m.w @ x, w=torch.rand(4, 5)), noise(5, 3))
case("bilinear", lambda: Fn(lambda m, x: m.f(x, x.sin()), f=nn.Bilinear(3, 3, 2)), noise(3))
case("einsum", lambda: Fn(lambda m, x: torch.einsum("bic,co->bio", x, m.w), w=torch.rand(5, 4)), noise(3, 5))
case(
    "einsum of heads",
    lambda: Fn(lambda m, x: torch.einsum("bic,hcd->bhid", x, m.w), w=torch.rand(2, 5, 4)),
    noise(3, 5),
)
case("baddbmm", lambda: Fn(lambda m, x: torch.baddbmm(m.b, x, x.transpose(1, 2)), b=torch.rand(1, 3, 3)), noise(3, 5))
case(
    "parameter used by two layers",
    lambda: Fn(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w), w=torch.rand(4, 4)),
    noise(4),
    LINEAR,
)
case(
    "weight and its transpose",
    lambda: Fn(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), w=torch.rand(3, 4)),
    noise(4),
    LINEAR,
)
case(
    "slices of one weight",
    lambda: Fn(lambda m, x: F.linear(x, m.w[:2]) * F.linear(x, m.w[2:]), w=torch.rand(4, 5)),
    noise(5),
    LINEAR,
)
case(
    "column slices of one weight",
    lambda: Fn(lambda m, x: F.linear(x, m.w[:, :5]) + F.linear(x.sin(), m.w[:, 5:]), w=torch.rand(4, 10)),
    noise(5),
    LINEAR,
)
case(
    "chunks of one weight",
    lambda: Fn(lambda m, x: sum(F.linear(x, w).sin() for w in m.w.chunk(2)), w=torch.rand(4, 5)),
    noise(5),
    LINEAR,
)
case("a reshaped weight", lambda: Fn(lambda m, x: F.linear(x, m.w.flatten(1)), w=torch.rand(4, 5, 1)), noise(5), LINEAR)
TRIANGLE = torch.ones(4, 5, dtype=torch.float64).tril()
for name, masked in {
    "times a mask": lambda w: w * TRIANGLE,
    "a mask times it": lambda w: TRIANGLE * w,
    "filled with zeros": lambda w: w.masked_fill(TRIANGLE == 0, 0.0),
    "scaled": lambda w: (w / 3.0) * 2.0,
    "transposed, masked": lambda w: (w.t() * TRIANGLE.t()).t(),
}.items():
    case(
        f"a weight {name}",
        lambda masked=masked: Fn(lambda m, x: F.linear(x, masked(m.w)), w=torch.rand(4, 5)),
        noise(5),
        LINEAR,
        structures=("row-wise",),
    )
case(
    "a weight times another",
    lambda: Fn(lambda m, x: F.linear(x, m.w * m.v), w=torch.rand(4, 5), v=torch.rand(4, 5)),
    noise(5),
    structures=("effective",),
    plain=lambda m: Fn(lambda m, x: F.linear(x, m.weight), weight=m.w.detach() * m.v.detach()),
)

# ---- convolutions

CONV, TRANSPOSED = "ConvolutionRule", "TransposedConvolutionRule"

for dims, (layer, size) in enumerate(((nn.Conv1d, (7,)), (nn.Conv2d, (6, 5)), (nn.Conv3d, (4, 4, 3))), 1):
    case(f"conv{dims}d", seq(layer(2, 4, 3, padding=1)), noise(2, *size), CONV)
    case(
        f"conv{dims}d, strides and dilation",
        seq(layer(2, 4, 2, stride=2, dilation=2, bias=False)),
        noise(2, *size),
        CONV,
    )
    case(f"conv{dims}d, groups", seq(layer(4, 6, 3, padding=1, groups=2)), noise(4, *size), CONV)
    case(f"conv{dims}d, depthwise", seq(layer(4, 4, 3, padding=1, groups=4)), noise(4, *size), CONV)
    case(f"conv{dims}d, depthwise with multiplier", seq(layer(4, 8, 3, padding=1, groups=4)), noise(4, *size), CONV)
for mode in ("circular", "reflect", "replicate"):
    case(
        f"conv2d, {mode} padding",
        seq(nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode), nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode)),
        noise(2, 6, 5),
        CONV,
    )
case(
    "conv2d, same padding",
    seq(nn.Conv2d(2, 4, (2, 4), padding="same"), nn.Conv2d(4, 3, 3, padding="same", dilation=2)),
    noise(2, 6, 5),
    CONV,
)
case(
    "conv2d, asymmetric",
    seq(nn.Conv2d(2, 4, (3, 1), (2, 1), (1, 0)), nn.Conv2d(4, 4, (1, 3), groups=4)),
    noise(2, 6, 5),
    CONV,
)
for dims, (layer, size) in enumerate(
    ((nn.ConvTranspose1d, (5,)), (nn.ConvTranspose2d, (4, 3)), (nn.ConvTranspose3d, (3, 2, 3))), 1
):
    case(f"transposed conv{dims}d", seq(layer(3, 4, 3), layer(4, 2, 3, padding=1)), noise(3, *size), TRANSPOSED)
    case(
        f"transposed conv{dims}d, groups and output padding",
        seq(layer(4, 6, 3, 2, 1, 1, groups=2)),
        noise(4, *size),
        TRANSPOSED,
    )
    case(f"transposed conv{dims}d, dilation", seq(layer(4, 6, 2, dilation=2, bias=False)), noise(4, *size), TRANSPOSED)


def weight_norm_by_hook() -> nn.Module:
    with warnings.catch_warnings():  # torch recommends its parametrization, but the older one is everywhere
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3))


case("weight norm, hook", weight_norm_by_hook, noise(5), LINEAR, structures=("effective",))
case(
    "weight norm, parametrization",
    lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), nn.Tanh()),
    noise(2, 7),
    CONV,
    structures=("effective",),
)
case(
    "StdConv2d",
    seq(timm.layers.StdConv2d(3, 4, 3, padding=1), nn.GELU()),
    noise(3, 5, 5),
    CONV,
    structures=("effective",),
)
case(
    "ScaledStdConv2d",
    seq(timm.layers.ScaledStdConv2d(3, 4, 3, padding=1), nn.GELU()),
    noise(3, 5, 5),
    CONV,
    structures=("effective",),
)

# ---- norms

case("batch norm 1d", seq(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()), noise(5), "BatchNormRule")
case("batch norm 1d on sequences", seq(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Tanh()), noise(3, 6), "BatchNormRule")
case(
    "batch norm 2d",
    seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    noise(3, 6, 5),
    "BatchNormRule",
    "ReluRule",
)
case("batch norm 3d", seq(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.Tanh()), noise(3, 3, 3, 3), "BatchNormRule")
case(
    "batch norm without affine",
    seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Tanh()),
    noise(3, 6, 5),
    "BatchNormRule",
)
case(
    "batch norm, cumulative average",
    seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Tanh()),
    noise(3, 6, 5),
    "BatchNormRule",
)
case(
    "frozen batch norm",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.Tanh()),
    noise(3, 6, 5),
    "BatchNormRule",
)
case("layer norm", seq(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh()), noise(3, 5), "LayerNormRule")
case("layer norm over two axes", seq(nn.Linear(5, 4), nn.LayerNorm((3, 4)), nn.Tanh()), noise(3, 5), "LayerNormRule")
case(
    "layer norm without affine",
    seq(nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False)),
    noise(3, 5),
    "LayerNormRule",
)
case("layer norm without bias", seq(nn.LayerNorm(5, bias=False), nn.Linear(5, 4)), noise(3, 5), "LayerNormRule")
case("group norm", seq(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()), noise(3, 6, 5), "GroupNormRule")
case("group norm of vectors", seq(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Tanh()), noise(3), "GroupNormRule")
case(
    "instance norm",
    seq(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Tanh()),
    noise(3, 6, 5),
    "InstanceNormRule",
    zero_gradients=("0.bias.G",),
)
case(
    "instance norm, affine",
    seq(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Tanh()),
    noise(3, 6),
    "InstanceNormRule",
    zero_gradients=("0.bias.G",),
)
case(
    "instance norm, running statistics",
    seq(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh()),
    noise(3, 6, 5),
    "InstanceNormRule",
)
case("RMS norm", seq(nn.Linear(5, 4), nn.RMSNorm(4), nn.Tanh()), noise(3, 5), "RMSNormRule")
case(
    "RMS norm over two axes", seq(nn.Linear(5, 4), nn.RMSNorm((3, 4), eps=1e-3), nn.Tanh()), noise(3, 5), "RMSNormRule"
)
case(
    "timm layer norm 2d",
    seq(nn.Conv2d(3, 4, 3), timm.layers.LayerNorm2d(4), nn.Tanh()),
    noise(3, 6, 5),
    "LayerNormRule",
)
case(
    "hand-written RMS norm",
    lambda: Fn(
        lambda m, x: m.f(m.g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        g=torch.rand(5),
        f=nn.Linear(5, 4),
    ),
    noise(3, 5),
    "ProductRule",
)
case("local response norm", seq(nn.Conv2d(3, 6, 3), nn.LocalResponseNorm(3), nn.Conv2d(6, 2, 1)), noise(3, 6, 5))

# ---- embeddings

case("embedding", seq(nn.Embedding(11, 6), nn.Linear(6, 3)), tokens(4), "EmbeddingRule")
case(
    "embedding with padding_idx",
    seq(nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 3)),
    tokens(4, 10, 1),
    "EmbeddingRule",
)


class TiedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.decode = nn.Linear(6, 11)
        self.decode.weight = self.embed.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.decode(self.mix(self.embed(indices)).tanh())


case("embedding tied to a decoder", TiedDecoder, tokens(4), "EmbeddingRule", LINEAR)
case(
    "position embedding by arange",
    lambda: Fn(
        lambda m, x: m.f(m.e(x) + m.p(torch.arange(x.shape[1]))),
        e=nn.Embedding(11, 6),
        p=nn.Embedding(4, 6),
        f=nn.Linear(6, 3),
    ),
    tokens(4),
    "EmbeddingRule",
)

# ---- sites

case(
    "dropout",
    seq(nn.Linear(5, 6), nn.Dropout(0.2), nn.Linear(6, 3), nn.Dropout(0.0)),
    noise(4, 5),
    "DropoutRule",
    hparams=SITES,
)
case(
    "dropout in place",
    seq(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(6, 3)),
    noise(4, 5),
    "DropoutRule",
    hparams=SITES,
)
case(
    "functional dropout",
    lambda: Fn(lambda m, x: m.g(F.dropout(m.f(x), m.p, m.training)), p=0.3, f=nn.Linear(5, 6), g=nn.Linear(6, 3)),
    noise(4, 5),
    "DropoutRule",
    hparams="dropout,weight_decay",
)
case(
    "channel dropout 1d",
    seq(nn.Conv1d(3, 8, 2), nn.Dropout1d(0.3), nn.Conv1d(8, 3, 2)),
    noise(3, 6),
    "DropoutRule",
    hparams=SITES,
)
case(
    "channel dropout 2d",
    seq(nn.Conv2d(3, 8, 2), nn.Dropout2d(0.3), nn.Conv2d(8, 3, 2)),
    noise(3, 5, 6),
    "DropoutRule",
    hparams=SITES,
)
case(
    "channel dropout 2d in place",
    seq(nn.Conv2d(3, 8, 2), nn.Dropout2d(0.3, inplace=True), nn.Conv2d(8, 3, 2)),
    noise(3, 5, 6),
    "DropoutRule",
    hparams=SITES,
)
case(
    "channel dropout 3d",
    seq(nn.Conv3d(3, 8, 2), nn.Dropout3d(0.3), nn.Conv3d(8, 3, 1)),
    noise(3, 3, 3, 3),
    "DropoutRule",
    hparams=SITES,
)
case(
    "alpha dropout",
    seq(nn.Linear(5, 9), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(9, 3)),
    noise(5),
    "DropoutRule",
    hparams=SITES,
)
case(
    "alpha dropout in place",
    seq(nn.Linear(5, 9), nn.SELU(), nn.AlphaDropout(0.2, inplace=True), nn.Linear(9, 3)),
    noise(5),
    "DropoutRule",
    hparams=SITES,
)
case(
    "feature alpha dropout",
    seq(nn.Conv2d(3, 9, 2), nn.FeatureAlphaDropout(0.2), nn.Conv2d(9, 3, 2)),
    noise(3, 5, 5),
    "DropoutRule",
    hparams=SITES,
)
case(
    "inserted dropout",
    seq(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 3)),
    noise(5),
    "DropoutRule",
    hparams=SITES,
)
case(
    "stochastic depth, rows",
    lambda: Fn(lambda m, x: x + m.d(m.f(x)), d=StochasticDepth(0.3, "row"), f=nn.Linear(5, 5)),
    noise(4, 5),
    "DropPathRule",
    hparams=PATHS,
)
case(
    "drop path, timm",
    lambda: Fn(lambda m, x: x + m.d(m.f(x)), d=timm.layers.DropPath(0.3), f=nn.Linear(5, 5)),
    noise(4, 5),
    "DropPathRule",
    hparams=PATHS,
)
case(
    "drop path without rescaling",
    lambda: Fn(lambda m, x: x + m.d(m.f(x)), d=timm.layers.DropPath(0.3, scale_by_keep=False), f=nn.Linear(5, 5)),
    noise(4, 5),
    "DropPathRule",
    hparams=PATHS,
)
case(
    "inserted drop path",
    lambda: Fn(lambda m, x: m.h(x + m.g(m.f(x).tanh())), f=nn.Linear(5, 5), g=nn.Linear(5, 5), h=nn.Linear(5, 2)),
    noise(4, 5),
    "DropPathRule",
    hparams=PATHS,
)
case("cutout", seq(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)), noise(3, 6, 6), "CutoutRule", hparams="cutout")
case(
    "input dropout",
    seq(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)),
    noise(9),
    "FloatingInputRule",
    hparams="input_dropout,input_scale,gaussian_noise,weight_decay",
)
case(
    "affine map, colour, blur, erasing",
    seq(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)),
    noise(3, 6, 6),
    "GeometryRule",
    "ColourRule",
    "GaussianBlurRule",
    "RandomErasingRule",
    hparams="rotation,shear,brightness,hue,gaussian_blur,random_erasing",
)
case(
    "word dropout and span masking",
    seq(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(30, 3)),
    tokens(5),
    "WordDropoutRule",
    "SpanMaskingRule",
    hparams="word_dropout(mask_token=3),span_masking(mask_token=3,padding=-1)",
)
case(
    "noise on activations",
    seq(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)),
    noise(9),
    "NoiseRule",
    hparams="noise@1",
)


def shifted(x: Tensor, value: Tensor, draws: Any) -> Tensor:
    """An own hyperparameter, random and the identity at value 0."""
    return x + value * draws.uniform(x.shape, x, "shift") * x.sin()


case(
    "an own hyperparameter",
    seq(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)),
    noise(9),
    "CustomRule",
    hparams=[stn_fx.CustomHyperparameter("shifted", shifted, "activation", 0.3, at="1")],
)

# ---- attention

ATTENTION = "AttentionRule"
KEY_BIAS = ("*in_proj_bias*",)


def mha(forward: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Fn(forward, a=nn.MultiheadAttention(8, 2, **options), f=nn.Linear(8, 8))


case(
    "MHA, batch first",
    mha(lambda m, x: m.a(m.f(x), x, x, need_weights=False)[0], batch_first=True),
    noise(5, 8),
    ATTENTION,
)
case(
    "MHA, sequence first",
    mha(lambda m, x: m.a(m.f(x), x, x, need_weights=False)[0]),
    sequence_first(6, 8),
    ATTENTION,
    batch_axis=1,
    name_axis=True,
)
case("MHA with weights", mha(lambda m, x: m.a(m.f(x), x, x)[0], batch_first=True), noise(5, 8), "SoftmaxRule")
case(
    "MHA, weights returned, per head",
    mha(lambda m, x: m.a(m.f(x), x, x, average_attn_weights=False), batch_first=True),
    noise(5, 8),
)
case(
    "MHA with dropout",
    mha(lambda m, x: m.a(m.f(x), x, x, need_weights=False)[0], batch_first=True, dropout=0.2),
    noise(5, 8),
    ATTENTION,
    hparams=SITES,
)
case(
    "MHA with dropout and weights",
    mha(lambda m, x: m.a(m.f(x), x, x)[0], batch_first=True, dropout=0.2),
    noise(5, 8),
    hparams=SITES,
)
case(
    "MHA, causal mask",
    mha(
        lambda m, x: m.a(
            m.f(x), x, x, need_weights=False, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), is_causal=True
        )[0],
        batch_first=True,
    ),
    noise(5, 8),
    ATTENTION,
)
case(
    "MHA, key padding mask",
    mha(lambda m, x, mask: m.a(m.f(x), x, x, key_padding_mask=mask, need_weights=False)[0], batch_first=True),
    lambda b: (*noise(5, 8)(b), torch.arange(5).expand(b, 5) > torch.arange(b).reshape(-1, 1) % 4),
    ATTENTION,
)
case(
    "MHA, other key and value sizes",
    lambda: Fn(
        lambda m, x: m.a(x, x[..., :6], x[..., :4], need_weights=False)[0],
        a=nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
    ),
    noise(5, 8),
    ATTENTION,
)
case(
    "MHA, bias_kv and zero attention",
    mha(lambda m, x: m.a(m.f(x), x, x, need_weights=False)[0], batch_first=True, add_bias_kv=True, add_zero_attn=True),
    noise(5, 8),
    ATTENTION,
)


def qkv_attention(**options: Any) -> Callable[[], nn.Module]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return m.proj(F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))

    return lambda: Fn(forward, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 3))


MASK = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
case("SDPA", qkv_attention(), noise(5, 8), ATTENTION)
case("SDPA, causal", qkv_attention(is_causal=True), noise(5, 8), ATTENTION)
case("SDPA, scale", qkv_attention(scale=0.3), noise(5, 8), ATTENTION)
case("SDPA, float mask", qkv_attention(attn_mask=MASK), noise(5, 8), ATTENTION)
case("SDPA, a row that is masked whole", qkv_attention(attn_mask=torch.ones(5, 5).tril(-1) > 0), noise(5, 8), ATTENTION)
case("SDPA, bool mask", qkv_attention(attn_mask=MASK > 0.2), noise(5, 8), ATTENTION)


def grouped_queries(m: nn.Module, x: Tensor) -> Tensor:
    q = m.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
    k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


case(
    "SDPA, grouped queries",
    lambda: Fn(grouped_queries, q=nn.Linear(8, 12), k=nn.Linear(8, 6), v=nn.Linear(8, 6)),
    noise(5, 8),
    ATTENTION,
    zero_gradients=("k.bias.G",),
)


def biased_scores(m: nn.Module, x: Tensor) -> Tensor:
    bias = m.table[torch.arange(9).reshape(3, 3)].permute(2, 0, 1).unsqueeze(0)
    q = m.f(x).unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).flatten(2)


case(
    "relative position bias table",
    lambda: Fn(biased_scores, table=torch.rand(9, 2), f=nn.Linear(5, 8)),
    noise(3, 5),
    ATTENTION,
    structures=("exact",),
)


def position_network(m: nn.Module, x: Tensor) -> Tensor:
    bias = 4 * torch.sigmoid(m.mlp(m.coordinates).permute(2, 0, 1)).unsqueeze(0)
    q = m.f(x).unflatten(-1, (2, 4)).transpose(1, 2)
    scores = q @ q.transpose(-2, -1) * torch.clamp(m.scale, max=4.6).exp() + bias
    return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


def make_position_network() -> nn.Module:
    module = Fn(
        position_network,
        f=nn.Linear(5, 8),
        scale=torch.zeros(2, 1, 1),
        mlp=nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2, bias=False)),
    )
    module.register_buffer("coordinates", torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(0)))
    return module


case("parameter-only network, as in swin_v2", make_position_network, noise(3, 5), structures=("exact",))
case(
    "qkv bias by cat",
    lambda: Fn(
        lambda m, x: F.linear(x, m.w, torch.cat([m.q, torch.zeros_like(m.q), m.v])),
        w=torch.rand(9, 5),
        q=torch.rand(3),
        v=torch.rand(3),
    ),
    noise(2, 5),
    structures=("exact",),
)
case(
    "transformer encoder layer",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True),
    noise(5, 8),
    ATTENTION,
    "LayerNormRule",
    hparams=SITES,
)
case(
    "transformer encoder layer, sequence first",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.1, norm_first=True, activation="gelu"),
    sequence_first(6, 8),
    ATTENTION,
    hparams=SITES,
    batch_axis=1,
    name_axis=True,
)
case(
    "transformer decoder layer",
    lambda: Fn(lambda m, x, y: m.d(x, y), d=nn.TransformerDecoderLayer(8, 2, 16, 0.1, batch_first=True)),
    lambda b: (*noise(4, 8)(b), *noise(5, 8)(b + 50)[0:0], noise(5, 8)(b)[0]),
    ATTENTION,
    hparams=SITES,
)

# ---- element-wise operators, activations and shapes

for activation in (
    nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.ELU,
    nn.SELU, nn.CELU, nn.LeakyReLU, nn.Softplus, nn.LogSigmoid,
    nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.GLU,
):  # fmt: skip
    rules = () if activation in (nn.Softsign, nn.Tanhshrink, nn.GLU) else ("PointwiseRule",)
    case(
        activation.__name__,
        seq(nn.Linear(5, 8), activation(), nn.Linear(4 if activation is nn.GLU else 8, 3)),
        noise(5),
        *rules,
    )
case("approximate GELU", seq(nn.Linear(5, 8), nn.GELU("tanh"), nn.Linear(8, 3)), noise(5), "PointwiseRule")
case("PReLU", seq(nn.Conv2d(3, 4, 2), nn.PReLU(4), nn.Conv2d(4, 2, 1)), noise(3, 5, 5))
case("PReLU, one slope", seq(nn.Linear(5, 8), nn.PReLU(), nn.Linear(8, 3)), noise(5))
case("softmax", seq(nn.Linear(5, 8), nn.Softmax(-1), nn.Linear(8, 3), nn.Softmax(1)), noise(5), "SoftmaxRule")
case("log softmax", seq(nn.Linear(5, 8), nn.LogSoftmax(-1), nn.Linear(8, 3)), noise(5))
case(
    "sums, differences and quotients",
    lambda: Fn(
        lambda m, x: (1 - m.f(x)) / (2 + m.g(x).square()) - m.b.sub(x, alpha=2) + 3 * x,
        f=nn.Linear(5, 5),
        g=nn.Linear(5, 5),
        b=torch.rand(5),
    ),
    noise(5),
    "SumRule",
    "ProductRule",
)
case(
    "division by a parameter",
    lambda: Fn(lambda m, x: m.f(x) / m.t + m.t / x.exp(), f=nn.Linear(5, 5), t=torch.rand(5)),
    noise(5),
    "ProductRule",
)
case(
    "temperature, a parameter without axes",
    lambda: Fn(lambda m, x: m.f(x) * m.t.exp(), f=nn.Linear(5, 5), t=torch.tensor(0.5)),
    noise(5),
    "ProductRule",
    structures=("exact",),
)
case(
    "powers and clamps",
    lambda: Fn(lambda m, x: m.f(x).pow(3).clamp(-2, 2) + m.f(x).abs().pow(m.p), f=nn.Linear(5, 5), p=torch.rand(5)),
    noise(5),
)
case(
    "F.normalize with a zero row",
    lambda: Fn(lambda m, x: m.g(F.normalize(m.f(x), dim=-1)), f=nn.Linear(5, 4, bias=False), g=nn.Linear(4, 3)),
    lambda b: (noise(3, 5)(b)[0] * torch.tensor([1.0, 0.0, 1.0]).double().reshape(3, 1),),
)
case(
    "class token",
    lambda: Fn(
        lambda m, x: m.f(torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position),
        token=torch.rand(1, 1, 5),
        position=torch.rand(1, 4, 5),
        f=nn.Linear(5, 3),
    ),
    noise(3, 5),
    "JoinRule",
    structures=("exact",),
)
case(
    "layer scale",
    lambda: Fn(
        lambda m, x: x + m.g.reshape(1, -1, 1, 1) * m.f(x), f=nn.Conv2d(3, 3, 3, padding=1), g=torch.full((3,), 1e-6)
    ),
    noise(3, 5, 5),
    structures=("exact",),
)
case(
    "stack and unbind",
    lambda: Fn(lambda m, x: torch.stack([a.sin() for a in m.f(x).unbind(1)], 2), f=nn.Linear(5, 4)),
    noise(3, 5),
    "JoinRule",
    "LinearInInputRule",
)
case(
    "cat, chunk and split",
    lambda: Fn(
        lambda m, x: torch.cat(
            [a * b for a, b in zip(m.f(x).chunk(2, -1), m.g(x).split([2, 2], -1), strict=True)] + [x], -1
        ),
        f=nn.Linear(5, 4),
        g=nn.Linear(5, 4),
    ),
    noise(5),
    "JoinRule",
)
case(
    "where",
    lambda: Fn(lambda m, x: torch.where(x > 0, m.f(x), m.b), f=nn.Linear(5, 5), b=torch.rand(5)),
    noise(5),
    "WhereRule",
)
case(
    "where of activations",
    lambda: Fn(lambda m, x: torch.where(x > 0, m.f(x), 0.5 * x) + torch.where(x > 1, m.f(x), 0.0), f=nn.Linear(5, 5)),
    noise(5),
    "WhereRule",
)
case(
    "masked fill",
    lambda: Fn(lambda m, x: m.f(x).masked_fill(x > 0, 2.0).softmax(-1), f=nn.Linear(5, 5)),
    noise(5),
    "ShiftedRule",
    "SoftmaxRule",
)
case(
    "constant and reflecting pad",
    lambda: Fn(
        lambda m, x: F.pad(F.pad(m.f(x), (1, 2, 0, 1), value=3.0).sin(), (1, 1, 1, 1), mode="reflect"),
        f=nn.Conv2d(2, 3, 2),
    ),
    noise(2, 5, 5),
    "ShiftedRule",
)
case(
    "detach",
    lambda: Fn(
        lambda m, x: m.g(m.f(x).detach() * m.h(x)) + m.f(x), f=nn.Linear(5, 4), g=nn.Linear(4, 4), h=nn.Linear(5, 4)
    ),
    noise(5),
    "DetachRule",
    tangents=False,
)
case(
    "max and min",
    lambda: Fn(
        lambda m, x: m.f(x).amax(1) + m.f(x).max(1).values + torch.maximum(m.f(x)[:, 0], x[:, 0, :4]), f=nn.Linear(5, 4)
    ),
    noise(3, 5),
)
case(
    "variance and norm",
    lambda: Fn(
        lambda m, x: (m.f(x) - m.f(x).mean(1, True)) / m.f(x).std(1, keepdim=True) + m.f(x).norm(dim=-1, keepdim=True),
        f=nn.Linear(5, 4),
    ),
    noise(3, 5),
)
case(
    "sort and topk",
    lambda: Fn(
        lambda m, x: m.f(x).sort(-1).values + m.f(x).topk(2, -1).values.sum(-1, keepdim=True), f=nn.Linear(5, 4)
    ),
    noise(3, 5),
)
case(
    "products of activations",
    lambda: Fn(lambda m, x: torch.bmm(m.f(x), m.g(x).transpose(1, 2)) @ m.f(x), f=nn.Linear(5, 4), g=nn.Linear(5, 4)),
    noise(3, 5),
)
case(
    "cumulative sums and rolls",
    lambda: Fn(lambda m, x: m.f(x).cumsum(1).roll(1, 1).flip(2), f=nn.Linear(5, 4)),
    noise(3, 5),
    "LinearInInputRule",
)
case(
    "max pools",
    seq(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2, ceil_mode=True), nn.AdaptiveMaxPool2d(2), nn.Conv2d(4, 2, 1)),
    noise(2, 9, 8),
    "MaxPoolRule",
)
case(
    "max pool, strides and padding",
    seq(nn.Conv2d(2, 4, 3), nn.MaxPool2d(3, 2, 1, dilation=1), nn.Conv2d(4, 2, 1)),
    noise(2, 9, 8),
    "MaxPoolRule",
)
case(
    "max pools in 1 and 3 dimensions",
    lambda: Fn(
        lambda m, x: (
            m.g(F.max_pool1d(m.f(x), 2))
            + F.max_pool3d(m.f(x)[:, None, :, :, None], (1, 2, 1))[:, 0, :3, :, 0].repeat(1, 1, 1)[:, :, 1:]
        ),
        f=nn.Conv1d(2, 4, 2),
        g=nn.Conv1d(4, 3, 2),
    ),
    noise(2, 9),
)
case(
    "max pool with indices and unpool",
    lambda: Fn(
        lambda m, x: F.max_unpool2d(*F.max_pool2d(m.f(x), 2, return_indices=True), 2), f=nn.Conv2d(2, 3, 3, padding=1)
    ),
    noise(2, 6, 6),
)
case(
    "average pools",
    seq(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(8, 2)),
    noise(2, 9, 8),
    "LinearInInputRule",
)
for mode in ("nearest", "bilinear", "bicubic"):
    case(
        f"interpolate, {mode}",
        lambda mode=mode: Fn(
            lambda m, x: m.g(F.interpolate(m.f(x), scale_factor=2, mode=mode)),
            f=nn.Conv2d(2, 4, 3),
            g=nn.Conv2d(4, 2, 1),
        ),
        noise(2, 5, 5),
        "LinearInInputRule",
    )
case(
    "pixel shuffle and unfold",
    seq(nn.Conv2d(2, 8, 3), nn.PixelShuffle(2), nn.Unfold(2), nn.Tanh()),
    noise(2, 5, 5),
    "LinearInInputRule",
)
case(
    "grid sample",
    lambda: Fn(
        lambda m, x: F.grid_sample(
            x,
            F.affine_grid(m.f(x.mean((2, 3))).reshape(-1, 2, 3), list(x.shape), align_corners=False),
            align_corners=False,
        ),
        f=nn.Linear(2, 6),
    ),
    noise(2, 5, 5),
    tangents=has_forward_mode(lambda x: F.grid_sample(x, x.movedim(1, 3), align_corners=False), noise(2, 3, 3)(1)),
)

# ---- recurrent cells, in-place operators, no_grad, nested inputs and outputs


def recurrent(m: nn.Module, x: Tensor) -> Tensor:
    state = x.new_zeros(x.shape[0], 4)
    state = (state, state) if isinstance(m.cell, nn.LSTMCell) else state
    for step in x.unbind(1):
        state = m.cell(step, state)
    return m.head(state[0] if isinstance(state, tuple) else state)


case("LSTM cell", lambda: Fn(recurrent, cell=nn.LSTMCell(3, 4), head=nn.Linear(4, 2)), noise(3, 3))
case("GRU cell", lambda: Fn(recurrent, cell=nn.GRUCell(3, 4), head=nn.Linear(4, 2)), noise(3, 3))
case("RNN cell", lambda: Fn(recurrent, cell=nn.RNNCell(3, 4), head=nn.Linear(4, 2)), noise(3, 3))
case(
    "recurrent cells without bias",
    lambda: Fn(
        lambda m, x: m.head(m.f(x[:, 0], m.g(x[:, 1], m.h(x[:, 2])))),
        f=nn.GRUCell(3, 4, bias=False),
        g=nn.RNNCell(3, 4, bias=False, nonlinearity="relu"),
        h=nn.Linear(3, 4),
        head=nn.Linear(4, 2),
    ),
    noise(3, 3),
)

# ---- recurrent networks

RECURRENT = "RecurrentRule"


def network(kind: type[nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    """A recurrent network of 3 features and 4 cells, and a layer on its output."""
    width = (2 if options.get("bidirectional") else 1) * (options.get("proj_size") or 4)
    return lambda: Fn(lambda m, x: m.head(m.net(x)[0]), net=kind(3, 4, **options), head=nn.Linear(width, 2))


def with_state(length: int, layers: int, *widths: int) -> Callable[[int], tuple[Any, ...]]:
    """Sequence-first batches (T, B, 3) with an initial state, (L, B, width) for each width."""

    def inputs(batch: int) -> tuple[Any, ...]:
        states = tuple(noise(layers, width)(batch)[0].transpose(0, 1).contiguous() for width in widths)
        return (*sequence_first(length, 3)(batch), states if len(states) > 1 else states[0])

    return inputs


case(
    "LSTM, layers in both directions",
    network(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.2, batch_first=True),
    noise(4, 3),
    RECURRENT,
    hparams=SITES,
)
case("LSTM, sequence first, T == B", network(nn.LSTM, num_layers=2), sequence_first(5, 3), RECURRENT, batch_axis=1)
case(
    "LSTM with a projection, dropout at p = 0",
    network(nn.LSTM, num_layers=2, proj_size=2, batch_first=True),
    noise(4, 3),
    RECURRENT,
    hparams=SITES,
)
case("LSTM without bias", network(nn.LSTM, bias=False, batch_first=True), noise(4, 3), RECURRENT)
case(
    "LSTM with a given state, L == T == B",
    lambda: Fn(lambda m, x, state: m.net(m.first(x), state), first=nn.Linear(3, 3), net=nn.LSTM(3, 4, 5)),
    with_state(5, 5, 4, 4),
    RECURRENT,
    batch_axis=1,
)
case(
    "GRU, layers in both directions",
    network(nn.GRU, num_layers=2, bidirectional=True, dropout=0.2),
    sequence_first(4, 3),
    RECURRENT,
    hparams=SITES,
    batch_axis=1,
    name_axis=True,
)
case(
    "GRU without bias, with a given state",
    lambda: Fn(lambda m, x, state: m.net(m.first(x), state), first=nn.Linear(3, 3), net=nn.GRU(3, 4, 2, bias=False)),
    with_state(3, 2, 4),
    RECURRENT,
    batch_axis=1,
)
case("RNN, tanh", network(nn.RNN, num_layers=2, batch_first=True), noise(4, 3), RECURRENT)
case("RNN, relu", network(nn.RNN, nonlinearity="relu", bidirectional=True, batch_first=True), noise(4, 3), RECURRENT)
case(
    "a learned initial state",
    lambda: Fn(
        lambda m, x: m.net(x, m.start.expand(-1, x.shape[0], -1).contiguous())[0],
        net=nn.GRU(3, 4, 2, batch_first=True),
        start=torch.rand(2, 1, 4),
    ),
    noise(4, 3),
    RECURRENT,
)
case(
    "a recurrent network over the words of several sentences",
    lambda: Fn(
        lambda m, x: m.head(m.net(x.flatten(0, 1))[1][0][-1].unflatten(0, (-1, 3)).sum(1)),
        net=nn.LSTM(3, 4, 2, batch_first=True),
        head=nn.Linear(4, 2),
    ),
    noise(3, 4, 3),
    RECURRENT,
)
case(
    "a recurrent network called as a function",
    lambda: Fn(
        lambda m, x: torch.lstm(
            x, (x.new_zeros(1, x.shape[0], 4),) * 2, [m.a, m.b], False, 1, 0.0, m.training, False, True
        )[0],
        a=torch.rand(16, 3),
        b=torch.rand(16, 4),
    ),
    noise(3, 3),
    RECURRENT,
)
case(
    "a recurrent network over parameters alone",
    lambda: Fn(lambda m, x: x * m.net(m.start)[0], net=nn.LSTM(3, 4, batch_first=True), start=torch.rand(1, 5, 3)),
    noise(5, 4),
    RECURRENT,
    structures=("exact",),
)
case(
    "recurrent weights with another use",
    lambda: Fn(
        lambda m, x: m.net(x)[0] * m.net.weight_hh_l0.sum() + x * m.net.weight_ih_l0.sum(),
        net=nn.LSTM(1, 4, batch_first=True),
    ),
    noise(4, 1),
    RECURRENT,
    structures=("exact",),
)


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    y = m.f(x)
    y[:, 1:3] += x[:, 1:3]
    y[:, 0].mul_(2.0)
    y.view(y.shape[0], 2, 2).transpose(1, 2).add_(1.0)
    y.relu_()
    return m.g(y)


case("in-place operators on views", lambda: Fn(in_place, f=nn.Linear(5, 4), g=nn.Linear(4, 3)), noise(5), "CopyRule")


def partly_without_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.sigmoid() * 2
    return m.f(x) * gate[:, :4]


case("no_grad region", lambda: Fn(partly_without_grad, f=nn.Linear(5, 4)), noise(5))


class Branch(nn.Module):
    """Looks at values, so that it cannot be captured; nothing in it could respond."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if x.sum() > -1e9 else x


case(
    "opaque leaf",
    seq(nn.Linear(5, 4), Branch(), nn.Dropout(0.2), nn.Linear(4, 3)),
    noise(5),
    "OpaqueRule",
    hparams=SITES,
)


@dataclass
class Pair:
    """A dataclass that forward takes or returns."""

    logits: Tensor
    features: list[Tensor]


case(
    "several inputs",
    lambda: Fn(lambda m, x, y: m.f(x) * m.g(y), f=nn.Linear(5, 4), g=nn.Linear(3, 4)),
    lambda b: (noise(5)(b)[0], noise(3)(b)[0]),
)
case(
    "keyword inputs, an output of dicts and tuples",
    lambda: Fn(
        lambda m, *, image, scale: {"a": m.f(image), "b": (m.g(image) * scale[:, None], [image])},
        f=nn.Linear(5, 4),
        g=nn.Linear(5, 2),
    ),
    lambda b: {"image": noise(5)(b)[0], "scale": noise()(b)[0]},
)
case(
    "nested inputs",
    lambda: Fn(lambda m, batch: m.f(batch["x"]) + batch["rest"][0], f=nn.Linear(5, 4)),
    lambda b: ({"x": noise(5)(b)[0], "rest": (noise(4)(b)[0],)},),
)
case(
    "a dataclass as output",
    lambda: Fn(lambda m, x: Pair(m.f(x), [m.g(x), x]), f=nn.Linear(5, 4), g=nn.Linear(5, 2)),
    noise(5),
)
case(
    "a dataclass as input",
    lambda: Fn(lambda m, pair: m.f(pair.logits) + pair.features[0], f=nn.Linear(5, 4)),
    lambda b: (Pair(noise(5)(b)[0], [noise(4)(b)[0]]),),
)
case(
    "an integer output beside the logits",
    lambda: Fn(lambda m, x: (m.f(x), m.f(x).argmax(-1)), f=nn.Linear(5, 4)),
    noise(5),
)
case("a part that gives back its input", lambda: Fn(lambda m, x: (m.f(x), x), f=nn.Linear(5, 4)), noise(5))
case(
    "T == B, sequence first, named",
    lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 3)),
    lambda b: (sequence_first(3, 5)(b)[0],),
    hparams=SITES,
    batch_axis=1,
    name_axis=True,
)
