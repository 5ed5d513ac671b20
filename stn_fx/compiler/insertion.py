"""Insertions: a site that the plan puts into the training graph, as a marker that its rule lowers later."""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from stn_fx.compiler.capture import CapturedGraph
from stn_fx.rules.markers import CUSTOM, MARKERS

TEMPORAL = "temporal_activation_regularization"
"""The term that looks at a module's output as it is, before what is inserted there."""


@dataclass(frozen=True)
class Insertion:
    """A site to insert: after ``node``, for ``users`` only (None = all); ``arguments`` are the marker's own.

    A ``tap`` stands beside the way: nothing uses it, and it sees what other sites of its name make of the value (except
    the temporal term, which sees the value itself, as in AWD-LSTM).
    """

    entry: str
    name: str
    node: Node
    users: tuple[Node, ...] | None = None
    arguments: tuple[Any, ...] = ()
    tap: bool = False


def insert_sites(captured: CapturedGraph, insertions: list[Insertion]) -> None:
    """Put the chosen sites into (a copy of) the training graph."""
    for insertion in sorted(insertions, key=lambda each: each.tap):
        node, users = insertion.node, insertion.users
        if insertion.tap:
            node, users = (node if insertion.entry == TEMPORAL else _as_regularized(node, insertion.name)), ()
        users = tuple(node.users) if users is None else users
        with captured.graph.inserting_after(node):
            marker = MARKERS.get(insertion.entry, MARKERS[CUSTOM])
            site = captured.graph.call_function(marker, (node, *insertion.arguments))
        site.meta = {**node.meta, "site_name": insertion.name, "site_entry": insertion.entry}
        for user in users:
            user.replace_input_with(node, site)


def _as_regularized(node: Node, name: str) -> Node:
    """The value behind the sites that were inserted at this module's output."""
    for user in node.users:
        if user.meta.get("site_name") == name and user.args[0] is node and user.target is not MARKERS[TEMPORAL]:
            return _as_regularized(user, name)
    return node
