"""Predicted cost of one Delta-STN training update relative to an ordinary one: counted, not timed.

The ordinary update (the user's model: forward, backward, optimizer) and the two of Delta-STN (base pass and linearized
pass, each with its backward and optimizer) run on fake tensors, which have shapes and no data, and every operator that
is dispatched on the way is counted.  So the prediction follows whatever the rules emit, a user's own rules included.

In units of one forward of matrix products, an ordinary update costs 3, and the two of Delta-STN cost 3 + 5 (row-wise:
the primal, its tangent and the response's term, and the adjoints of the last two) or 3 + 3 (low rank): 8/3 and 2 times.
Everything else (norms, activations, masks) moves memory, which the balance below turns into the same unit.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from stn_fx.augment.draws import Draws
from stn_fx.compiler.pipeline import CompiledModel, state_tensors
from stn_fx.rules.slots import slots

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

FLOPS_PER_BYTE = 10.0
"""Floating-point operations of a matrix product in the time of one byte of traffic.

This and the next four were fitted once, on one CPU core, to medians of the updates of a small convolutional network, a
ResNet-18 and a vision transformer, row-wise and low-rank; the six ratios are met within 10 %.
"""

CACHE_BYTES, CACHED = 4e6, 0.25
"""Traffic of an operator whose tensors fit in the cache together counts this share."""

FLOPS_PER_DRAW = 300.0
"""Flops in the time of one element of ``bernoulli_``; a 64-bit word, of which stn_fx's masks cut four, takes half."""

FLOPS_PER_OPERATOR = 100_000.0
"""Flops in the time of one operator's overhead, which matters for small models and batches only."""

SMALLEST_BATCH, USUAL_BATCH = 16, 128
"""Below the first, a batch is taken for an example of shapes, and the cost is predicted for the second."""

DEFAULT_PASSES = 0.25
"""Linearized passes of `DeltaSTN` by default, in whole batches, for each batch: two over half of every fourth."""

UPDATE_SWEEPS = 5
"""SGD with momentum reads parameter, gradient and momentum, and writes parameter and momentum."""

_FREE = {"prim", "profiler"}
_DRAWS = {
    "bernoulli_": 1.0, "bernoulli": 1.0, "native_dropout": 1.0, "rand": 1.0, "rand_like": 1.0, "uniform_": 1.0,
    "randn": 1.0, "normal_": 1.0, "random_": 0.5,
}  # fmt: skip
_FUSED_RECURRENT = {
    "mkldnn_rnn_layer": 1.0, "_cudnn_rnn": 1.0, "mkldnn_rnn_layer_backward": 2.0, "_cudnn_rnn_backward": 2.0,
}  # fmt: skip
"""Operators of torch that the registry of flops does not know, and their share of a forward."""

_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


@dataclass(frozen=True)
class Work:
    """What a computation does: flops of matrix products, bytes moved (discounted in the cache), draws, operators."""

    flops: float = 0.0
    bytes: float = 0.0
    draws: float = 0.0
    operators: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.draws + other.draws,
            self.operators + other.operators,
        )

    @property
    def equivalent_flops(self) -> float:
        """All of it in the unit of matrix-product flops."""
        return (
            self.flops + FLOPS_PER_BYTE * self.bytes + FLOPS_PER_DRAW * self.draws + FLOPS_PER_OPERATOR * self.operators
        )


@dataclass(frozen=True)
class UpdateCost:
    """Work of an ordinary training update, and of the two that a Delta-STN update consists of; batch size B."""

    batch_size: int
    ordinary: Work
    base: Work
    linearized: Work

    @property
    def ratio(self) -> float:
        """Predicted time of a full Delta-STN update, with a linearized pass over the batch, in ordinary ones."""
        return (self.base.equivalent_flops + self.linearized.equivalent_flops) / self.ordinary.equivalent_flops

    @property
    def default_ratio(self) -> float:
        """The same of the mean update of `DeltaSTN` as it is by default."""
        linearized = DEFAULT_PASSES * self.linearized.equivalent_flops
        return (self.base.equivalent_flops + linearized) / self.ordinary.equivalent_flops

    @property
    def matmul_ratio(self) -> float:
        """The same from matrix products alone: what is reached where they take all the time."""
        return (self.base.flops + self.linearized.flops) / max(self.ordinary.flops, 1.0)


def predict_cost(compiled: CompiledModel, stn: "SelfTuningModule", batch_size: int | None = None) -> UpdateCost:
    """Count one update of each kind; None = the batch size of capture, or a usual one where that is a mere example."""
    mode = FakeTensorMode()
    state = {name: _fake(mode, tensor) for name, tensor in state_tensors(stn.model, compiled.captured).items()}
    detached = {name: tensor.detach() for name, tensor in state.items()}
    response = {
        f"{name}.{part}": _fake(mode, parameter)
        for name, module in stn.responses().items()
        for part, parameter in module.named_parameters()
    }
    axes = compiled.captured.batch_axes
    inputs = [_fake(mode, value) for value in compiled.captured.example]
    given = next(v.shape[a] for v, a in zip(inputs, axes, strict=True) if a is not None)
    batch = batch_size or (given if given >= SMALLEST_BATCH else USUAL_BATCH)
    with mode:
        inputs = [_resized(v, a, batch) for v, a in zip(inputs, axes, strict=True)]
        values_BH = torch.empty(batch, len(stn.hparams), dtype=stn.hparams.raw.dtype, device=stn.hparams.raw.device)
    draws = Draws(torch.Generator(values_BH.device))
    base = [state[name] for name, p in stn.model.named_parameters() if p.requires_grad]

    def ordinary() -> Any:
        args, kwargs = pytree.tree_unflatten(inputs, compiled.captured.input_spec)
        own = {name: state[name] for name, _ in slots(stn.model)}
        return torch.func.functional_call(stn.model, own, args, kwargs, tie_weights=False)

    def linearized() -> Any:
        _, tangents = compiled.linearized_training(detached, response, values_BH, values_BH, draws, *inputs)
        return tangents

    with _training(stn.model):
        return UpdateCost(
            int(batch),
            count(mode, ordinary) + _update(base),
            count(mode, lambda: compiled.base(state, {}, values_BH, None, draws, *inputs)) + _update(base),
            count(mode, linearized) + _update(response.values()),
        )


def count(mode: FakeTensorMode, run: Callable[[], Any]) -> Work:
    """Work of ``run`` and of the backward from the sum of its floating outputs."""
    with mode, _Counter() as counter:
        outputs = [v for v in pytree.tree_leaves(run()) if isinstance(v, Tensor) and v.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return counter.work


class _Counter(TorchDispatchMode):
    """Counts what is dispatched below autograd, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        output = func(*args, **options)
        if func.namespace not in _FREE and not func.is_view:
            self.work += _work_of(func, args, options, output)
        return output


def _work_of(func: Any, args: Any, options: dict[str, Any], output: Any) -> Work:
    name = func._opname
    if name in _ALLOCATIONS or name == "detach":
        return Work()
    flops = flop_registry.get(func.overloadpacket)
    traffic = sum(_bytes(t) for t in pytree.tree_leaves((args, options, output)) if isinstance(t, Tensor))
    made = sum(t.numel() for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
    if name in _FUSED_RECURRENT:
        counted = _FUSED_RECURRENT[name] * _recurrent_flops(*args)
    else:
        counted = float(flops(*args, **options, out_val=output)) if flops is not None else 0.0
    return Work(
        flops=counted,
        bytes=traffic if traffic > CACHE_BYTES else CACHED * traffic,
        draws=_DRAWS.get(name, 0.0) * made,
        operators=1.0,
    )


def _recurrent_flops(x: Tensor, *rest: Any) -> float:
    """A fused recurrent layer multiplies each of its matrices once for each step and example of x (T, N, F)."""
    weights = [t for t in pytree.tree_leaves(rest[:4]) if isinstance(t, Tensor) and t.ndim == 2]
    return 2.0 * x.shape[0] * x.shape[1] * sum(weight.numel() for weight in weights)


def _bytes(tensor: Tensor) -> float:
    """Memory that reading the tensor once touches; a broadcast axis is read from the cache."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return float(torch.Size(sizes).numel() * tensor.element_size())


def _update(parameters: Iterable[Tensor]) -> Work:
    return Work(bytes=UPDATE_SWEEPS * sum(_bytes(p) for p in parameters), operators=1.0)


def _resized(value: Any, axis: int | None, size: int) -> Any:
    if axis is None or value.shape[axis] == size:
        return value
    return value.new_empty(*value.shape[:axis], size, *value.shape[axis + 1 :])


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode, as capture sets it: submodules that the user froze inside a training model stay so."""
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
