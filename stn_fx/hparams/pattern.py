"""The one rule for patterns over qualified names such as `layer4.1.dropout`.

- Pattern and name are compared segment by segment (segments are what dots separate).
- `*` stands for any characters within one segment: `layer*`, `layer4.*`.
- `**` as a segment stands for any number of segments, also none: `**.attn`.
- A pattern also selects everything below a module that it names: `layer4` selects `layer4.1.dropout`.
"""

import re
from functools import cache

_VALID = re.compile(r"^[^\s.,()@]+(\.[^\s.,()@]+)*$")


def is_valid(pattern: str) -> bool:
    """Whether a string can be a pattern: non-empty segments without blanks, commas, brackets or @."""
    return _VALID.match(pattern) is not None


def matches(pattern: str, qualified_name: str) -> bool:
    """Whether `pattern` selects `qualified_name`, by the rule of this module."""
    return _compile(pattern).match(qualified_name) is not None


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    """The rule as one regular expression over the name with a dot after each segment left to the end of the match."""
    expression = ""
    for segment in pattern.split("."):
        if segment == "**":
            expression += r"(?:[^.]+(?:\.|$))*"
        else:
            within = "[^.]*".join(re.escape(part) for part in segment.split("*"))
            # A segment ends at a dot or at the end of the name, so `layer1` does not select `layer10`.
            expression += rf"(?!$){within}(?:\.|$)"
    return re.compile("^" + expression)
