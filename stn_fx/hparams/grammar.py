"""The string form of `hparams`, taken apart without looking at the catalogue (the grammar is in `selection`)."""

import re
from dataclasses import dataclass

from stn_fx.errors import InputError
from stn_fx.hparams import pattern as patterns

OptionValue = float | bool | tuple[float, float]

NUMBERS = ("initial", "scale", "low", "high", "discrete")

_ITEM = re.compile(r"^(?P<name>[^@()]*?)\s*(?:@(?P<pattern>[^()]*?)\s*)?(?:\((?P<options>[^()]*)\))?$")


@dataclass(frozen=True)
class ParsedItem:
    """One item: the name as written, its pattern, its options by key (a range as a tuple), and the item's own text."""

    name: str
    pattern: str | None
    options: dict[str, OptionValue]
    text: str


def split_items(text: str) -> list[str]:
    """Split at commas outside parentheses; empty items are refused, an empty text has none."""
    if not text.strip():
        return []
    depth, start, items = 0, 0, []
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == "," and depth == 0:
            items.append(text[start:position].strip())
            start = position + 1
    items.append(text[start:].strip())
    if depth != 0:
        raise InputError(f"hparams {text!r} has an unmatched parenthesis. Write for example 'dropout(shared)'.")
    if not all(items):
        raise InputError(f"hparams {text!r} has an empty item: a comma too many. Write for example 'dropout,cutout'.")
    return items


def parse_item(text: str) -> ParsedItem:
    """Parse `name[@pattern][(options)]`; InputError where the text is not of this form."""
    match = _ITEM.match(text.strip())
    if match is None or not match["name"]:
        raise InputError(f"{text!r} is not of the form name, name@pattern or name@pattern(option, key=value).")
    pattern = match["pattern"]
    if pattern is not None and not patterns.is_valid(pattern):
        raise InputError(
            f"{text!r}: {pattern!r} is not a pattern. Write the qualified name of a module with * for any characters "
            f"within one segment, for example 'dropout@layer4.*'."
        )
    options: dict[str, OptionValue] = {}
    for option in (match["options"] or "").split(","):
        if option.strip():
            key, value = _parse_option(option, text)
            if key in options:
                raise InputError(f"{text!r} sets {key!r} twice. Keep one of the two.")
            options[key] = value
    return ParsedItem(match["name"], pattern, options, text.strip())


def _parse_option(option: str, text: str) -> tuple[str, OptionValue]:
    """`flag` (true), `key=number`, `key=true|false` or `key=low..high`."""
    key, equals, value = (part.strip() for part in option.partition("="))
    if not equals:
        if key.rpartition(".")[2] in NUMBERS:
            raise InputError(f"{text!r}: option {key!r} has no value. Write {key}=VALUE or {key}=LOW..HIGH.")
        return key, True
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    try:
        if ".." in value:
            low, _, high = value.partition("..")
            return key, (float(low), float(high))
        return key, float(value)
    except ValueError:
        raise InputError(
            f"{text!r}: {key}={value} is not a number, a range LOW..HIGH, or true/false. Write for example "
            f"initial=0.1 or length=2..16."
        ) from None
