"""Where terms of the loss look at activations: at the outputs of modules that a pattern names."""

from collections.abc import Iterable, Iterator

from torch import nn
from torch.fx import Node

from stn_fx.compiler.capture import CapturedGraph
from stn_fx.compiler.insertion import TEMPORAL, Insertion
from stn_fx.compiler.layouts import symbolic_axes
from stn_fx.compiler.plan import SitePlan
from stn_fx.errors import BatchLayoutError, InputError, UnknownHyperparameterError
from stn_fx.hparams import CATALOGUE, Selection
from stn_fx.hparams.pattern import matches


def named_modules(model: nn.Module, selections: Iterable[Selection]) -> list[str]:
    """Names of the modules whose outputs the selections want, without those below them.

    Raises:
        InputError: a selection without a pattern: there is no place that fits every model.
    """
    wanted: list[str] = []
    for selection in selections:
        if selection.entry.kind != "activation":
            continue
        if selection.pattern is None:
            raise InputError(
                f"{selection.entry.name} acts on the output of a module: name it, as in "
                f"{selection.entry.name}@{_example(model)}."
            )
        wanted += [name for name, _ in model.named_modules() if _names(selection.pattern, name) and name not in wanted]
    return wanted


def _example(model: nn.Module) -> str:
    return next((name for name, _ in model.named_modules() if name), "encoder")


def _names(pattern: str, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return bool(name) and matches(pattern, name) and not (parent and matches(pattern, parent))


def choose_activation_sites(captured: CapturedGraph, selections: Iterable[Selection]) -> list[Insertion]:
    """Taps for all selections of kind ``activation``, one for each call of a named module. Pure.

    Raises:
        UnknownHyperparameterError: a pattern names no module that runs in training and returns a floating tensor.
        BatchLayoutError: an output without a batch axis.
    """
    return [each for s in selections if s.entry.kind == "activation" for each in _taps(captured, s)]


def _taps(captured: CapturedGraph, selection: Selection) -> Iterator[Insertion]:
    entry, pattern = selection.entry.name, selection.pattern or ""
    names = [name for name in captured.module_outputs if _names(pattern, name)]
    if not names:
        raise UnknownHyperparameterError(
            f"{selection.text!r}: no module of that name runs in training and returns a floating tensor, as far as the "
            f"captured graph knows. Name one by its qualified name, such as those of stn.model.named_modules()."
        )
    for name in names:
        for node in captured.module_outputs[name]:
            if not symbolic_axes(node.meta["val"], captured.batch_symbol):
                raise BatchLayoutError(
                    f"{entry}@{name}: the output of {name}, of shape {tuple(node.meta['val'].shape)}, has no batch "
                    f"axis. Name a module whose output depends on the examples."
                )
            yield Insertion(entry, name, node, tap=True)


def require_time_axes(sites: Iterable[SitePlan], nodes: dict[str, Node]) -> None:
    """Every temporal term looks at a value with examples, time steps and features, folded or not.

    Raises:
        InputError: a value of another form.
    """
    for site in sites:
        if site.entry != TEMPORAL or site.layout is None or not site.hyperparameters:
            continue
        value = nodes[site.node].meta["val"]
        if value.ndim + site.layout.folded != 3:
            raise InputError(
                f"{TEMPORAL}@{site.name}: the output of {site.name} has the shape {tuple(value.shape)} with the batch "
                f"at {site.layout}, and a sequence needs one axis each for examples, time steps and features. Name a "
                f"module that returns sequences, such as an nn.LSTM."
            )


def activation_terms(sites: Iterable[SitePlan]) -> list[tuple[str, str]]:
    """(catalogue entry, hyperparameter) of each activation that the training passes hand out, in their order."""
    terms = {entry.name for entry in CATALOGUE if entry.kind == "activation"}
    return [(site.entry, name) for site in sites if site.entry in terms for _, name in site.hyperparameters]
