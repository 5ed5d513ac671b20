"""How far one hyperparameter can be trusted, as numbers: what `stn_fx.bilevel.trust_measurement` finds in an epoch.

**Response error.** Along its own direction the learned response is right if no multiple of it does better. With
``phi(a)`` the linearized training loss at fresh perturbations when the learned change of the weights is multiplied by
``a``, a response promises the decrease ``-phi'(0) / 2`` (what the minimiser of a quadratic with this slope gains) and
delivers ``phi(0) - phi(1)``. The error is ``|1 - delivered / promised|``: 0 for the minimiser, 1 for no response at
all, above 1 for one that is worse than none (twice too long, turned round, or mostly noise). For a quadratic its square
is the share of the attainable decrease that is missed. What it cannot see is a direction in which the response has
learned nothing.

**Hypergradient.** Mean and standard error over examples of d(validation loss)/d(raw value) through the response, at
perturbed hyperparameters as in an outer step.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

COLLAPSED = 0.05
"""Scale in raw space below which the surrounding is too small to learn a response in."""
NEAR_UPPER = 0.02
"""Share of the range between the bounds."""
NEAR_LOWER = 0.01
"""Share of the initial distance from the lower bound, near which values live on a logarithmic scale."""


def at_bound(value: float, low: float, high: float | None, initial: float) -> str | None:
    """Which bound a value is at: "upper", "lower" or None; `high` is None or infinite where there is none."""
    if high is not None and math.isfinite(high) and high - value < NEAR_UPPER * (high - low):
        return "upper"
    return "lower" if value - low < NEAR_LOWER * (initial - low) else None


@dataclass(frozen=True)
class Trust:
    """One hyperparameter in an epoch. Numbers that could not be measured are None.

    The response is measured at the last training batch but one, the hypergradient at the first outer step.

    Attributes:
        promised: decrease of the linearized training loss that the response promises, mean over examples.
        promised_error: its standard error.
        delivered: decrease of that loss that it brings at fresh perturbations, mean over examples.
        delivered_error: its standard error.
        hypergradient: derivative of the mean validation loss by the raw value.
        hypergradient_error: its standard error, for one validation batch.
        bound: "lower" or "upper" where the value is at a bound.
        collapsed: whether the scale is below `COLLAPSED`.
    """

    promised: float | None = None
    promised_error: float | None = None
    delivered: float | None = None
    delivered_error: float | None = None
    hypergradient: float | None = None
    hypergradient_error: float | None = None
    bound: str | None = None
    collapsed: bool = False

    @property
    def response_error(self) -> float | None:
        """0 exact, 1 no better than no response, above 1 worse than none; see the head of this file."""
        if self.promised is None or self.delivered is None:
            return None
        if self.promised == 0:  # a response that is zero
            return 1.0
        return abs(1 - self.delivered / self.promised)

    @property
    def response_signal(self) -> float | None:
        """The promise in standard errors; negative where the response points uphill."""
        return ratio(self.promised, self.promised_error)

    @property
    def delivery_signal(self) -> float | None:
        """The delivery in standard errors; negative where the response does more harm than good."""
        return ratio(self.delivered, self.delivered_error)

    @property
    def hypergradient_signal(self) -> float | None:
        """Signal to noise of the hypergradient of one validation batch: |mean| / standard error."""
        signal = ratio(self.hypergradient, self.hypergradient_error)
        return None if signal is None else abs(signal)

    def columns(self, name: str) -> dict[str, Any]:
        """Columns of `history.csv`."""
        return {
            f"{name} response error": self.response_error,
            f"{name} response signal": self.response_signal,
            f"{name} hypergradient": self.hypergradient,
            f"{name} hypergradient signal": self.hypergradient_signal,
            f"{name} bound": self.bound,
            f"{name} collapsed": self.collapsed,
        }


def pooled(records: Iterable[Trust]) -> Trust:
    """Means over epochs, with the standard errors of the means; bound and scale as in the last one."""
    records = list(records)
    means: dict[str, float | None] = {}
    for quantity in ("promised", "delivered", "hypergradient"):
        pairs = [(getattr(each, quantity), getattr(each, f"{quantity}_error")) for each in records]
        known = [(mean, error) for mean, error in pairs if mean is not None and error is not None]
        if known:
            means[quantity] = sum(mean for mean, _ in known) / len(known)
            means[f"{quantity}_error"] = math.sqrt(sum(error**2 for _, error in known)) / len(known)
    last = records[-1] if records else Trust()
    return Trust(**means, bound=last.bound, collapsed=last.collapsed)


def ratio(mean: float | None, error: float | None) -> float | None:
    """Mean in standard errors; 0 for nothing, None where either is not known or there is no error to compare with."""
    if mean is None or error is None:
        return None
    if mean == 0:
        return 0.0
    return mean / error if error > 0 else None


def trust_from_json(content: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Trust] | None:
    """From plain data by name, as `dataclasses.asdict` gives it."""
    return None if content is None else {name: Trust(**each) for name, each in content.items()}
