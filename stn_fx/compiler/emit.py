"""Emission: the graphs of the three passes as one importable Python module, made to be read.

Each pass is a function ``(state, response, values, delta, draws, *inputs)``.  Variables are named after the modules
that they come from, the user's own source line stands above each group of statements, and every function that is called
is imported by name.  Tensors lie beside the module in a file that ``torch.load(weights_only=True)`` reads.
"""

import json
import keyword
import operator
import pprint
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from stn_fx.compiler.activation_sites import activation_terms
from stn_fx.compiler.emit_code import WIDTH, Imports, function_code
from stn_fx.compiler.pipeline import CompiledModel, state_tensors
from stn_fx.errors import InputError, StnError
from stn_fx.rules.custom import apply_custom, custom_tangent

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


_MARK = "Written by stn_fx; do not edit."
_HEADER = '''\
"""{title}

Written by stn_fx; do not edit.  The hyper-conditioned forward of {model} as plain functions:

    base                    training mode, hyperparameters at `values`; updates the buffers in `state`
    linearize_training      (primal, tangent) of the training graph along `delta`
    linearize_evaluation    (primal, tangent) of the evaluation graph
    respond                 evaluation graph with the weights w0 + DeltaW(delta_i) for example i

Arguments of all four: `state` and `response` as `load()` gives them; `values` (B, H) constrained hyperparameters and
`delta` (B, H) displacements of the raw ones, in the order of HYPERPARAMETERS; `draws` the source of random numbers;
then the inputs, flattened.  They return the flattened outputs; behind these the passes of the training graph return the
ACTIVATIONS that terms of the loss look at, examples first.  To run one:

    import torch
    from stn_fx.augment.draws import Draws
    import {stem} as emitted

    state, response, current = emitted.load()
    x = ...  # a batch of B examples
    values, delta = current.expand(B, -1), torch.zeros(B, len(current))
    outputs = emitted.base(state, response, values, delta, Draws(torch.Generator()), x)
"""

'''

_LOAD = '''

def load(path: str | Path | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """(state, response, current hyperparameter values (H,)) from the file of tensors beside this module."""
    tensors = torch.load(path or Path(__file__).with_suffix(".pt"), weights_only=True)
    return tensors["state"], tensors["response"], tensors["values"]
'''


@dataclass(frozen=True)
class Emitted:
    """Where the module and its tensors were written."""

    module: Path
    tensors: Path


def emit(compiled: CompiledModel, stn: "SelfTuningModule", path: str | Path) -> Emitted:
    """Write the emitted code to ``path`` (a .py file) and the tensors beside it.

    Raises:
        InputError: the file cannot be written, or it exists and is not one of these.
        StnError: the path cannot be the name of a module, or a rule calls a function that cannot be imported by name.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise StnError(
            f"{path} cannot be imported by name. Choose a file such as {path.stem.replace('-', '_')}_stn.py."
        )
    if compiled.captured.opaque:
        names = ", ".join(leaf.name for leaf in compiled.captured.opaque)
        raise StnError(
            f"{names} cannot be captured and runs as the module itself, which cannot be written down as code. Remedy: "
            f"stn-fx inspect reports without writing; training works."
        )
    unnamed = sorted({name for graph in passes(compiled).values() for name in _unimportable(graph)})
    if unnamed:
        raise StnError(
            f"{', '.join(unnamed)} cannot be imported by name from another process. Define it at the top of a module "
            f"that can be imported, and pass that one."
        )
    tensors = path.with_suffix(".pt")
    ours = path.is_file() and _MARK in path.read_text(errors="replace")
    foreign = next((file for file in (path, tensors) if file.exists() and not ours), None)
    if foreign is not None:
        raise InputError(f"{foreign} exists and was not written by stn-fx convert. Choose another file, or remove it.")
    text = source(compiled, stn, path.stem)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        torch.save(tensors_of(compiled, stn), tensors)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a file cannot be opened
        raise InputError(f"{path} cannot be written: {error}. Choose another place.") from error
    return Emitted(path, tensors)


def _unimportable(graph: GraphModule) -> Iterator[str]:
    """Functions of the user's that the code would name by a number of this process, or by its main script."""
    for node in graph.graph.nodes:
        if node.target in (apply_custom, custom_tangent) and (
            "#" in node.args[0] or node.args[0].startswith("__main__")
        ):
            yield node.args[0].partition("#")[0]


def passes(compiled: CompiledModel) -> dict[str, GraphModule]:
    """Graph of each emitted function."""
    return {
        "base": compiled.base,
        "linearize_training": compiled.linearized_training,
        "linearize_evaluation": compiled.linearized_evaluation,
        "respond": compiled.response,
    }


def tensors_of(compiled: CompiledModel, stn: "SelfTuningModule") -> dict[str, Any]:
    """What the module loads: the state and response tensors that the graphs use, and the current values (H,)."""
    state = state_tensors(stn.model, compiled.captured)
    used = _fetched(compiled, "state")
    current = stn.hparams.constrain(stn.hparams.raw.detach())
    return {
        "state": {name: state[name].detach() for name in sorted(used)},
        "response": {name: tensor.detach() for name, tensor in response_tensors(stn).items()},
        "values": current.clone(),
    }


def response_tensors(stn: "SelfTuningModule") -> dict[str, Tensor]:
    """Response parameters by the names that the graphs use."""
    return {
        f"{name}.{part}": parameter
        for name, module in stn.responses().items()
        for part, parameter in module.named_parameters()
    }


def source(compiled: CompiledModel, stn: "SelfTuningModule", stem: str) -> str:
    """Text of the module; ``stem`` is the name that it will be imported by."""
    functions = Imports()
    bodies = [function_code(name, module, functions) for name, module in passes(compiled).items()]
    model = type(stn.model).__name__
    header = _HEADER.format(title=f"{model} with hyperparameters per example.", model=model, stem=stem)
    return header + functions.lines() + _tables(compiled, stn) + _LOAD + "".join(bodies)


# ---- tables


def _tables(compiled: CompiledModel, stn: "SelfTuningModule") -> str:
    captured = compiled.captured
    tables = {
        "HYPERPARAMETERS": stn.hparams.specs(),
        "STATE": sorted(_fetched(compiled, "state")),
        "RESPONSE": sorted(response_tensors(stn)),
        "INPUTS": [
            {"name": name, "batch_axis": axis}
            for name, axis in zip(captured.evaluation.inputs, captured.batch_axes, strict=True)
        ],
        "INPUT_STRUCTURE": _structure(captured.input_spec),
        "ACTIVATIONS": [{"term": term, "hyperparameter": name} for term, name in activation_terms(compiled.plan.sites)],
        "OUTPUT_STRUCTURE": _structure(captured.evaluation.output_spec),
    }
    lines = ["aten = torch.ops.aten\n"]
    lines += [f"{name}: {_ANNOTATIONS.get(name, 'str')} = {_literal(value)}" for name, value in tables.items()]
    return "\n" + "\n".join(lines) + "\n"


_ANNOTATIONS = {
    "HYPERPARAMETERS": "list[dict[str, object]]",
    "STATE": "list[str]",
    "RESPONSE": "list[str]",
    "INPUTS": "list[dict[str, object]]",
    "ACTIVATIONS": "list[dict[str, str]]",
}


def _literal(value: Any) -> str:
    """Python literal of JSON-able values, wrapped."""
    if not isinstance(value, list):
        return pprint.pformat(value, width=WIDTH - 20)
    return "[\n" + "".join(f" {line}\n" for line in _inner_lines(value)) + "]"


def _inner_lines(entries: list[Any]) -> list[str]:
    """The entries of a list without its brackets; names share a line as far as they fit."""
    text = pprint.pformat(entries, width=WIDTH, compact=True, sort_dicts=False)
    return (" " + text[1:-1]).splitlines() if entries else []


def _structure(spec: pytree.TreeSpec) -> str:
    """Serialized tree of the inputs or outputs (``pytree.treespec_loads`` reads it), else its text."""
    try:
        serialized = pytree.treespec_dumps(spec)
    except NotImplementedError:  # a container type without a registered name
        return str(spec)
    return json.dumps(json.loads(serialized))


def _fetched(compiled: CompiledModel, table: str) -> set[str]:
    """Names that the graphs take from ``state`` or ``response``."""
    return {
        str(node.args[1])
        for module in passes(compiled).values()
        for node in module.graph.nodes
        if node.target is operator.getitem and getattr(node.args[0], "target", None) == table
    }
