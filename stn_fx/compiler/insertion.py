"""Insertions: a site that the plan puts into the training graph, as a marker that its rule lowers later."""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from stn_fx.compiler.capture import CapturedGraph
from stn_fx.rules.markers import CUSTOM, MARKERS


@dataclass(frozen=True)
class Insertion:
    """A site to insert: after ``node``, for ``users`` only (None = all); ``arguments`` are the marker's own."""

    entry: str
    name: str
    node: Node
    users: tuple[Node, ...] | None = None
    arguments: tuple[Any, ...] = ()


def insert_sites(captured: CapturedGraph, insertions: list[Insertion]) -> None:
    """Put the chosen sites into (a copy of) the training graph."""
    for insertion in insertions:
        users = list(insertion.node.users) if insertion.users is None else list(insertion.users)
        with captured.graph.inserting_after(insertion.node):
            marker = MARKERS.get(insertion.entry, MARKERS[CUSTOM])
            site = captured.graph.call_function(marker, (insertion.node, *insertion.arguments))
        site.meta = {**insertion.node.meta, "site_name": insertion.name, "site_entry": insertion.entry}
        for user in users:
            user.replace_input_with(insertion.node, site)
