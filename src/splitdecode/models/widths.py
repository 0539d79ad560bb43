"""F3: how long the texts get that a template asks for: by the widths in a format string, by what values hold."""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from string import Formatter
from typing import Any

from jinja2.utils import Namespace

_DIRECTIVE = re.compile(r"[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?.?", re.DOTALL)  # of %, behind its key


def wide_percent(text: str) -> bool:
    """Whether a text for `%` has a width or precision of four digits, or one that the arguments bring."""
    return any(_long(*directive) for directive in _directives(text))


def wide_format(text: str) -> bool:
    """The same of a text for str.format. Raises ValueError as that does."""
    specs = [spec for _, _, spec, _ in Formatter().parse(text) if spec]
    return any("{" in spec or _long(*re.findall(r"\d+", spec)) for spec in specs)


def _directives(text: str) -> Iterator[tuple[str, str]]:
    """Width and precision of each directive of a text for `%`, as they stand there. A key may hold parentheses."""
    at = text.find("%")
    while at >= 0:
        at, depth = at + 1, 0
        while at < len(text) and (depth or text[at] == "("):
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
        found = _DIRECTIVE.match(text, at)
        assert found is not None
        yield found[1], found[2] or ""
        at = text.find("%", max(found.end(), at + 1))


def _long(*numbers: str) -> bool:
    """Whether one has four digits or is taken from the arguments."""
    return any(number == "*" or len(number) >= 4 for number in numbers)


def parts_of(value: Any) -> Sequence[Any] | None:
    """What is written out where a value is, None where that is short."""
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (KeysView, ValuesView, ItemsView)):
        return list(value)
    return value if isinstance(value, (list, tuple)) else None
