"""Proof that an emitted module computes what the compiled model does: a fresh process imports it and is compared.

    python -m stn_fx.compiler.proof MODULE CASES OUTPUTS     # what the fresh process runs

The response starts at zero, where a wrong one could hide, so the proof uses a random one.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fx.augment.draws import Draws

if TYPE_CHECKING:
    from stn_fx.compiler.pipeline import CompiledModel
    from stn_fx.transform import SelfTuningModule

TOLERANCE = 1e-6
"""Of the difference, relative to the largest output (or to 1); the same code on the same machine is usually exact."""

SECONDS = 600


@dataclass(frozen=True)
class ProofRow:
    """One pass at one batch size: largest absolute difference of any output."""

    function: str
    batch_size: int
    difference: float
    scale: float
    """Largest absolute value of any output."""

    @property
    def passed(self) -> bool:
        """Whether the difference is rounding at most."""
        return self.difference <= TOLERANCE * max(1.0, self.scale)


@dataclass(frozen=True)
class Proof:
    """The verdict; ``failure`` holds the end of the fresh process's error output where it did not run."""

    rows: tuple[ProofRow, ...]
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether every pass agreed at every batch size."""
        return not self.failure and bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def difference(self) -> float:
        """Largest absolute difference of all."""
        return max((row.difference for row in self.rows), default=float("nan"))


def prove(module: Path, compiled: "CompiledModel", stn: "SelfTuningModule", seed: int = 0) -> Proof:
    """Run ``module`` in a fresh process on the example batch and on one of another size; compare all four passes."""
    cases = _cases(compiled, stn, seed)
    expected = [_run(_functions(compiled), _state(compiled, stn), case) for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "cases.pt", Path(folder) / "outputs.pt"
        torch.save(cases, given)
        # The fresh process finds stn_fx where this one does, installed or not.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "stn_fx.compiler.proof", str(Path(module).resolve()), str(given), str(found)]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if finished.returncode:
            return Proof((), "\n".join(finished.stderr.strip().splitlines()[-6:]))
        outputs = torch.load(found, weights_only=True)
    rows = []
    for case, left, right in zip(cases, expected, outputs, strict=True):
        for name in left:
            rows.append(ProofRow(name, len(case["delta"]), *_difference(left[name], right[name])))
    return Proof(tuple(rows))


def _cases(compiled: "CompiledModel", stn: "SelfTuningModule", seed: int) -> list[dict[str, Any]]:
    """Inputs, hyperparameters and a random response, for the example's batch size and one more."""
    from stn_fx.compiler.emit import response_tensors

    device = stn.hparams.raw.device
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape or like.shape, generator=generator).to(like)

    response = {name: 0.1 * random(tensor.detach()) for name, tensor in response_tensors(stn).items()}
    captured = compiled.captured
    size = next(v.shape[a] for v, a in zip(captured.example, captured.batch_axes, strict=True) if a is not None)
    cases = []
    for batch in (size, size + 1):
        rows = torch.arange(batch, device=device) % size
        raw = stn.hparams.raw.detach() + 0.5 * random(stn.hparams.raw.detach(), batch, len(stn.hparams))
        inputs = [
            v if a is None else v.detach().index_select(a, rows.to(v.device))
            for v, a in zip(captured.example, captured.batch_axes, strict=True)
        ]
        values, delta = stn.hparams.constrain(raw), raw - stn.hparams.raw.detach()
        cases.append(
            {
                "response": response, "values": values.detach(), "delta": delta, "inputs": inputs, "seed": seed,
                "device": str(device), "threads": torch.get_num_threads(),
            }
        )  # fmt: skip
    return cases


def _functions(compiled: "CompiledModel") -> dict[str, Any]:
    from stn_fx.compiler.emit import passes

    return dict(passes(compiled))


def _state(compiled: "CompiledModel", stn: "SelfTuningModule") -> dict[str, Tensor]:
    from stn_fx.compiler.pipeline import state_tensors

    return {name: tensor.detach() for name, tensor in state_tensors(stn.model, compiled.captured).items()}


def _run(functions: dict[str, Any], state: dict[str, Tensor], case: dict[str, Any]) -> dict[str, list[Any]]:
    """Flattened outputs of every pass; the base pass updates copies of the buffers, which are outputs too."""
    outputs = {}
    for name, function in functions.items():
        own = {key: tensor.clone() for key, tensor in state.items()}
        draws = Draws(torch.Generator(case["device"]).manual_seed(case["seed"]))
        with torch.no_grad():
            result = function(own, case["response"], case["values"], case["delta"], draws, *case["inputs"])
        changed = [own[key] for key in sorted(own) if not torch.equal(own[key], state[key])]
        outputs[name] = [v for v in pytree.tree_leaves((result, changed)) if isinstance(v, Tensor)]
    return outputs


def _difference(left: list[Tensor], right: list[Tensor]) -> tuple[float, float]:
    """(largest absolute difference, largest absolute value); infinite where the outputs do not match in kind."""
    if [value.shape for value in left] != [value.shape for value in right]:
        return float("inf"), 0.0
    difference = scale = 0.0
    for a, b in zip(left, right, strict=True):
        if not a.numel():
            continue
        a, b = a.cpu().double(), b.cpu().double()
        gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        difference = max(difference, float("inf") if gap.isnan().any() else gap.max().item())
        scale = max(scale, a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0)
    return difference, scale


def main(module: str, cases: str, outputs: str) -> None:
    """The fresh process: import the emitted module by its name, run it, save what it gives."""
    import importlib

    path = Path(module)
    sys.path.insert(0, str(path.parent))
    emitted = importlib.import_module(path.stem)
    state, _, _ = emitted.load()
    names = ("base", "linearize_training", "linearize_evaluation", "respond")
    functions = {name: getattr(emitted, name) for name in names}
    given = torch.load(cases, weights_only=True)
    torch.set_num_threads(given[0]["threads"])
    torch.save([_run(functions, state, case) for case in given], outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
