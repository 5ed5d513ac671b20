"""Markers: functions that stand in a training graph where the plan inserts a site, until its rule lowers them.

A marker returns its first argument; the others say what the site is. It is registered under the catalogue entries that
it is inserted for.
"""

from collections.abc import Callable
from typing import Any

Marker = Callable[..., Any]

MARKERS: dict[str, Marker] = {}
"""Catalogue entry -> what is inserted for it."""


CUSTOM = "the user's own"
"""Key of the marker for entries of the user's own."""


def marks(*entries: str) -> Callable[[Marker], Marker]:
    """Decorator: insert this function for these catalogue entries."""

    def register(marker: Marker) -> Marker:
        MARKERS.update(dict.fromkeys(entries, marker))
        return marker

    return register


def is_marker(target: Any) -> bool:
    """Whether a node with this target is an inserted site."""
    return target in MARKERS.values()
