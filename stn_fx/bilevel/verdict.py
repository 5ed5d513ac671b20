"""Whether to trust the tuned value of each hyperparameter, in plain words, from what the run measured of itself.

The thresholds are rules of thumb, in standard errors where there are any: a run of one seed cannot say more.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from stn_fx.bilevel.records import FitResult
from stn_fx.bilevel.trust import COLLAPSED, Trust, pooled, ratio

SHARE_POOLED = 3
"""The last third of the epochs with tuning is looked at together: one epoch's numbers are noisy."""
SEEN = 2.0
"""Standard errors from which a mean counts as different from zero."""
MOVING = 4.0
"""Standard errors from which a hypergradient at the end means that the value has not settled."""
GOOD_RESPONSE = 0.5
"""Response error up to which at least three quarters of the attainable decrease are there."""
LOWER_RATE = "Lower the response's learning rate (response_optimizer; --response-lr)"
LONGER = "Train longer (epochs; --epochs)"


@dataclass(frozen=True)
class Verdict:
    """What to think of one tuned value.

    Attributes:
        name: of the hyperparameter.
        trusted: whether nothing speaks against it.
        words: one sentence, why or why not.
    """

    name: str
    trusted: bool
    words: str


def verdicts(result: FitResult) -> list[Verdict]:
    """One for each hyperparameter; none where the run measured nothing (older runs, nothing tuned)."""
    measured = [record.trust for record in result.history if record.trust is not None]
    if not measured or result.schedule[-1].outer_step == 0:
        return []
    found = []
    for name in result.values:
        records = [trust[name] for trust in measured if name in trust]
        tuned = [each for each in records if each.hypergradient is not None] or records
        last = tuned[-math.ceil(len(tuned) / SHARE_POOLED) :]
        reason = _against(pooled(last), last, tuned, result.schedule[-1].scales[name])
        found.append(Verdict(name, reason is None, reason or _in_favour(pooled(last))))
    return found


def _against(end: Trust, last: list[Trust], tuned: list[Trust], scale: float) -> str | None:
    """The weightiest reason not to trust it."""
    if end.collapsed:
        return (
            f"Its scale fell to {scale:.2g}, below {COLLAPSED:g}: in so small a surrounding the response is mostly "
            f"noise. Raise entropy_weight (--entropy-weight)."
        )
    if end.bound == "upper":
        return "It is at its upper bound: a higher one may be better. Widen the bound, as in NAME(high=...)."
    if end.bound == "lower":
        return (
            "It is at its lower bound: either the model wants none of it, or its gradient was lost in noise. See "
            "whether a run from a higher start ends there too."
        )
    if end.response_error is None:
        return (
            "Its response could not be measured (no examples along the first axis of the output, too few, or one value "
            "for all examples of a batch)."
        )
    if (end.delivery_signal or 0) <= -SEEN:
        return (
            "Its response is worse than none: at fresh perturbations it raises the training loss, so it is mostly "
            f"noise or too long. {LOWER_RATE}, or use larger batches."
        )
    if (end.response_signal or 0) <= -SEEN:
        return f"Its response points uphill: it would raise the loss that it is to lower. {LOWER_RATE}."
    if (end.response_signal or 0) < SEEN:
        return (
            "Its response cannot be told from noise: it may have little effect, or was learned for too short a time. "
            "Lengthen the warm-up (warmup_epochs; --warmup), or use larger batches."
        )
    if end.response_error > GOOD_RESPONSE:
        short = (end.delivered or 0) > (end.promised or 0)
        return (
            f"Its response is {'too short still' if short else 'too long or noisy'} (error {end.response_error:.2f}; 0 "
            f"is exact, 1 no better than none). {LONGER if short else LOWER_RATE}."
        )
    signals = [ratio(each.hypergradient, each.hypergradient_error) or 0.0 for each in [end, pooled(tuned), *tuned]]
    if max(map(abs, signals[:2])) < SEEN and max(map(abs, signals[2:])) < _seen_once_in(len(tuned)):
        return (
            "Its hypergradient never stood out of the noise: the value is where chance has taken it. Use more "
            "validation data or a higher start; it may not matter."
        )
    if len(last) > 1 and abs(signals[0]) > MOVING:
        return f"It is still moving: its hypergradient is {abs(signals[0]):.0f} standard errors from 0. {LONGER}."
    return None


def _seen_once_in(epochs: int) -> float:
    """Standard errors that noise reaches in one of so many epochs as seldom as it reaches `SEEN` in a single one."""
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-SEEN) / epochs)


def _in_favour(end: Trust) -> str:
    error = f"response error {end.response_error:.2f}" if end.response_error is not None else "response not measured"
    return f"Nothing speaks against it: {error} over the last third of the epochs, and its hypergradient has settled."
