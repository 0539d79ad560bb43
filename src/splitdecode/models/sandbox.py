"""F3: a Jinja environment for templates nobody has vouched for: no escape, and bounds on what they may compute.

Jinja's own sandbox blocks attribute escapes. What it leaves open is arithmetic: `'A' * 3e8`, doubling a string forty
times, loops in loops. Here every operation that can make something long asks the Meter first:

    loops, calls, range()      Meter.tick    steps of one rendering, and a deadline
    strings built              Meter.size    the longest string, and the sum of all

Loops and `~` are reached by rewriting the syntax tree (`for x in y` -> `for x in y|_looped`), operators and calls by
Jinja's sandbox hooks, filters by an allow-list in which those that amplify are replaced. The deadline is looked at in
every step; one step is short because its operands are.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

from splitdecode.models.widths import parts_of, wide_format, wide_percent

MAX_TEXT = 4 << 20  # characters of one string
MAX_VOLUME = 64 << 20  # characters of all strings built in one rendering
MAX_STEPS = 1_000_000  # of one rendering: a loop turn or a member of a range() is one step
MAX_SECONDS = 5.0
_CALL_STEPS = 8  # a call of a macro takes about as long as so many turns of a loop
_FILTER_STEPS = 3  # and a filter or a test as long as so many

_STRING_METHODS = frozenset(
    """
    capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal isdigit
    islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind
    rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
    """.split()  # noqa: SIM905
)
_METHODS: dict[type, frozenset[str]] = {
    str: _STRING_METHODS,
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"count", "index", "copy"}),
    tuple: frozenset({"count", "index"}),
}
_FILTERS = frozenset(
    """
    abs capitalize count d default dictsort escape e first float groupby int items last length list lower map max min
    reject rejectattr reverse select selectattr sort title trim truncate unique upper wordcount
    """.split()  # noqa: SIM905
)
# Filters and tests that look no deeper into a list than its own members: their arguments need no weighing.
_SHALLOW = frozenset(
    """
    abs boolean callable count d default defined divisibleby even false first float int integer items iterable last
    length list map mapping none number odd reject rejectattr reverse sameas select selectattr sequence string true
    undefined
    """.split()  # noqa: SIM905
)


class Meter:
    """What one rendering has used. Raises SecurityError when it is too much."""

    def __init__(self) -> None:
        self.steps = 0
        self.volume = 0
        self.until = time.monotonic() + MAX_SECONDS

    def tick(self, steps: int = 1) -> None:
        """Counts steps (at least one)."""
        self.steps += max(steps, 1)
        if self.steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} steps of loops, calls and range()")
        if time.monotonic() > self.until:
            raise SecurityError(f"more than {MAX_SECONDS:g} s")

    def size(self, characters: int) -> None:
        """Counts a string about to be built."""
        if characters > MAX_TEXT:
            raise SecurityError(f"a string of {characters} characters, more than {MAX_TEXT}")
        self.volume += characters
        if self.volume > MAX_VOLUME:
            raise SecurityError(f"more than {MAX_VOLUME} characters of strings in all")

    def weight(self, value: object, depth: int = 0) -> int:
        """About how many characters `value` takes when written out."""
        if isinstance(value, str):
            return len(value)
        parts = parts_of(value)
        if parts is None:
            return 32 if not isinstance(value, int) else value.bit_length() // 3 + 2
        if depth > 64:
            raise SecurityError("data nested more than 64 deep")
        self.tick(len(parts))
        total = 0
        for part in parts:
            total += self.weight(part, depth + 1) + 8
            if total > MAX_TEXT:
                break
        return total

    def light(self, value: Any) -> Any:
        """`value` itself, unless it is data whose walk (to compare, sort or print it) would not end soon."""
        if parts_of(value) is not None and self.weight(value) > MAX_TEXT:
            raise SecurityError(f"data of more than {MAX_TEXT} characters")
        return value


class Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here its body is simply rendered."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja says set and only reads

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Puts loops and `~` under the meter."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("a recursive loop")
        self.generic_visit(node)
        node.iter = self._filter(node.iter, "_looped")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=self._environment)
        return self._filter(parts, "_joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._filter(node.expr, "_light")
        for operand in node.ops:
            operand.expr = self._filter(operand.expr, "_light")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(node, "_counted") if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        if node.attr.startswith("_"):
            raise SecurityError(f"a namespace attribute {node.attr}")
        return node

    def _filter(self, value: nodes.Node, name: str) -> nodes.Filter:
        return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno, environment=self._environment)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment. Set `meter` before each rendering; one rendering at a time."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        self.meter = Meter()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, loopcontrols],
            finalize=self._text,
            cache_size=0,
        )
        kept = {name: self._metered(name, self.filters[name]) for name in _FILTERS}
        own: dict[str, Callable[..., Any]] = {
            "_counted": self._counted,
            "_light": lambda value: self.meter.light(value),
            "_looped": self._looped,
            "_joined": lambda parts: self._join("", parts),
            "center": lambda text, width=80: self._string_method(str(text), "center", (width,), {}),
            "format": lambda text, *args, **kwargs: self._percent(str(text), kwargs or args),
            "indent": self._indent,
            "join": lambda parts, d="", attribute=None: self._join(str(d), self._attributes(parts, attribute)),
            "replace": lambda text, old, new, count=-1: self._replace(self._text(text), str(old), str(new), count),
            "round": self._round,
            "safe": lambda value: value,
            "string": self._text,
            "tojson": self._tojson,
        }
        self.filters = kept | own
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._metered(name, test) for name, test in tests.items()}
        self.globals = {
            "range": self._range,
            "dict": lambda *pairs, **named: dict(*pairs, **named),
            "namespace": self.globals["namespace"],
            "joiner": self.globals["joiner"],
            "raise_exception": self._raise_exception,
            "strftime_now": _strftime_now,
        }

    def compiled(self, source: str) -> jinja2.Template:
        """A template of this environment. Raises jinja2.TemplateError and whatever else parsing raises."""
        self.meter = Meter()
        tree = self.parse(source)
        _Metered(self).visit(tree)
        return self.from_string(tree)

    def concat(self, pieces: Iterable[str]) -> str:
        """What macros and `{% set %}` blocks assemble."""
        parts = list(pieces)
        self.meter.size(sum(map(len, parts)))
        return "".join(parts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call a template writes down."""
        __self.meter.tick(_CALL_STEPS)
        owner = getattr(__obj, "__self__", None)
        for kind, allowed in _METHODS.items():
            if isinstance(owner, kind):
                name = getattr(__obj, "__name__", "")
                if name not in allowed:
                    raise SecurityError(f"the method {kind.__name__}.{name}")
                for value in args:
                    __self.meter.light(value)
                if not isinstance(owner, str):
                    return __self._counted(super().call(__context, __obj, *args, **kwargs))
                given = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
                return __self._counted(__self._string_method(owner, name, args, given))
        if isinstance(owner, (int, float, bytes, complex)):
            raise SecurityError(f"the method {type(owner).__name__}.{getattr(__obj, '__name__', '')}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every `+`, `*`, `%` and `**`."""
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        if operator == "*":
            self._check_product(left, right)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.meter.size(len(left) + len(right))
        elif operator == "+" and isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            self.meter.tick(len(left) + len(right))
        elif (
            operator == "**"
            and isinstance(left, int)
            and (not isinstance(right, (int, float)) or left.bit_length() * abs(right) > 4096)
        ):
            raise SecurityError("a power of more than 4096 bits")
        return super().call_binop(context, operator, left, right)

    def _check_product(self, left: Any, right: Any) -> None:
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, str):
                self.meter.size(len(value) * max(times, 0))
            elif isinstance(times, int) and isinstance(value, (list, tuple)):
                self.meter.tick(len(value) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
            raise SecurityError("a product of more than 4096 bits")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format and str.format_map: Jinja exchanges them as soon as a template looks them up."""
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") not in ("format", "format_map"):
            return None
        return lambda *args, **kwargs: self._format(owner, *args, **kwargs)  # written out it is short, as a partial not

    def _format(self, text: str, /, *args: Any, **kwargs: Any) -> str:
        if wide_format(text):
            raise SecurityError("a width taken from the arguments, or of four digits, in str.format")
        self.meter.size(len(text) + text.count("{") * (self.meter.weight([*args, *kwargs.values()]) + 1000))
        return SandboxedFormatter(self).vformat(text, args, kwargs)

    def _string_method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "replace":
            return self._replace(text, *args, **kwargs)
        if name == "join":
            return self._join(text, *args)
        if name in ("center", "ljust", "rjust", "zfill"):
            self.meter.size(max(len(text), *(value for value in args[:1] if isinstance(value, int))))
        elif name == "expandtabs":
            tab = next(iter([*args, *kwargs.values()]), 8)
            self.meter.size(len(text) + text.count("\t") * max(int(tab), 0))
        return getattr(text, name)(*args, **kwargs)

    def _replace(self, text: str, old: str, new: str, count: int | None = -1) -> str:
        times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        self.meter.size(len(text) + times * max(len(new) - len(old), 0))
        return text.replace(old, new, times)

    def _join(self, between: str, parts: Iterable[Any]) -> str:
        texts = [part if isinstance(part, str) else self._text(part) for part in self._looped(parts)]
        self.meter.size(sum(map(len, texts)) + len(between) * max(len(texts) - 1, 0))
        return between.join(texts)

    def _attributes(self, parts: Iterable[Any], attribute: str | int | None) -> Iterable[Any]:
        return parts if attribute is None else [self.getitem(part, attribute) for part in parts]

    def _percent(self, text: str, right: Any) -> str:
        if wide_percent(text):
            raise SecurityError("a width taken from the arguments, or of four digits, in %")
        self.meter.size(len(text) + text.count("%") * (self.meter.weight(right) + 1000))
        formatted: str = text % right
        return formatted

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self._text(text)
        each = width if isinstance(width, int) else len(width)
        self.meter.size(len(text) + (text.count("\n") + 1) * max(each, 0))
        return str(jinja2.filters.do_indent(text, width, first, blank))

    def _round(self, value: float, precision: int = 0, method: Any = "common") -> float:
        if abs(precision) > 100:
            raise SecurityError(f"round to {precision} digits")
        return jinja2.filters.do_round(value, precision, method)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """transformers' tojson: plain JSON, without HTML escapes."""
        if (isinstance(indent, int) and indent > 16) or (isinstance(indent, str) and len(indent) > 16):
            raise SecurityError("an indent of more than 16")
        if separators is not None and sum(map(len, separators)) > 16:
            raise SecurityError("separators of more than 16 characters")
        self.meter.size(self.meter.weight(value))
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self.meter.size(len(text))
        return text

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            self.meter.size(self.meter.weight(value))
        return str(value)

    def _raise_exception(self, message: object) -> None:
        raise jinja2.TemplateError(self._text(message)[:1000])

    def _range(self, *bounds: int) -> range:
        found = range(*bounds)
        try:
            self.meter.tick(len(found))
        except OverflowError:
            raise SecurityError("a range() without end") from None
        return found

    def _looped(self, values: Any) -> Any:
        """What a loop runs over, every turn counted; things with a length keep it, for loop.length and loop.last."""
        if isinstance(values, Sized):
            self.meter.tick(len(values))
            return values
        return self._turns(values)

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.meter.tick()
            yield value

    def _counted(self, value: Any) -> Any:
        if isinstance(value, str):
            self.meter.size(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.meter.tick(len(value))
        return value

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        deep = name not in _SHALLOW

        @functools.wraps(function)  # keeps Jinja's pass_environment mark, which lies in __dict__
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick(_FILTER_STEPS)
            if deep:
                for value in (*args, *kwargs.values()):
                    self.meter.light(value)
            return self._counted(function(*args, **kwargs))

        return metered


def _strftime_now(form: str) -> str:
    if len(form) > 256 or re.search(r"%[^A-Za-z%]*\d", form):
        raise SecurityError("a width in strftime_now, or a format of more than 256 characters")
    return datetime.now().strftime(form)
