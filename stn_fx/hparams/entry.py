"""The types of the catalogue: entries, their components, and defaults that depend on the place in the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from stn_fx.errors import InputError, UnknownHyperparameterError

Kind = Literal["site", "input", "loss", "mixing", "activation"]
PatternOver = Literal["modules", "inputs", "weights"]
Needs = Literal["floating", "image", "pixels", "colour", "tokens"]


@dataclass(frozen=True)
class SiteContext:
    """What a default may know about the place that a hyperparameter acts on.

    Attributes:
        own_rate: the rate that the model's author gave to this site; None or 0 where there is none or it is inactive.
        image_size: (H, W) in pixels of the image input; None where there is no image.
        own_values: what the author gave to components of the entry, by name, where it has several.
    """

    own_rate: float | None = None
    image_size: tuple[int, int] | None = None
    own_values: Mapping[str, float] = field(default_factory=dict)

    def of(self, component: str) -> "SiteContext":
        """The same place, as one component of the entry sees it."""
        return replace(self, own_rate=self.own_values.get(component, self.own_rate))


class Default(Protocol):
    """A default that depends on the place. `str()` of it is what `stn-fx hparams` prints."""

    def at(self, context: SiteContext, name: str) -> float:
        """The number at that place; `name` is for messages."""
        ...


@dataclass(frozen=True)
class OwnRate:
    """The site's own rate where it is active, else `fallback`."""

    fallback: float

    def at(self, context: SiteContext, name: str) -> float:
        return context.own_rate if context.own_rate else self.fallback

    def __str__(self) -> str:
        return f"the site's own rate, else {self.fallback:g}"


@dataclass(frozen=True)
class ImageSide:
    """A fraction of the image's shorter side in pixels, rounded down to at least 1 where it bounds an integer."""

    fraction: float
    whole: bool = False

    def at(self, context: SiteContext, name: str) -> float:
        if context.image_size is None:
            raise InputError(
                f"{name} depends on the size of the image, but this model has no image input (4-d, floating). Leave "
                f"{name} out, or give its bounds and initial value."
            )
        pixels = self.fraction * min(context.image_size)
        return float(max(1, int(pixels))) if self.whole else pixels

    def __str__(self) -> str:
        return f"{self.fraction:g} * min(height, width)"


@dataclass(frozen=True)
class Component:
    """One scalar of a catalogue entry.

    Attributes:
        name: its name within the entry; part of the full name only where the entry has several components.
        low: default lower bound.
        high: default upper bound.
        initial: default initial value, strictly between the default bounds.
        limits: the least lower and the greatest upper bound that a user may set.
        scale: default standard deviation of the perturbation, in raw space.
        discrete: whether the value is rounded to an integer.
    """

    name: str
    low: float | Default
    high: float | Default
    initial: float | Default
    limits: tuple[float, float]
    scale: float = 0.5
    discrete: bool = False


@dataclass(frozen=True)
class Option:
    """A setting of an entry that is chosen and not tuned, such as `locked` in `dropout(locked)`.

    Attributes:
        name: what users write.
        description: one line.
        default: a boolean for a flag, else an integer; None where the user must say it.
    """

    name: str
    description: str
    default: bool | int | None = False


@dataclass(frozen=True)
class Entry:
    """A regularizer of the catalogue.

    Attributes:
        name: what users write.
        kind: where it acts: `site` (places inside the model), `input`, `loss`, `mixing` (across the examples of a
            batch, before the model), or `activation` (a term of the loss on outputs of modules that a pattern names).
        components: its scalars, at least one.
        description: one line.
        source: the paper or recipe that bounds and initial values come from.
        pattern_over: what a pattern after `@` selects; None where the entry takes no pattern.
        needs: for `input` entries, what the input must be: `floating` (any), `image` (4-d), `pixels` (an image whose
            numbers have a known meaning, with 1 or 3 channels), `colour` (the same with 3), `tokens` (integers).
        options: settings that are chosen and not tuned.
        apply: what a hyperparameter of the user's own does; see `stn_fx.hparams.custom`.
        per_batch: whether all examples of a batch have one value, which `apply` receives as a scalar.
    """

    name: str
    kind: Kind
    components: tuple[Component, ...]
    description: str
    source: str
    pattern_over: PatternOver | None = None
    needs: Needs = "floating"
    options: tuple[Option, ...] = ()
    apply: Callable[..., Any] | None = None
    per_batch: bool = False

    def component(self, name: str) -> Component:
        """The component of that name; KeyError where there is none."""
        return {component.name: component for component in self.components}[name]

    def full_name(self, component: str, place: str | None = None) -> str:
        """Path of one scalar: `weight_decay`, `cutout.holes`, `dropout.layer1.0` (`place` is a qualified name)."""
        parts = [self.name, place, component if len(self.components) > 1 else None]
        return ".".join(part for part in parts if part)


class Catalogue:
    """Entries by name. An object, so that a user can add entries to a copy of one's own."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[str, Entry] = {}
        for entry in entries:
            self.register(entry)

    def register(self, entry: Entry) -> Entry:
        """Add an entry and return it; InputError where the name is taken."""
        if entry.name in self._entries:
            raise InputError(f"The catalogue already has an entry named {entry.name!r}. Choose another name.")
        self._entries[entry.name] = entry
        return entry

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise UnknownHyperparameterError(
                f"There is no hyperparameter named {name!r}. The catalogue has: {', '.join(self._entries)}."
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all entries, in the order in which they were registered."""
        return tuple(self._entries)
