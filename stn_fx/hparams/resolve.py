"""From a selection to numbers: the catalogue's defaults at one place in the model, replaced by the user's settings."""

import math
from dataclasses import asdict, dataclass

from stn_fx.errors import InputError, OutOfBoundsError
from stn_fx.hparams.constraint import unconstrain
from stn_fx.hparams.entry import Component, Default, Entry, SiteContext
from stn_fx.hparams.hyperparameter import Hyperparameter
from stn_fx.hparams.selection import Selection

# A default outside the user's bounds (or a site's own rate above the catalogue's) moves inside by this fraction.
INSIDE = 0.1

NOWHERE = SiteContext()


@dataclass(frozen=True)
class ResolvedHyperparameter:
    """One scalar of the space, with nothing left open.

    Attributes:
        name: full name, such as `dropout.layer1.0`, `cutout.holes`, `weight_decay`.
        entry: name of the catalogue entry.
        component: name of the component within the entry.
        low: lower bound, finite.
        high: upper bound; infinity where there is none.
        initial: constrained value to start from, strictly inside.
        scale: initial standard deviation of the perturbation, in raw space.
        discrete: whether the value is rounded to an integer.
        per_batch: whether all examples of a batch have one value.

    Raises:
        OutOfBoundsError: `initial` at or outside a bound.
        InputError: bounds that enclose nothing, or that a discrete value cannot take.
    """

    name: str
    entry: str
    component: str
    low: float
    high: float
    initial: float
    scale: float
    discrete: bool = False
    per_batch: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high:
            raise InputError(
                f"{self.name}: no value lies between low={self.low:g} and high={self.high:g}. Widen the bounds."
            )
        if not 0 < self.scale < math.inf:
            raise InputError(f"{self.name}: scale={self.scale:g} is not a positive number. The usual value is 0.5.")
        fractional = [bound for bound in (self.low, self.high) if math.isfinite(bound) and bound != round(bound)]
        if self.discrete and fractional:
            raise InputError(
                f"{self.name} is discrete, but its bounds {self.low:g} and {self.high:g} are not integers. Round them, "
                f"or set discrete=False."
            )
        self.raw_initial()

    def raw_initial(self) -> float:
        """Raw value of `initial`."""
        return unconstrain(self.name, self.initial, self.low, self.high)

    def to_dict(self) -> dict[str, object]:
        """JSON-able form; an upper bound of infinity is None."""
        return asdict(self) | {"high": self.high if math.isfinite(self.high) else None}


def resolve(
    selection: Selection, context: SiteContext = NOWHERE, place: str | None = None
) -> list[ResolvedHyperparameter]:
    """All scalars of a selection at one place.

    Args:
        selection: what the user chose.
        context: what defaults may depend on there.
        place: qualified name of the module that it acts at; part of the names of entries that act at places.

    Raises:
        OutOfBoundsError: the user's initial value or bounds are not allowed.
        InputError: a default cannot be known here (no image), or the bounds are not usable.
    """
    return [
        _resolve_component(
            selection.name_of(component.name, place),
            selection.entry,
            component,
            selection.overrides.get(component.name, Hyperparameter(selection.entry.name)),
            context.of(component.name),
        )
        for component in selection.entry.components
    ]


def _resolve_component(
    name: str, entry: Entry, component: Component, override: Hyperparameter, context: SiteContext
) -> ResolvedHyperparameter:
    def number(setting: float | None, default: float | Default) -> float:
        if setting is not None:
            return setting
        return default if isinstance(default, (int, float)) else default.at(context, name)

    low, high = number(override.low, component.low), number(override.high, component.high)
    least, greatest = component.limits
    if low < least or high > greatest:
        raise OutOfBoundsError(
            f"{name}: bounds {low:g} and {high:g} reach outside {least:g} and {greatest:g}, where it has no meaning. "
            f"Choose bounds within."
        )
    initial = number(override.initial, component.initial)
    if override.initial is None and low < high:
        initial = _inside(initial, low, high)
    return ResolvedHyperparameter(
        name=name,
        entry=entry.name,
        component=component.name,
        low=low,
        high=high,
        initial=initial,
        scale=number(override.scale, component.scale),
        discrete=component.discrete if override.discrete is None else override.discrete,
        per_batch=entry.per_batch,
    )


def _inside(initial: float, low: float, high: float) -> float:
    """The default initial value, moved strictly inside bounds that it was not made for."""
    if low < initial < high:
        return initial
    width = high - low if math.isfinite(high) else 2.0 * max(abs(low), 1e-3)
    return low + INSIDE * width if initial <= low else high - INSIDE * width
