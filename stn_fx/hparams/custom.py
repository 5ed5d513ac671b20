"""`CustomHyperparameter`: a hyperparameter of the user's own, with what it does as a function of tensors."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from stn_fx.errors import InputError
from stn_fx.hparams import pattern as patterns
from stn_fx.hparams.entry import Component, Entry, Kind
from stn_fx.hparams.hyperparameter import Hyperparameter

Place = Literal["input", "activation", "loss"]

_KINDS: dict[str, Kind] = {"input": "input", "activation": "site", "loss": "loss"}


@dataclass(frozen=True)
class CustomHyperparameter:
    """A hyperparameter that the catalogue does not have; pass it in the list `hparams`.

    On the input and on activations `apply(x, value, draws)` returns a tensor like `x`; `value` broadcasts against `x`,
    with one entry for each example, and everything random comes from `draws` (`stn_fx.augment.Draws`), by name. In the
    loss `apply(output, target, value)` returns a term to add, one for each example (B,) or their mean; `value` is (B,).
    With `per_batch` the value is the same for all examples of a training batch, and `value` is a scalar (): for what
    has no form with one value each, such as the size to which a batch is resized. It is then perturbed once for each
    batch, so its response is learned from fewer draws, and a batch norm in training mode hides what is common to all.
    The function need not be differentiable in `value`: hypergradients flow through the response of the weights. On an
    activation it is differentiated in `x`.

    Attributes:
        name: a new name, such as `gamma`.
        apply: what it does, see above. Code can be emitted (`stn-fx convert`) for functions that can be imported.
        acts_on: `input`, `activation` or `loss`.
        at: pattern of the inputs (None = the first floating one) or of the modules at whose outputs it acts.
        low: lower bound.
        high: upper bound; `math.inf` for none.
        initial: value to start from, strictly between the bounds.
        scale: standard deviation of the perturbation, in raw space.
        discrete: whether the value is rounded to an integer.
        per_batch: whether all examples of a batch have one value.

    Raises:
        OutOfBoundsError: `initial` is at or outside a bound.
        InputError: a name that cannot be one, an unknown place, an activation without `at`, or a function that does not
            take these arguments.
    """

    name: str
    apply: Callable[..., Any]
    acts_on: Place
    initial: float
    low: float = 0.0
    high: float = 1.0
    at: str | None = None
    scale: float = 0.5
    discrete: bool = False
    per_batch: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InputError(f"A custom hyperparameter cannot be named {self.name!r}: write letters, digits and _.")
        if self.acts_on not in _KINDS:
            raise InputError(f"{self.name}: acts_on={self.acts_on!r} is none of {', '.join(_KINDS)}.")
        if not callable(self.apply):
            raise InputError(f"{self.name}: apply is a {type(self.apply).__name__}; pass a function of tensors.")
        arguments = ("output", "target", "value") if self.acts_on == "loss" else ("x", "value", "draws")
        if not _takes(self.apply, len(arguments)):
            raise InputError(f"{self.name}: apply is called with ({', '.join(arguments)}); let it take these three.")
        if self.at is not None and (self.acts_on == "loss" or not patterns.is_valid(self.at)):
            raise InputError(
                f"{self.name}: at={self.at!r} is not usable: it is a pattern of inputs or modules such as 'layer4.*', "
                f"and a term of the loss has none."
            )
        if self.acts_on == "activation" and self.at is None:
            raise InputError(f"{self.name} acts on activations: say of which modules, for example at='layer1'.")

        Hyperparameter(self.name, self.initial, self.low, self.high, self.scale, self.discrete)  # judges the numbers

    def entry(self) -> Entry:
        """The entry of a catalogue that has it."""
        limits = (-math.inf, math.inf)
        component = Component("value", self.low, self.high, self.initial, limits, self.scale, self.discrete)
        over: Any = {"input": "inputs", "activation": "modules", "loss": None}[self.acts_on]
        return Entry(
            name=self.name,
            kind=_KINDS[self.acts_on],
            components=(component,),
            description=(self.apply.__doc__ or "a hyperparameter of the user's own").strip().splitlines()[0],
            source="the user",
            pattern_over=over,
            apply=self.apply,
            per_batch=self.per_batch,
        )


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # built in, without a signature
        return True
    return True
