"""From the `hparams` argument to a list of `Selection`: which catalogue entries, where, with which settings.

The string form:

    selection  = item {"," item}
    item       = name ["@" pattern] ["(" option {"," option} ")"]
    option     = "shared" | "initial=0.1" | "scale=0.5" | "low=0" | "high=0.5" | "discrete=true"
               | an entry's own: "locked" | "mask_token=103"
               | component "=" low ".." high | component "." option

for example `dropout@layer4.*(shared, initial=0.1), cutout(length=2..16, holes=1..3), weight_decay`. Nothing here knows
a model: what a selection matches in it is decided when the model is planned.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stn_fx.errors import InputError, UnknownHyperparameterError
from stn_fx.hparams import pattern as patterns
from stn_fx.hparams.catalogue import CATALOGUE
from stn_fx.hparams.custom import CustomHyperparameter
from stn_fx.hparams.entry import Catalogue, Entry
from stn_fx.hparams.grammar import ParsedItem, parse_item, split_items
from stn_fx.hparams.hyperparameter import Hyperparameter
from stn_fx.hparams.suggestions import describe_unknown

Chosen = Hyperparameter | CustomHyperparameter
SETTINGS = ("initial", "low", "high", "scale", "discrete")


@dataclass(frozen=True)
class Selection:
    """One entry of the catalogue, chosen by the user.

    Attributes:
        entry: the catalogue entry.
        pattern: where it acts (see `stn_fx.hparams.pattern`); None for everywhere.
        shared: one value for all places instead of one for each.
        overrides: settings by component name; components without settings are absent.
        options: what was chosen of the entry's own options, by name.
        text: what the user wrote, for messages.
        required: whether matching nothing is an error; False for the default selection.
    """

    entry: Entry
    pattern: str | None = None
    shared: bool = False
    overrides: dict[str, Hyperparameter] = field(default_factory=dict)
    options: dict[str, bool | int] = field(default_factory=dict)
    text: str = ""
    required: bool = True

    def matches(self, qualified_name: str) -> bool:
        """Whether the pattern selects this place; always true without one."""
        return self.pattern is None or patterns.matches(self.pattern, qualified_name)

    def name_of(self, component: str, place: str | None = None) -> str:
        """Full name of one scalar at one place (a qualified name); the place is not part of a shared one's name.

        A shared selection with a pattern is named after it (`dropout@layer4`), so that two of them stay apart.
        """
        if self.pattern is not None and (self.shared or self.entry.pattern_over == "weights"):
            return f"{self.entry.full_name(component)}@{self.pattern}"
        places = self.entry.pattern_over == "modules" and not self.shared
        return self.entry.full_name(component, place if places else None)


def default_selections(catalogue: Catalogue = CATALOGUE) -> list[Selection]:
    """The selection for `hparams=None`: all dropout and drop-path sites that the model has, and weight decay."""
    return [
        Selection(catalogue["dropout"], text="dropout (default)", required=False),
        Selection(catalogue["drop_path"], text="drop_path (default)", required=False),
        Selection(catalogue["weight_decay"], text="weight_decay (default)"),
    ]


def parse_hparams(
    hparams: str | Chosen | Iterable[str | Chosen] | None, catalogue: Catalogue = CATALOGUE
) -> list[Selection]:
    """Selections in the order in which their entries are first named.

    Args:
        hparams: a comma-separated string, `Hyperparameter` and `CustomHyperparameter` objects, an iterable of them, or
            None for the default.
        catalogue: where names are looked up.

    Raises:
        UnknownHyperparameterError: names that the catalogue does not have, all together.
        InputError: the text is not of the form above, an option is unknown, or something is chosen twice.
        OutOfBoundsError: an initial value at or outside bounds that are given beside it.
    """
    if hparams is None:
        return default_selections(catalogue)
    if isinstance(hparams, Mapping):
        example = ", ".join(f"{name}(initial={value})" for name, value in hparams.items())
        raise InputError(f"hparams is a mapping, whose values would be ignored. Write it as '{example}'.")
    hparams = _as_list(hparams)
    own = [each.entry() for each in hparams if isinstance(each, CustomHyperparameter)]
    catalogue = Catalogue([*catalogue, *own]) if own else catalogue
    items = _items(hparams)
    if not items:
        raise InputError(
            "hparams is empty: there is nothing to tune. Name at least one, such as 'dropout', or pass None."
        )
    unknown = [item.name for item in items if _lookup(item.name, catalogue) is None]
    if unknown:
        raise UnknownHyperparameterError(describe_unknown(unknown, catalogue))
    selections: dict[tuple[str, str | None], Selection] = {}
    named: set[tuple[str, str | None, str | None]] = set()
    for item in items:
        selection, component = _select(item, catalogue)
        key = (selection.entry.name, selection.pattern)
        if (*key, component) in named:
            raise InputError(f"{item.text!r} chooses what was chosen before. Keep one of the two.")
        named.add((*key, component))
        selections[key] = _merge(selections[key], selection) if key in selections else selection
    return list(selections.values())


def _as_list(hparams: Any) -> list[Any]:
    if isinstance(hparams, (str, Hyperparameter, CustomHyperparameter)):
        return [hparams]
    if not isinstance(hparams, Iterable):
        raise InputError(
            f"hparams is a {type(hparams).__name__}; pass a string such as 'dropout,cutout', or a list of strings and "
            f"Hyperparameter objects."
        )
    return list(hparams)


def _items(hparams: list[Any]) -> list[ParsedItem]:
    items: list[ParsedItem] = []
    for part in hparams:
        if isinstance(part, str):
            items += [parse_item(text) for text in split_items(part)]
        elif isinstance(part, Hyperparameter):
            items.append(_item_of_object(part))
        elif isinstance(part, CustomHyperparameter):
            items.append(ParsedItem(part.name, part.at, {}, part.name))
        else:
            raise InputError(f"hparams contains {part!r}, which is neither a string nor a Hyperparameter.")
    return items


def _item_of_object(hyperparameter: Hyperparameter) -> ParsedItem:
    """A `Hyperparameter` in the form of a parsed string; its name may carry a pattern but no options."""
    parsed = parse_item(hyperparameter.name)
    if parsed.options:
        raise InputError(
            f"Hyperparameter({hyperparameter.name!r}) has options in its name. Pass them as arguments, "
            f"such as initial=0.1."
        )
    settings = {key: getattr(hyperparameter, key) for key in (*SETTINGS, "shared")}
    options = {key: value for key, value in settings.items() if value is not None}
    options |= hyperparameter.options
    return ParsedItem(parsed.name, parsed.pattern, options, text=repr(hyperparameter))


def _lookup(name: str, catalogue: Catalogue) -> tuple[Entry, str | None] | None:
    """Entry and component (None for the entry itself) of `dropout` or `cutout.length`; None where there is none."""
    if name in catalogue:
        return catalogue[name], None
    head, _, tail = name.rpartition(".")
    if head in catalogue and tail in {component.name for component in catalogue[head].components}:
        return catalogue[head], tail
    return None


def _select(item: ParsedItem, catalogue: Catalogue) -> tuple[Selection, str | None]:
    """The selection of one item, and the component that it names, if any."""
    found = _lookup(item.name, catalogue)
    assert found is not None, "unknown names are refused before"
    entry, component = found
    options: dict[str, object] = dict(item.options)
    shared = options.pop("shared", False)
    if not isinstance(shared, bool):
        raise InputError(f"{item.text}: shared={shared} is not a boolean. Write 'shared' or leave it out.")
    if entry.pattern_over in ("inputs", "weights") and shared:
        raise InputError(f"{item.text}: {entry.name} has one value for all {entry.pattern_over} anyway. Leave it out.")
    if entry.pattern_over is None and (item.pattern is not None or shared):
        raise InputError(
            f"{item.text}: {entry.name} acts at one place ({entry.kind}), so it takes neither a pattern nor 'shared'. "
            f"Write {entry.name!r}."
        )
    chosen = _take_options(entry, options, item.text)
    settings: dict[str, dict[str, object]] = {}
    for key, value in options.items():
        for target, setting, number in _assign(entry, component, key, value, item.text):
            settings.setdefault(target, {})[setting] = number
    overrides = {
        target: Hyperparameter(f"{entry.name}.{target}" if len(entry.components) > 1 else entry.name, **values)  # type: ignore[arg-type]
        for target, values in settings.items()
    }
    return Selection(entry, item.pattern, shared, overrides, chosen, item.text), component


def _take_options(entry: Entry, options: dict[str, object], text: str) -> dict[str, bool | int]:
    """The entry's own options, taken out of `options`; those that are left out have their defaults."""
    chosen: dict[str, bool | int] = {}
    for option in entry.options:
        value = options.pop(option.name, option.default)
        if value is None:
            raise InputError(
                f"{text}: {entry.name} needs {option.name} ({option.description}). Write for example "
                f"{entry.name}({option.name}=103)."
            )
        flag = isinstance(option.default, bool)
        if isinstance(value, bool) is not flag or not isinstance(value, (int, float)) or value != int(value):
            form = f"a flag: write {option.name} or leave it out" if flag else "a whole number"
            raise InputError(f"{text}: {option.name}={value} is not of the right form; it is {form}.")
        chosen[option.name] = value if isinstance(value, bool) else int(value)
    return chosen


def _assign(entry: Entry, component: str | None, key: str, value: object, text: str) -> list[tuple[str, str, object]]:
    """What one option sets: (component, setting, value), with a range as two settings."""
    names = [each.name for each in entry.components]
    target, _, setting = key.rpartition(".")
    if not target and setting in names and isinstance(value, tuple):
        return [(setting, "low", value[0]), (setting, "high", value[1])]
    target = target or component or (names[0] if len(names) == 1 else "")
    if target in names and setting in SETTINGS and not isinstance(value, tuple):
        return [(target, setting, value)]
    prefix = "" if len(names) == 1 else f"{names[0]}."
    raise InputError(
        f"{text}: {key!r} is not an option of {entry.name}, or its value is not of the right form. Options are "
        f"{', '.join(prefix + each for each in SETTINGS)}"
        f"{''.join(f', {option.name}' for option in entry.options)}"
        f"{', shared' if entry.pattern_over == 'modules' else ''}, and ranges such as {names[-1]}=0..1"
        f"{'' if len(names) == 1 else ' (components: ' + ', '.join(names) + ')'}."
    )


def _merge(first: Selection, second: Selection) -> Selection:
    """Two items about one entry at the same places, such as `cutout` and `Hyperparameter("cutout.length", ...)`."""
    twice = first.overrides.keys() & second.overrides.keys()
    if twice or first.shared != second.shared or first.options != second.options:
        what = f"component {', '.join(sorted(twice))}" if twice else "'shared' or another option"
        raise InputError(f"{first.text!r} and {second.text!r} differ on {what}. Keep one of the two.")
    return replace(first, overrides=first.overrides | second.overrides, text=f"{first.text}, {second.text}")
