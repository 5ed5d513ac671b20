"""Sites that no hyperparameter acts at drop at the author's own rate; the judge drops nothing, so neither may they."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.fx import GraphModule

from stn_fx.compiler.pipeline import CompiledModel
from stn_fx.rules.attention import attention_multiplier
from stn_fx.rules.drop_path import path_multiplier
from stn_fx.rules.dropout import alpha_terms, multiplier
from stn_fx.rules.own_augmentations import own_strength
from stn_fx.verify.judge import nothing_dropped

_RATE_ARGUMENT = {multiplier: 2, alpha_terms: 2, attention_multiplier: 1, path_multiplier: 1, own_strength: 1}


@contextmanager
def own_rates_off(compiled: CompiledModel) -> Iterator[None]:
    """The rates that stand as numbers in the training passes, and those in opaque leaves, are zero for the duration."""
    with ExitStack() as stack:
        for leaf in compiled.captured.opaque:
            stack.enter_context(nothing_dropped(leaf.module))
        for graph in (compiled.base, compiled.linearized_training):
            stack.enter_context(_constant_rates_off(graph))
        yield


@contextmanager
def _constant_rates_off(module: GraphModule) -> Iterator[None]:
    changed = []
    for node in module.graph.nodes:
        position = _RATE_ARGUMENT.get(node.target)
        if position is not None and isinstance(node.args[position], float):
            changed.append((node, node.args))
            node.update_arg(position, 0.0)
    if changed:
        module.recompile()
    try:
        yield
    finally:
        for node, arguments in changed:
            node.args = arguments
        if changed:
            module.recompile()
