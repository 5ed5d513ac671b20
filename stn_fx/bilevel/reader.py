"""Reading a loader batch by batch with a position that can be stored and found again.

A loader is not asked for more than to be iterable. What decides the order of a pass is drawn from generators when the
pass begins (or from the loader's own generators while it goes on): so the states of all generators at that moment and
the number of batches taken are the position, and a pass is taken up by beginning it again from these states and reading
as many batches, without training on them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from stn_fx.bilevel.generators import Generators, State
from stn_fx.errors import CheckpointError, InputError


class BatchReader:
    """One pass after the other over a loader.

    Args:
        loader: iterable many times.
        name: of the loader, for errors.
        generators: whatever the order of a pass may be drawn from.
    """

    def __init__(self, loader: Iterable[Any], name: str, generators: Generators) -> None:
        self.loader = loader
        self.name = name
        self.generators = generators
        self.taken = 0
        self.passes = 0
        self._began: State | None = None
        self._iterator: Iterator[Any] | None = None

    def rest_of_pass(self) -> Iterator[Any]:
        """The batches that are left of the current pass, or those of a new one where none is under way."""
        if self._iterator is None:
            self._begin(self.generators.state())
        assert self._iterator is not None
        for content in self._iterator:
            self.taken += 1
            yield content
        self._iterator = None
        self._began = None

    def endless(self) -> Iterator[Any]:
        """One pass after the other; each begins anew, and so reshuffled.

        Raises:
            InputError: the loader is empty.
        """
        while True:
            yield from self.rest_of_pass()
            if not self.taken:
                raise InputError(f"The {self.name} loader is empty. Give it at least one batch (mind drop_last=True).")

    def state(self) -> State:
        """The position, as plain data."""
        return {"began": self._began, "taken": self.taken, "passes": self.passes}

    def restore(self, state: State) -> None:
        """Go to a position; leaves the generators somewhere, so restore them afterwards.

        Raises:
            CheckpointError: the loader ends before that position.
        """
        self._iterator = self._began = None
        self.taken, self.passes = state["taken"], state["passes"]
        if state["began"] is None:  # between two passes
            return
        self.passes -= 1
        self.generators.restore(state["began"])
        self._begin(state["began"])
        assert self._iterator is not None
        for position in range(state["taken"]):
            if next(self._iterator, self) is self:
                raise CheckpointError(
                    f"The checkpoint was made after {state['taken']} batches of a pass over the {self.name} loader, "
                    f"which now ends after {position}. Resume with the same data and batch size."
                )
        self.taken = state["taken"]

    def _begin(self, began: State) -> None:
        self._began = began
        self.taken = 0
        sampler: Any = getattr(self.loader, "sampler", None)
        if sampler is not None and hasattr(
            sampler, "set_epoch"
        ):  # torch's DistributedSampler has another order for each pass only if told
            sampler.set_epoch(self.passes)
        self.passes += 1
        self._iterator = iter(self.loader)
