"""`Hyperparameter`: what a user says about one hyperparameter; all that is left out comes from the catalogue."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from numbers import Real

from stn_fx.errors import InputError, OutOfBoundsError


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter to tune, chosen by name, with settings that replace the catalogue's defaults (None keeps one).

    Attributes:
        name: a catalogue name (`dropout`), with a pattern where it acts at places in the model (`dropout@layer4.*`, see
            `stn_fx.hparams.pattern`), or one component of an entry that has several (`cutout.length`).
        initial: constrained value to start from, strictly between the bounds.
        low: lower bound of the constrained value.
        high: upper bound of the constrained value; `math.inf` for none.
        scale: initial standard deviation of the perturbation, in raw space.
        discrete: whether the value is rounded to an integer.
        shared: one value for all places that match, instead of one for each.
        options: the entry's own options by name, such as `{"mask_token": 103}`.

    Raises:
        InputError: a setting is of the wrong kind, not finite, or contradicts another.
        OutOfBoundsError: `initial` is at or outside a bound that is given beside it.
    """

    name: str
    initial: float | None = None
    low: float | None = None
    high: float | None = None
    scale: float | None = None
    discrete: bool | None = None
    shared: bool | None = None
    options: Mapping[str, bool | int] = dataclass_field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(
                f"Hyperparameter name {self.name!r} is not usable: it must be a catalogue name such as 'dropout'."
            )
        for field in ("initial", "low", "high", "scale"):
            self._check_number(field, getattr(self, field))
        for field in ("discrete", "shared"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, bool):
                raise InputError(
                    f"{self.name}: {field}={value!r} is not a boolean. Use True or False, or leave it out for the "
                    f"catalogue's default."
                )
        self._check_order()

    def _check_number(self, field: str, value: object) -> None:
        """Refuse what is not a real number, and what is not finite (except `high`, which may be infinity)."""
        if value is None:
            return
        if not isinstance(value, Real) or isinstance(value, bool):
            raise InputError(f"{self.name}: {field}={value!r} is a {type(value).__name__}, not a number. Pass a float.")
        number = float(value)
        if not math.isfinite(number) and not (field == "high" and number == math.inf):
            raise InputError(f"{self.name}: {field}={number} is not finite. Pass a finite number, or leave it out.")
        object.__setattr__(self, field, number)

    def _check_order(self) -> None:
        if self.scale is not None and self.scale <= 0:
            raise InputError(
                f"{self.name}: scale={self.scale:g} is not positive, and a standard deviation must be. The catalogue's "
                f"default is usually 0.5."
            )
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise InputError(
                f"{self.name}: low={self.low:g} is not below high={self.high:g}, so no value lies between. "
                f"Swap or widen them."
            )
        below = self.initial is not None and self.low is not None and self.initial <= self.low
        above = self.initial is not None and self.high is not None and self.initial >= self.high
        if below or above:
            raise OutOfBoundsError(
                f"{self.name}: initial={self.initial:g} is not strictly between its bounds "
                f"{'the default' if self.low is None else format(self.low, 'g')} and "
                f"{'the default' if self.high is None else format(self.high, 'g')}. Choose a value inside, or set "
                f"other bounds with low= and high=."
            )
