"""The oracles (DESIGN section 6): each compares one pass of the compiled model with the judge and returns its error.

B examples, H hyperparameters.  Errors are relative norms, the largest over outputs and examples.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stn_fx.compiler.activation_sites import activation_terms
from stn_fx.rules.as_found import buffers_as_found
from stn_fx.verify.held import Held
from stn_fx.verify.judge import Changes, Judge, floating
from stn_fx.verify.own_rates import own_rates_off
from stn_fx.verify.subject import Inputs, rows_of, same_draws, unshared

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

OFF = -50.0
"""Raw value at which every rate is zero."""
JUDGED_EXAMPLES = 2
GOOD_DIFFERENCE = 1e-6
"""A central difference that agrees to this needs no other step."""


@dataclass
class Trial:
    """One compiled copy, the batch that it is tried on, and one displacement for each example."""

    stn: "SelfTuningModule"
    inputs: Inputs
    delta_BH: Tensor
    step: float
    """Of central differences, relative."""

    @property
    def batch(self) -> int:
        return self.delta_BH.shape[0]

    @property
    def raw_BH(self) -> Tensor:
        return self.stn.hparams.raw.detach() + self.delta_BH

    def call(self, function: Callable[..., Any], **options: Any) -> Any:
        """``function`` on the trial's inputs."""
        args, kwargs = unshared(self.inputs)
        same_draws()
        return function(*args, **kwargs, **options)

    def example(self, i: int) -> Inputs:
        """The batch that holds example i alone."""
        return rows_of(self.inputs, self.stn.compiled.captured.batch_axes, [i])

    def outputs_of(self, tree: Any, i: int) -> list[Tensor]:
        """Example i of nested outputs, by the layouts that were found."""
        captured = self.stn.compiled.captured.evaluation
        layouts = self.stn.compiled.analysed["evaluation"].layouts
        output = next(node for node in captured.graph.nodes if node.op == "output")
        picked = []
        for node, value in zip(output.args[0], pytree.tree_leaves(tree), strict=False):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            layout = layouts.get(node)
            if layout is not None and not layout.folded:
                value = value.narrow(layout.axis, i, 1)
            elif layout is not None:
                rows = [
                    (o * self.batch + i) * layout.inner + k for o in range(layout.outer) for k in range(layout.inner)
                ]
                value = value.index_select(layout.axis, torch.tensor(rows, device=value.device))
            picked.append(value)
        return picked

    def changes(self, i: int) -> Changes:
        """Dense ``DeltaW`` of example i."""
        return {name: change.detach() for name, change in self.stn.weight_response(self.delta_BH[i]).items()}


Found = tuple[float | None, str]
"""Error and note."""


def unchanged(trial: Trial) -> Found:
    """Without displacement, the response pass is the user's evaluation pass."""
    trial.stn.eval()
    judged = Judge(trial.stn, training=False).outputs(trial.inputs, {})
    with torch.no_grad():
        ours = floating(trial.call(trial.stn.respond))
    return relative_error(ours, judged), ""


def unchanged_training(trial: Trial) -> Found:
    """With all rates at zero, the base pass is the user's training pass."""
    with rates_off(trial.stn), buffers_as_found(trial.stn.model), torch.no_grad():
        trial.stn.train()
        ours = floating(trial.call(trial.stn))
    judged = Judge(trial.stn, training=True).outputs(trial.inputs, {})
    return relative_error(ours, judged), ""


def response_pass(trial: Trial) -> Found:
    """For each example the user's model at ``w0 + DeltaW(delta_i)``."""
    trial.stn.eval()
    with torch.no_grad():
        output = trial.call(trial.stn.respond, raw=trial.raw_BH)
    judge = Judge(trial.stn, training=False)
    errors = [
        relative_error(trial.outputs_of(output, i), judge.outputs(trial.example(i), trial.changes(i)))
        for i in range(min(trial.batch, JUDGED_EXAMPLES))
    ]
    return worst(errors), ""


def linearized_pass(trial: Trial) -> Found:
    """For each example the derivative of the user's model in weight space along ``DeltaW(delta_i)``."""
    trial.stn.eval()
    with torch.no_grad():
        _, tangent = trial.call(trial.stn.linearize, raw=trial.raw_BH)
    judge, errors, differences = Judge(trial.stn, training=False), [], False
    for i in range(min(trial.batch, JUDGED_EXAMPLES)):
        judged, differences = judge.derivative(trial.example(i), trial.changes(i))
        errors.append(relative_error(trial.outputs_of(tangent, i), judged))
    return worst(errors), "judged by central differences" if differences else ""


def training_graph(trial: Trial) -> Found:
    """With one displacement for all rows, the derivative of the user's training pass, on batch statistics."""
    with rates_off(trial.stn), torch.no_grad():
        trial.stn.train()
        raw_BH = trial.stn.hparams.raw.detach() + trial.delta_BH[:1].expand(trial.batch, -1)
        _, tangent = trial.call(trial.stn.linearize, raw=raw_BH)
    judged, differences = Judge(trial.stn, training=True).derivative(trial.inputs, trial.changes(0))
    return relative_error(floating(tangent), judged), "judged by central differences" if differences else ""


def sites(trial: Trial) -> Found:
    """With all rates at zero except in row j, exactly row j changes; the error is the number of wrong rows."""
    stn = trial.stn
    terms = {name for _, name in activation_terms(stn.compiled.plan.sites)}  # these act in the loss only
    names = {name for site in stn.compiled.plan.sites for _, name in site.hyperparameters}
    columns = sorted({stn.hparams.index(name) for name in names - terms} - set(stn.hparams.per_batch))
    if not columns:
        return None, "no hyperparameter acts at a site"
    stn.train()
    for module in stn.model.modules():  # in training mode a batch norm moves every row
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.eval()
    rows = range(min(trial.batch, JUDGED_EXAMPLES))
    moved = {j: _moved_rows(trial, columns, j) for j in rows}
    # Nothing moves an example of zeros, say. One that was seen to move stands in for it.
    moving = next((j for j in rows if j in moved[j]), None)
    for j in rows:
        if moving is not None and not moved[j]:
            swapped = [moving if i == j else i for i in range(trial.batch)]
            inputs = rows_of(trial.inputs, stn.compiled.captured.batch_axes, swapped)
            moved[j] = _moved_rows(replace(trial, inputs=inputs), columns, j)
    stn.train()
    wrong = sorted((i, j) for j in rows for i in moved[j] ^ {j})
    note = "; ".join(f"rates in row {j} {'left' if i == j else 'changed'} row {i}" for i, j in wrong[:3])
    return float(len(wrong)), note


@torch.no_grad()
def _moved_rows(trial: Trial, columns: list[int], j: int, attempts: int = 4) -> set[int]:
    """The rows of the output that change when the rates of row j do."""
    stn, moved = trial.stn, set[int]()
    generator = stn.generator()
    off = torch.full_like(trial.raw_BH, OFF)
    raw_BH = off.clone()
    raw_BH[j, columns] = 4.0
    for _ in range(attempts):  # a branch may be kept by chance
        state = generator.get_state()  # the same draws where no hyperparameter acts
        still, _ = trial.call(stn.linearize, raw=off)
        generator.set_state(state)
        output, _ = trial.call(stn.linearize, raw=raw_BH)
        for i in range(trial.batch):
            if not all(map(torch.equal, trial.outputs_of(output, i), trial.outputs_of(still, i))):
                moved.add(i)
        if j in moved:
            break
    return moved


def response_gradients(trial: Trial) -> Found:
    """Gradient of a loss of primal + tangent in all response parameters, against a central difference."""
    stn = trial.stn
    stn.eval()
    named = {f"{name}.{part}": p for name, r in stn.responses().items() for part, p in r.named_parameters()}

    def loss() -> Tensor:
        primal, tangent = trial.call(stn.linearize, raw=trial.raw_BH)
        return weighted_sum([p + t for p, t in zip(floating(primal), floating(tangent), strict=True)])

    gradients = _gradients(loss(), named)
    missing = named.keys() - gradients.keys()
    if missing:
        stn.train()
        missing -= _gradients(loss(), named).keys()  # auxiliary classifiers run in training only
        stn.eval()
    if missing:
        return math.nan, f"no gradient: {', '.join(sorted(missing)[:4])}"
    named, found = {name: named[name] for name in gradients}, list(gradients.values())
    broken = [name for name, g in zip(named, found, strict=True) if not g.isfinite().all()]
    if broken:
        return math.nan, f"not finite: {', '.join(broken[:4])}"
    zero = [name for name, g in zip(named, found, strict=True) if not g.any()]
    generator = torch.Generator().manual_seed(1)
    # Along the gradient's signs nothing cancels, so that the difference is large against its rounding.
    signs = [g.sign() * torch.rand(g.shape, generator=generator, dtype=torch.float64).to(g) for g in found]
    scales = [p.detach().norm() / math.sqrt(p.numel()) for p in named.values()]
    directions = [s * scale for s, scale in zip(signs, scales, strict=True)]
    slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))

    def difference(step: float) -> Tensor:
        ends = [_moved(list(named.values()), directions, sign * step, loss) for sign in (1, -1)]
        return torch.tensor((ends[0] - ends[1]) / (2 * step), dtype=torch.float64)

    note = f"zero for this batch: {', '.join(zero[:3])}" + (" and others" if len(zero) > 3 else "") if zero else ""
    return error_by_differences(torch.tensor(slope, dtype=torch.float64), trial.step, difference), note


def hypergradients(trial: Trial) -> Found:
    """Gradient of a loss of the response pass in the live raw values, against central differences, one by one.

    What the user's forward detaches is held as it is at the centre: no gradient is to flow through it.
    """
    stn = trial.stn
    stn.eval()
    centre = stn.hparams.raw.detach().clone()
    held = Held()
    with held:
        (gradient,) = torch.autograd.grad(weighted_sum(floating(trial.call(stn.respond))), stn.hparams.raw)

    def loss(raw: Tensor) -> Tensor:
        with held:
            return weighted_sum(floating(trial.call(stn.respond, raw=raw.expand(trial.batch, -1))))

    def difference(step: float) -> Tensor:
        differences = torch.zeros_like(gradient)
        with torch.no_grad():
            for h in range(len(centre)):
                ends = []
                for sign in (1, -1):
                    raw = centre.clone()
                    raw[h] += sign * step
                    ends.append(loss(raw))
                differences[h] = (ends[0] - ends[1]) / (2 * step)
        return differences

    zero = [name for name, g in zip(stn.hparams.names, gradient, strict=True) if g == 0]
    if zero:
        return math.nan, f"zero: {', '.join(zero[:4])}"
    return error_by_differences(gradient, trial.step, difference, floor=1e-6), ""


# ---- details


def relative_error(ours: list[Tensor], judged: list[Tensor]) -> float:
    """Largest relative error over the tensors of two lists; infinite where shapes differ."""
    if [t.shape for t in ours] != [t.shape for t in judged]:
        return math.inf
    return worst([float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(ours, judged, strict=True)])


def error_by_differences(
    gradient: Tensor, step: float, difference: Callable[[float], Tensor], floor: float = 1e-12
) -> float:
    """Error against central differences of the step that suits, relative to their norm or ``floor``; NaN where any is.

    A large step crosses the kinks of rectifiers, a small one drowns in rounding. Where the usual step does not settle
    it, the differences alone choose: those two of neighbouring steps that agree best with each other. That the gradient
    has no say keeps a wrong one from meeting a stray difference by luck.
    """
    found: dict[float, Tensor] = {}
    errors: dict[float, float] = {}
    for factor in (1.0, 0.1, 10.0, 0.01, 0.001):
        found[factor] = difference(factor * step)
        errors[factor] = float((gradient - found[factor]).norm() / found[factor].norm().clamp(min=floor))
        if errors[factor] < GOOD_DIFFERENCE:
            return errors[factor]
    if any(math.isnan(error) for error in errors.values()):
        return math.nan
    _, small, large = min((_disagreement(found[a], found[b]), a, b) for a, b in itertools.pairwise(sorted(found)))
    return min(errors[small], errors[large])


def _disagreement(first: Tensor, second: Tensor) -> float:
    """Relative; infinite where one is zero, since a step that is lost in rounding moves nothing."""
    size = float(min(first.norm(), second.norm()))
    return float((first - second).norm()) / size if size else math.inf


def worst(errors: list[float]) -> float:
    """The largest error; NaN where any is."""
    return math.nan if any(math.isnan(e) for e in errors) else max(errors, default=0.0)


def weighted_sum(outputs: list[Tensor]) -> Tensor:
    """A loss that weighs every element differently, so that no symmetry hides an error."""
    total = outputs[0].new_zeros(())
    for output in outputs:
        weights = torch.cos(torch.arange(output.numel(), device=output.device)).to(output).reshape(output.shape)
        total = total + (output * weights).mean() + 0.1 * output.square().mean()
    return total


@contextmanager
def rates_off(stn: "SelfTuningModule") -> Iterator[None]:
    """All rates at zero for the duration, also those that no hyperparameter acts on."""
    kept = stn.hparams.raw.detach().clone()
    with torch.no_grad():
        stn.hparams.raw.fill_(OFF)
    try:
        with own_rates_off(stn.compiled):
            yield
    finally:
        with torch.no_grad():
            stn.hparams.raw.copy_(kept)


def _gradients(value: Tensor, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients of those parameters that the value depends on."""
    if not value.requires_grad:
        return {}
    gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, gradients, strict=True) if g is not None}


@torch.no_grad()
def _moved(parameters: list[nn.Parameter], directions: list[Tensor], step: float, loss: Callable[[], Tensor]) -> float:
    kept = [p.detach().clone() for p in parameters]
    for p, d in zip(parameters, directions, strict=True):
        p.add_(d, alpha=step)
    value = float(loss())
    for p, k in zip(parameters, kept, strict=True):
        p.copy_(k)
    return value
