"""``stn_fx.check``: the oracles on the user's model, on the user's machine."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fx.errors import CaptureError, InputError
from stn_fx.verify import oracles
from stn_fx.verify.oracles import Trial
from stn_fx.verify.result import CheckResult, OracleResult
from stn_fx.verify.subject import (
    Inputs,
    cast,
    independent_copy,
    randomise_constants,
    randomise_response,
    rows_of,
    split_inputs,
)

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

EXAMPLES = 3
_ORACLES = {
    "unchanged in evaluation": oracles.unchanged,
    "unchanged in training, all rates zero": oracles.unchanged_training,
    "response pass": oracles.response_pass,
    "linearized pass": oracles.linearized_pass,
    "training graph": oracles.training_graph,
    "sites": oracles.sites,
    "gradients of the response": oracles.response_gradients,
    "gradients of the hyperparameters": oracles.hypergradients,
}
_TOLERANCES = {torch.float64: (1e-7, 1e-5), torch.float32: (2e-3, 5e-2)}
"""Of the passes and of gradients; in float64 a right model stays below 1e-10 and 1e-7."""


def check(stn: "SelfTuningModule", inputs: Any, *, seed: int = 0) -> CheckResult:
    """Verify a compiled model numerically: every pass and gradient against the user's own module.

    It works on a copy in float64 with constant parameters drawn at random, and touches neither the model, its modes nor
    the global generators.  Where a model insists on float32 inside, errors are judged by that precision.

    Args:
        stn: the compiled model.
        inputs: one batch: a tensor, a tuple of positional or a dict of keyword inputs.  A few examples of it are used.
        seed: of displacements and of what is drawn for constant parameters.

    Returns:
        A result that prints as a table; ``.passed`` is the verdict, ``.errors`` the error by oracle.
    """
    if not hasattr(stn, "weight_response"):
        raise InputError(f"check needs a model wrapped by stn_fx.transform, not a {type(stn).__name__}.")
    devices = {p.device for p in stn.model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        return run_oracles(*_trial(stn, split_inputs(inputs), seed))


def run_oracles(trial: Trial, precision: torch.dtype) -> CheckResult:
    """Every oracle on one trial, judged by the tolerances of this precision."""
    passes, gradients = _TOLERANCES[precision]
    found = []
    for name, oracle in _ORACLES.items():
        error, note = oracle(trial)
        tolerance = 0.0 if name == "sites" else gradients if name.startswith("gradients") else passes
        found.append(OracleResult(name, error, tolerance, note))
    return CheckResult(tuple(found), str(precision).removeprefix("torch."))


def _trial(stn: "SelfTuningModule", inputs: Inputs, seed: int) -> tuple[Trial, torch.dtype]:
    """A compiled copy in float64, or in float32 where the model runs in nothing else."""
    axes = stn.compiled.captured.batch_axes
    batch = stn.compiled.captured.batch_size(pytree.tree_leaves(inputs))
    rows = [i % batch for i in range(min(max(batch, 2), EXAMPLES))]
    generator = torch.Generator().manual_seed(seed)
    failure: CaptureError | None = None
    for dtype in (torch.float64, torch.float32):
        copy = independent_copy(stn).to(dtype)
        some = cast(rows_of(inputs, axes, rows), dtype)
        randomise_constants(copy.model, generator)
        try:
            compiled = copy.train()._compile(*some)
        except CaptureError as error:
            failure = error
            continue
        randomise_response(copy, generator)
        precision = least_precision(compiled.captured.evaluation.graph)
        return make_trial(copy, some, len(rows), precision, generator), precision
    assert failure is not None
    raise failure


def make_trial(
    stn: "SelfTuningModule", inputs: Inputs, batch: int, precision: torch.dtype, generator: torch.Generator
) -> Trial:
    """A compiled model with a displacement for each example, and a step for differences that suits the precision."""
    shape = (batch, len(stn.hparams))
    delta_BH = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(stn.hparams.raw)
    return Trial(stn, inputs, delta_BH, 1e-5 if precision == torch.float64 else 1e-2)


def least_precision(graph: torch.fx.Graph) -> torch.dtype:
    """float32 where any value of the graph is no more precise than that: some norms cast on purpose."""
    values = (node.meta.get("val") for node in graph.nodes if node.op == "call_function")
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    return torch.float64 if dtypes <= {torch.float64} else torch.float32
