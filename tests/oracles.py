"""The oracles of DESIGN section 6: what a compiled model must agree with, computed by the user's own model alone.

Nothing here calls into `stn_fx.check`, and nothing knows an architecture.  A judge is the user's module in plain
PyTorch: `functional_call` with changed weights for the response pass, `torch.func.jvp` in weight space for the
linearized pass, central differences for gradients.  B examples, H hyperparameters, everything in float64.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

import stn_fx

OFF = -50.0
"""Raw value at which every rate is zero."""

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass
class Subject:
    """A compiled model on trial, beside the user's model.

    `inputs(B)` gives a batch; `batch_axis` is where the examples lie in inputs and outputs (None: not batched).
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    hparams: Any = "weight_decay,label_smoothing"
    response: Any = "rowwise"
    batch_axis: int = 0
    name_axis: bool = False
    input_axes: tuple[int, ...] | None = None
    """Where the examples lie in each input, where that is not `batch_axis` for all."""
    output_axes: tuple[int, ...] | None = None
    """The same for each floating output."""
    shared: tuple[str, ...] = ()
    """Keyword inputs that are the same for every example."""
    captured_batch: int = 3
    zero_gradients: tuple[str, ...] = ()
    """Response parameters whose gradient is zero for a reason (a key bias under softmax); patterns."""
    plain: Callable[[nn.Module], nn.Module] | None = None
    """The same function with computed weights as plain parameters; None = `as_plain_layers`."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of `stn_fx.transform`."""
    model: nn.Module = field(init=False)
    twin: nn.Module = field(init=False)
    stn: Any = field(init=False)
    modes: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = randomised(self.build())
        self.modes = [module.training for module in self.model.modules()]
        axes = {"batch_axis": self.input_axes or self.batch_axis} if self.name_axis else {}
        options: dict[str, Any] = {**self.options, **axes}
        if self.shared:
            example = self.inputs(self.captured_batch)
            options["batch_axis"] = [None if name in self.shared else self.batch_axis for name in example]
        self.stn = stn_fx.transform(
            self.model, self.hparams, self.inputs(self.captured_batch), response=self.response, seed=0,
            image_format=stn_fx.ImageFormat(0.5, 0.25), **options,
        )  # fmt: skip
        spread(self.stn)
        state = self.model.state_dict()
        self.twin = randomised(self.build())
        self.twin.load_state_dict(state)
        self.twin = (self.plain or as_plain_layers)(self.twin)

    def train(self) -> None:
        """Training mode as the user left it: parts that `build` holds in evaluation mode stay there."""
        self.stn.train()
        for module, training in zip(self.model.modules(), self.modes, strict=True):
            module.training = training

    def training_twin(self, keeps_statistics: bool = False) -> nn.Module:
        """The user's model in training mode, dropping nothing."""
        return without_randomness(self.twin, self.modes, keeps_statistics)

    # ---- data

    def displacement(self, batch: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return 0.5 * torch.randn(batch, len(self.stn.hparams), generator=generator, dtype=torch.float64)

    def raw(self, delta_BH: Tensor) -> Tensor:
        return self.stn.hparams.raw.detach() + delta_BH

    def call(self, function: Callable[..., Any], inputs: Inputs, **options: Any) -> Any:
        return function(**inputs, **options) if isinstance(inputs, dict) else function(*inputs, **options)

    def example(self, inputs: Inputs, i: int) -> Inputs:
        """The batch that holds example i alone."""
        if isinstance(inputs, dict):
            return {k: v if k in self.shared else self._row(v, i) for k, v in inputs.items()}
        return self._row(inputs, i, self.input_axes)  # type: ignore[no-any-return]

    def _row(self, value: Any, i: int, axes: tuple[int, ...] | None = None) -> Any:
        flat, spec = pytree.tree_flatten(value)
        axes = axes or (self.batch_axis,) * len(flat)
        narrowed = [
            v.narrow(axis, i, 1) if isinstance(v, Tensor) and v.ndim > axis else v
            for v, axis in zip(flat, axes, strict=True)
        ]
        return pytree.tree_unflatten(narrowed, spec)

    def row(self, output: Any, i: int) -> list[Tensor]:
        return self._row(leaves(output), i, self.output_axes)  # type: ignore[no-any-return]

    # ---- judges

    def changed_weights(self, delta_H: Tensor) -> dict[str, Tensor]:
        """`DeltaW` of one displacement under every name that the weight has."""
        response = {name: change.detach() for name, change in self.stn.weight_response(delta_H).items()}
        owner = {id(p): name for name, p in self.twin.named_parameters()}
        assert response.keys() <= set(owner.values()), "a response of something that the judge does not have"
        return {name: response[owner[id(p)]] for name, p in _places(self.twin) if owner[id(p)] in response}

    def base_weights(self, model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return {name: parameters[name].detach() for name in names}

    def user(self, model: nn.Module, inputs: Inputs, weights: dict[str, Tensor]) -> list[Tensor]:
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        return leaves(torch.func.functional_call(model, weights, args, kwargs, tie_weights=False))

    def responded(self, inputs: Inputs, delta_H: Tensor) -> list[Tensor]:
        """The user's model, in evaluation mode, with the weights `w0 + DeltaW(delta)`."""
        change = self.changed_weights(delta_H)
        base = self.base_weights(self.twin, change)
        return self.user(self.twin.eval(), inputs, {name: base[name] + change[name] for name in change})

    def weight_space_jvp(self, model: nn.Module, inputs: Inputs, delta_H: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(primal, tangent) of the user's model along `DeltaW(delta)`."""
        change = self.changed_weights(delta_H)
        base = self.base_weights(model, change)
        return torch.func.jvp(lambda weights: self.user(model, inputs, weights), (base,), (change,))


# ---- oracles; each raises AssertionError where the compiled model disagrees


def assert_unchanged(subject: Subject, batch: int) -> None:
    """Evaluation is bit-identical; without displacement the response pass equals it; training with all rates at zero
    equals the user's training pass."""
    stn, inputs = subject.stn, subject.inputs(batch)
    user, wrapped = subject.model.eval(), stn.eval()
    expected = leaves(subject.call(user, inputs))
    for theirs, ours in zip(leaves(subject.call(wrapped, inputs)), expected, strict=True):
        assert torch.equal(theirs, ours)
    assert_close(leaves(subject.call(stn.respond, inputs)), expected, "response pass without displacement")
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    judge = subject.training_twin(keeps_statistics=True)
    with rates_off(stn):
        subject.train()
        ours = leaves(subject.call(stn, inputs))
        stn.eval()
    assert_close(ours, leaves(subject.call(judge, inputs)), "base pass with all rates at zero")
    statistics = dict(judge.named_buffers())
    for name, buffer in subject.model.named_buffers():
        if name in statistics and buffer.is_floating_point():
            assert_close([buffer], [statistics[name]], f"{name} after the base pass")
    subject.model.load_state_dict(state)


def assert_base_gradients(subject: Subject, batch: int) -> None:
    """Gradients of the user's parameters in the base pass, with all rates at zero, are those of the user's own pass."""
    inputs = subject.inputs(batch)
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    judge = without_randomness(subject.model, subject.modes, keeps_statistics=True)
    with rates_off(subject.stn):
        subject.train()
        ours = _gradients(_loss(subject.call(subject.stn, inputs)), subject.model)
        subject.stn.eval()
    theirs = _gradients(_loss(subject.call(judge, inputs)), judge)
    for name, gradient in theirs.items():
        scale = max(gradient.norm().item(), 1e-3)
        error = (ours[name] - gradient).norm().item() / scale
        assert error < 1e-9, f"gradient of {name} in the base pass: relative error {error:.1e}"
    subject.model.load_state_dict(state)


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    loss.backward()  # reentrant checkpoints refuse torch.autograd.grad
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_response_pass(subject: Subject, batch: int) -> None:
    inputs, delta_BH = subject.inputs(batch), subject.displacement(batch)
    subject.stn.train()  # the response pass runs the evaluation graph in either mode
    output = subject.call(subject.stn.respond, inputs, raw=subject.raw(delta_BH))
    subject.stn.eval()
    for i in range(batch):
        judged = subject.responded(subject.example(inputs, i), delta_BH[i])
        assert_close(subject.row(output, i), judged, f"response pass, example {i} of {batch}")


def assert_linearized_pass(subject: Subject, batch: int) -> None:
    inputs, delta_BH = subject.inputs(batch), subject.displacement(batch)
    subject.stn.eval()
    primal, tangent = subject.call(subject.stn.linearize, inputs, raw=subject.raw(delta_BH))
    for i in range(batch):
        judged = subject.weight_space_jvp(subject.twin.eval(), subject.example(inputs, i), delta_BH[i])
        assert_close(subject.row(primal, i), judged[0], f"primal of example {i} of {batch}")
        assert_close(subject.row(tangent, i), judged[1], f"tangent of example {i} of {batch}")


def assert_training_graph(subject: Subject, batch: int) -> None:
    """One displacement for all rows: the tangent is the weight-space jvp of the whole batch, on batch statistics."""
    inputs, stn = subject.inputs(batch), subject.stn
    delta_H = subject.displacement(1)[0]
    buffers = {name: buffer.clone() for name, buffer in subject.model.named_buffers()}
    with rates_off(stn):
        subject.train()
        raw_BH = subject.raw(delta_H.expand(batch, -1))
        primal, tangent = subject.call(stn.linearize, inputs, raw=raw_BH)
        stn.eval()
    judged = subject.weight_space_jvp(subject.training_twin(), inputs, delta_H)
    # Batch statistics over few values amplify rounding.
    assert_close(leaves(primal), judged[0], "primal of the training graph", 1e-8)
    assert_close(leaves(tangent), judged[1], "tangent of the training graph", 1e-8)
    for name, buffer in subject.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), f"the linearized pass has changed the buffer {name}"


def assert_sites(subject: Subject, batch: int) -> None:
    """With all rates at zero except in row j, exactly row j of the training pass changes."""
    stn, inputs = subject.stn, subject.inputs(batch)
    acting = {name for site in stn.compiled.plan.sites for _, name in site.hyperparameters}
    columns = [stn.hparams.index(name) for name in acting]
    assert columns, "the model has no site to test"
    subject.train()
    off = torch.full((batch, len(stn.hparams)), OFF, dtype=torch.float64)
    still, _ = subject.call(stn.linearize, inputs, raw=off)
    for j in range(batch):
        raw_BH = off.clone()
        raw_BH[j, columns] = 4.0
        moved, _ = subject.call(stn.linearize, inputs, raw=raw_BH)
        for i in range(batch):
            same = all(map(torch.equal, subject.row(moved, i), subject.row(still, i)))
            assert same == (i != j), f"rates act in row {j}, but row {i} {'stayed' if same else 'changed'}"
    stn.eval()


def assert_gradients(subject: Subject, batch: int) -> None:
    """Response parameters and raw hyperparameters against central differences; every one receives a gradient."""
    _assert_response_gradients(subject, batch)
    _assert_hypergradient(subject, batch)


def _assert_response_gradients(subject: Subject, batch: int) -> None:
    inputs, stn = subject.inputs(batch), subject.stn
    raw_BH = subject.raw(subject.displacement(batch))
    named = {f"{n}.{part}": p for n, r in stn.responses().items() for part, p in r.named_parameters()}
    stn.eval()

    def loss() -> Tensor:
        primal, tangent = subject.call(stn.linearize, inputs, raw=raw_BH)
        return _loss(pytree.tree_map(lambda p, t: p + t if t is not None else p, primal, tangent))

    gradients = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
    for (name, _), gradient in zip(named.items(), gradients, strict=True):
        excused = any(fnmatch(name, pattern) for pattern in subject.zero_gradients)
        assert gradient is not None or excused, f"{name} receives no gradient"
        assert gradient is None or gradient.isfinite().all(), f"the gradient of {name} is not finite"
        assert excused or gradient.norm() > 1e-12, f"the gradient of {name} is zero"
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), gradients, strict=True)]
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.norm() for p in named.values()]
        directions = [d / d.norm().clamp(min=1e-9) * 1e-3 for d in directions]
        ahead, behind = (_moved(named.values(), directions, sign, loss) for sign in (0.1, -0.1))
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
        size = math.sqrt(sum((g.norm() * d.norm()).item() ** 2 for g, d in zip(gradients, directions, strict=True)))
        difference = (ahead - behind).item() / 0.2
        assert abs(difference - slope) < 1e-6 * size + 1e-11, (difference, slope, size)


def _assert_hypergradient(subject: Subject, batch: int) -> None:
    """The centre of the displacement is held fixed: without that the hypergradient would be zero."""
    inputs, stn = subject.inputs(batch), subject.stn
    centre = stn.hparams.raw.detach().clone()
    (gradient,) = torch.autograd.grad(_loss(subject.call(stn.respond, inputs)), stn.hparams.raw)
    assert (gradient.abs() > 1e-12).all(), gradient
    for h in range(len(centre)):
        step = torch.zeros_like(centre)
        step[h] = 1e-5
        with torch.no_grad():
            ahead, behind = (
                _loss(subject.call(stn.respond, inputs, raw=(centre + s * step).expand(batch, -1))) for s in (1, -1)
            )
        difference = (ahead - behind).item() / 2e-5
        assert abs(difference - gradient[h].item()) < 1e-6 * gradient.norm().item(), (h, difference, gradient)


def _moved(parameters: Any, directions: list[Tensor], sign: float, loss: Callable[[], Tensor]) -> Tensor:
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, d in zip(parameters, directions, strict=True):
            p.add_(d, alpha=sign)
        try:
            return loss().detach()
        finally:
            for p, k in zip(parameters, kept, strict=True):
                p.copy_(k)


def _loss(output: Any) -> Tensor:
    """A loss whose weights differ for every element, so that no symmetry hides an error."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves(output):
        weights = torch.cos(torch.arange(leaf.numel(), dtype=leaf.dtype)).reshape(leaf.shape)
        total = total + (leaf * weights).mean() + 0.1 * (leaf * leaf).mean()
    return total


EVERY_ORACLE = (assert_unchanged, assert_response_pass, assert_linearized_pass, assert_training_graph, assert_gradients)


# ---- helpers


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every place of every parameter by one name; `functional_call` damages a module that it is given by two."""
    for path, module in model.named_modules():
        yield from module.named_parameters(path, recurse=False, remove_duplicate=False)


def leaves(output: Any) -> list[Tensor]:
    """The floating tensors of a nested output."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    worst = 0.0
    for left, right in zip(ours, theirs, strict=True):
        assert left.shape == right.shape, (left.shape, right.shape)
        assert torch.equal(left.isnan(), right.isnan()), "NaN at different places"
        difference = (left - right).nan_to_num(0.0, 0.0, 0.0).norm().item()
        worst = max(worst, difference / max(right.nan_to_num(0.0, 0.0, 0.0).norm().item(), 1e-6))
    return worst


def assert_close(ours: list[Tensor], theirs: list[Tensor], what: str, tolerance: float = 1e-10) -> None:
    error = relative_error(ours, theirs)
    assert error < tolerance, f"{what}: relative error {error:.1e}"


def randomised(model: nn.Module, seed: int = 7) -> nn.Module:
    """All parameters and running statistics random, in float64: constant ones (gammas of zero) would hide faults."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            draws = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            fan_in = math.prod(p.shape[1:]) if p.ndim > 1 else 1
            p.copy_(draws / math.sqrt(fan_in) if p.ndim > 1 else 0.3 * draws + 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return model


def spread(stn: Any, seed: int = 11) -> None:
    """Give every response parameter that starts at zero a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in stn.response_parameters():
            if not p.any():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))


def as_plain_layers(model: nn.Module) -> nn.Module:
    """The same function, with every computed weight (weight norm, standardised convolution) as a plain parameter."""
    with torch.no_grad():
        for module in list(model.modules()):
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                    value = getattr(module, name).detach()
                    delattr(module, name)
                    setattr(module, name, nn.Parameter(value))
            for hook in list(module._forward_pre_hooks.values()):
                if isinstance(hook, WeightNorm):
                    remove_weight_norm(module, hook.name)
            if isinstance(module, (timm.layers.StdConv2d, timm.layers.ScaledStdConv2d)):
                gain = module.gain * module.scale if hasattr(module, "gain") else torch.ones(module.out_channels)
                flat = module.weight.flatten(1)
                centred = flat - flat.mean(1, keepdim=True)
                deviation = (centred.square().mean(1, keepdim=True) + module.eps).sqrt()
                weight = (centred / deviation * gain.reshape(-1, 1)).reshape_as(module.weight)
                module.__class__, module.weight = nn.Conv2d, nn.Parameter(weight)
    return model


def without_randomness(model: nn.Module, modes: list[bool], keeps_statistics: bool) -> nn.Module:
    """A training-mode copy that drops nothing and uses batch statistics, keeping running ones or not."""
    model = copy.deepcopy(model)
    for module, training in zip(model.modules(), modes, strict=False):
        module.training = training
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and not keeps_statistics:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


class rates_off:
    """Every rate at zero for the duration; the raw values are as before afterwards."""

    def __init__(self, stn: Any) -> None:
        self.stn = stn

    def __enter__(self) -> None:
        self.kept = self.stn.hparams.raw.detach().clone()
        with torch.no_grad():
            self.stn.hparams.raw.fill_(OFF)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            self.stn.hparams.raw.copy_(self.kept)


def fingerprint(model: nn.Module) -> Any:
    """Everything about a module that a wrapper could disturb."""
    state = {name: (value.dtype, value.numpy().tobytes()) for name, value in model.state_dict().items()}
    modules = [
        (name, type(m), m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    parameters = [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return copy.deepcopy((state, modules, parameters, torch.backends.mha.get_fastpath_enabled()))


def conditioned_share(stn: Any) -> float:
    """Share of the model's scalars whose value differs per example."""
    plans = [p for p in stn.compiled.plan.parameters if not p.is_effective]
    return sum(p.scalars for p in plans if p.conditioned) / sum(p.scalars for p in plans)


def unconditioned(stn: Any) -> Iterator[str]:
    """Why the others are not: for messages."""
    return (f"{p.name}: {p.reason}" for p in stn.compiled.plan.parameters if not p.conditioned)
