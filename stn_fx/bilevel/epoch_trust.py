"""When trust is measured in an epoch, and what is known of it until the epoch ends.

It is measured when a batch is at hand, and kept as plain data: a run that is taken up in the middle of an epoch can not
read the batches again that it has already trained on (an augmentation would come out differently).
"""

from collections.abc import Callable, Iterable
from typing import Any

from stn_fx.bilevel.algorithm import Algorithm
from stn_fx.bilevel.generators import Generators
from stn_fx.bilevel.reader import length_of
from stn_fx.bilevel.trust import Trust
from stn_fx.bilevel.trust_measurement import Measured, measure_hypergradients, measure_response, trust_of


class EpochTrust:
    """Measures the response and the hypergradients once in every epoch, without a trace in the run.

    Args:
        algorithm: what trains.
        generators: all of the run; as before after every measurement.
        train: loader of the training batches.
        enabled: whether anything is measured.
    """

    def __init__(self, algorithm: Algorithm, generators: Generators, train: Iterable[Any], enabled: bool) -> None:
        self.algorithm = algorithm
        self.generators = generators
        self.train = train
        self.enabled = enabled and algorithm.tunes
        self.found: dict[str, Measured] = {}

    def before_inner_step(self, content: Any, taken: int, step: int) -> None:
        """Measure the response as late as is known: at the last batch but one, because the last is often smaller.

        Args:
            content: the batch, as the loader yielded it.
            taken: batches of this epoch up to it, itself included.
            step: inner steps done.
        """
        if self.enabled and taken == max(1, (length_of(self.train) or 1) - 1):
            self._measure("response", measure_response, content, step)

    def before_outer_step(self, content: Any, step: int) -> None:
        """Measure the hypergradients at the first outer step of the epoch."""
        self._measure("hypergradients", measure_hypergradients, content, step)

    def end_epoch(self) -> dict[str, Trust] | None:
        """What was found, with bounds and scales as they are now; None where it is not measured. Begins anew."""
        found, self.found = self.found, {}
        if not self.enabled:
            return None
        return trust_of(self.algorithm.stn, found.get("response", {}), found.get("hypergradients", {}))

    def _measure(self, what: str, how: Callable[[Algorithm, Any, int], Measured], content: Any, step: int) -> None:
        if not self.enabled or what in self.found:
            return
        with self.generators.untouched():
            self.found[what] = how(self.algorithm, content, step)
