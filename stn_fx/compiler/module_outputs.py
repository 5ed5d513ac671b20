"""Outputs of modules that the user names, as nodes of the training graph, whatever the graph made of the module.

During capture a named module hands its output through a marker operator, one for each of its calls. Of a tuple, such as
that of ``nn.LSTM``, it is the first floating tensor. The markers are taken out again before anything else sees them.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree


@torch.library.custom_op("stn_fx::module_output", mutates_args=())
def module_output(x: Tensor, name: str) -> Tensor:
    """Stands behind a call of the module of this name."""
    return x.clone()


@module_output.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


@contextlib.contextmanager
def marked_outputs(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """The modules of these names mark their outputs while this is open."""
    handles = [model.get_submodule(name).register_forward_hook(_Mark(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Mark:
    """Forward hook of one module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        leaves, structure = pytree.tree_flatten(output)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves[index] = module_output(leaf, self.name)
                return pytree.tree_unflatten(leaves, structure)
        return output


def is_output_marker(node: Node) -> bool:
    """Whether this node is a marker, which nothing need use to be wanted."""
    return node.target is torch.ops.stn_fx.module_output.default


def take_outputs(graph: Graph) -> dict[str, list[Node]]:
    """Take the markers out of ``graph``; the outputs of each named module by call, in the order of the graph."""
    outputs: dict[str, list[Node]] = {}
    for node in list(graph.nodes):
        if is_output_marker(node):
            source, name = node.args
            outputs.setdefault(name, []).append(source)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    return outputs
