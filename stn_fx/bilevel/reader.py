"""Reading a loader batch by batch with a position that can be stored and found again.

A loader is not asked for more than to be iterable. What decides the order of a pass is drawn from generators when the
pass begins (or from the loader's own generators while it goes on): so the states of all generators at that moment and
the number of batches taken are the position, and a pass is taken up by beginning it again from these states and reading
as many batches, without training on them.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from stn_fx.bilevel.generators import Generators, State
from stn_fx.errors import CheckpointError, InputError


def length_of(loader: Any) -> int | None:
    """Batches of one pass; None where the loader does not know, as a DataLoader of an IterableDataset."""
    try:
        return len(loader)
    except TypeError:
        return None


def beside_a_pass(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader for passes of its own while another one goes on.

    With persistent workers a DataLoader has one iterator, and beginning a pass ends the one that is under way; its twin
    has workers that end with their pass.
    """
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    twin = copy.copy(loader)
    vars(twin).update(persistent_workers=False, _iterator=None)  # a DataLoader refuses to have them set
    return twin


def sampler_of(loader: Any) -> Any:
    """What chooses the examples of a DataLoader; its attribute `sampler` is not used beside a batch sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader if batch_sampler is None else batch_sampler, "sampler", None)


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
            self.require_batches()

    def require_batches(self) -> None:
        """InputError where the pass that has just ended had no batch."""
        if self.taken:
            return
        if self.passes > 1:
            raise InputError(
                f"The {self.name} loader had batches in its first pass and none in pass {self.passes}: it can be read "
                f"once only, as a generator. Give a loader that begins anew at every iter(), such as a DataLoader."
            )
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
        sampler = sampler_of(self.loader)
        if hasattr(sampler, "set_epoch"):  # torch's DistributedSampler has another order for each pass only if told
            sampler.set_epoch(self.passes)
        self.passes += 1
        self._iterator = iter(self.loader)
