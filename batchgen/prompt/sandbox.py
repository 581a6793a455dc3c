"""Templates whose rows cannot fill the memory or run for ever.

The job's author is trusted, what rows hold is not (docs/threat-model.md): `{{ a * n }}` and
`{{ text|center(n) }}` are honest, and a row may say n = 10**9. So what a value can make large pays
before it is computed, for `'a' * 10**9` cannot be taken back. Against the author
there is only what Jinja brings: its immutable sandbox.

Rendering stays in process, because a child per row would cost more than the engine.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import math
import re
import time
from collections.abc import ItemsView, Iterator, KeysView, Sized, ValuesView
from decimal import Decimal
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jinja2 import (
    ChainableUndefined,
    StrictUndefined,
    TemplateSyntaxError,
    Undefined,
    meta,
    nodes,
    pass_context,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

from batchgen.core.data import NotText, NotTextError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from jinja2.runtime import Context

    Render = Callable[[dict[str, Any]], str]
    Cost = Callable[[Any, Sequence[Any]], int]
    """The value that a filter or method is applied to, its arguments -> characters it makes."""

MAX_CHARS = 16 << 20
"""Characters that one render may print and make on the way; some 4 million tokens."""
MAX_STEPS = 2_000_000
"""Calls, filters and turns of loops in one render."""
MAX_S = 1.5
"""Seconds of the thread's own time in one render, where steps are unlike in cost."""
MAX_INT_BITS = 1 << 16

_TOO_MANY_CHARS = f"makes more than {MAX_CHARS:,} characters"
_TOO_MANY_STEPS = f"takes more than {MAX_STEPS:,} steps"
_TOO_LONG = f"takes longer than {MAX_S:g} s"
_TOO_MANY_BITS = f"makes a number of more than {MAX_INT_BITS:,} bits"
_WIDTH_OF_VALUE = "takes the width of a format from a value"
_ITEM_CHARS = 8  # An item of a list counts, beside itself, the bytes of its reference.
_MAX_WORK = 2 << 30  # Characters moved by what is quadratic: about a second.
_STEPS_BETWEEN_LOOKS = 16  # At the clock, which costs as much as ten steps.
_FEW_PARTS = 64
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)
_SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]
_NUMBER = re.compile(r"\d+")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")

# These answer with what exists already, or in constant space.
_FREE_FILTERS = frozenset(
    {"length", "count", "default", "d", "first", "last", "attr", "map", "select", "reject"}
    | {"selectattr", "rejectattr"}
)
# A prompt is a function of its row: neither chance nor the clock has a say.
_BANNED_FILTERS = ("random",)
_BANNED_GLOBALS = ("lipsum",)
_CLOCK = frozenset({"now", "today", "utcnow"})
_OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class BudgetError(Exception):
    """A render costs more than it may."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the template {why}")


class NullPrintedError(Exception):
    """A template prints a null."""


def _check_int(num_bits: int) -> None:
    if num_bits > MAX_INT_BITS:
        raise BudgetError(_TOO_MANY_BITS)


def _weigh(value: object) -> int:
    """Count the characters of a value as it is printed, each as often as it is."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        return 1
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return _ITEM_CHARS * len(value) + sum(map(_weigh, items))


def _sum_of_numbers(text: str) -> int:
    # More digits are over any budget, and int() of a million digits is a bomb of its own.
    return sum(int(found[:10]) + (len(found) > 10) * MAX_CHARS for found in _NUMBER.findall(text))


def _largest(args: Iterable[object]) -> int:
    """Return the largest number among arguments, or length of a text if that is more."""
    return max((abs(a) if isinstance(a, int) else _weigh(a) for a in args), default=0)


def _operator_cost(operator: str, left: Any, right: Any) -> int:  # noqa: ANN401 - any operands
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            _check_int(left.bit_length() * max(right, 0))
        elif operator == "*":
            _check_int(left.bit_length() + right.bit_length())
        return 0
    if operator == "%":
        return _percent_cost(left, right) if isinstance(left, str | bytes) else 0
    if operator == "*":
        times, value = (left, right) if isinstance(left, int) else (right, left)
        return max(times, 0) * max(_weigh(value), 1) if isinstance(times, int) else 0
    both_text = isinstance(left, str | bytes) and isinstance(right, str | bytes)
    return len(left) + len(right) if both_text else 0


def _percent_cost(template: str | bytes, values: object) -> int:
    """Count the characters that `template % values` makes at most."""
    text = template.decode("latin-1") if isinstance(template, bytes) else template
    found = _PERCENT.findall(text)
    if any("*" in spec for spec in found):
        raise BudgetError(_WIDTH_OF_VALUE)
    widths = sum(_sum_of_numbers(" ".join(spec)) for spec in found)
    # Of a mapping, each value may be printed by every spec.
    if isinstance(values, dict):
        return len(text) + widths + len(found) * _largest(values.values())
    return len(text) + widths + _weigh(values)


def _quadratic(num_times: int, value: object) -> int:
    return MAX_CHARS + 1 if num_times * _weigh(value) > _MAX_WORK else 0


def _joined(value: object, args: Sequence[object]) -> int:
    """Of items and what comes between them, a filter is given these first, a method that."""
    other = args[0] if args else ""
    return _size(value) * _size(other) + _weigh(value) + _weigh(other)


def _size(value: object) -> int:
    return len(value) if isinstance(value, Sized) else 1


def _words(value: Any, args: Sequence[Any]) -> int:  # noqa: ANN401
    separators = args[:1] if args and isinstance(args[0], str) and args[0] else _SPACES
    return _ITEM_CHARS * sum(map(str(value).count, separators))


def _replaced(value: Any, args: Sequence[Any]) -> int:  # noqa: ANN401
    old, new = (*map(str, args[:2]), "", "")[:2]
    return str(value).count(old) * max(len(new) - len(old), 0)


_COSTS: Mapping[str, Cost] = {
    "batch": lambda _, args: _ITEM_CHARS * _largest(args),
    "center": lambda _, args: _largest(args),
    "expandtabs": lambda value, args: value.count("\t") * (_largest(args) or 8),
    "format": lambda value, args: _percent_cost(str(value), tuple(args)),
    "indent": lambda value, args: (str(value).count("\n") + 1) * (_largest(args) or 4),
    "join": _joined,
    "list": lambda value, _: _ITEM_CHARS * _size(value),
    "ljust": lambda _, args: _largest(args),
    "replace": _replaced,
    "rjust": lambda _, args: _largest(args),
    "round": lambda _, args: _largest(args) << 15,  # It computes 10**precision.
    "rsplit": _words,
    "slice": lambda _, args: 8 * _ITEM_CHARS * _largest(args),  # A list each.
    "split": _words,
    "splitlines": _words,
    "striptags": lambda value, _: _quadratic(str(value).count("<"), value),
    "to_bytes": lambda _, args: _largest(args),
    "tojson": lambda value, args: _weigh(value) * (1 + _largest(args)),
    "wordcount": _words,
    "wordwrap": lambda value, args: _quadratic(_weigh(value) // (_largest(args) or 79), value),
    "zfill": lambda _, args: _largest(args),
}
"""Filter, or method of text and numbers -> what it makes beyond the text that it is given.

What is not listed makes little more than its operands hold.
"""


class _Null:
    """A column's null inside a template: may be tested, not printed.

    `{% if x %}`, `x is none` and `x or "unknown"` do what they should; anything that would turn
    the null into text raises, so that the word "None" never gets into a prompt.
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or other is self

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise NullPrintedError

    __repr__ = __str__
    __format__ = __iter__ = __len__ = __getitem__ = __add__ = __radd__ = __call__ = (
        lambda self, *_: str(self)
    )


NULL = _Null()


class _Undefined(ChainableUndefined, StrictUndefined):
    """What is absent: `row.x.y|default('none')` may ask on; printed as an item it raises, too."""

    __slots__ = ()
    __repr__ = StrictUndefined.__str__


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002 - Jinja's
    """Jinja's filter, for which a null is as absent as what is not there."""
    is_absent = value is None or value is NULL or isinstance(value, Undefined)
    return default_value if is_absent or (boolean and not value) else value


def _to_json(
    value: Any,  # noqa: ANN401
    indent: int | str | None = None,
    *,
    ensure_ascii: bool = False,
    sort_keys: bool = True,
    separators: tuple[str, str] | None = None,
) -> str:
    """Write JSON as `json.dumps` does, but as a person would: letters and signs as they are.

    Jinja's own filter is for HTML. Dates are ISO 8601, decimal numbers numbers with all their
    digits, UUIDs texts, NumPy's values Python's.
    """
    quote = encode_basestring_ascii if ensure_ascii else encode_basestring
    comma, colon = separators or ("," if indent is not None else ", ", ": ")
    step = " " * indent if isinstance(indent, int) else indent

    def written(value: Any, margin: str) -> str:  # noqa: ANN401
        inner = "" if step is None else margin + step
        match value:
            case str():
                return quote(value)
            case Decimal():
                return str(value)
            case None | bool() | int() | float():
                return json.dumps(value)
            case dict():
                items = sorted(value.items()) if sort_keys else value.items()
                signs = ("{", "}")
                parts = [f"{quote(_json_key(k))}{colon}{written(v, inner)}" for k, v in items]
            case list() | tuple():
                signs = ("[", "]")
                parts = [written(item, inner) for item in value]
            case _:
                return written(_as_json(value), margin)
        start, end = signs
        if step is None or not parts:
            return f"{start}{comma.join(parts)}{end}"
        return f"{start}{inner}{f'{comma}{inner}'.join(parts)}{margin}{end}"

    return written(value, "\n")


def _json_key(key: object) -> str:
    return key if isinstance(key, str) else json.dumps(key)


def _as_json(value: Any) -> Any:  # noqa: ANN401
    """What JSON has for a value of another type."""
    match value:
        case _Null():
            return None
        case dt.date() | dt.time():
            return value.isoformat()
        case dt.timedelta() | UUID() | Undefined():  # Of which the last one raises.
            return str(value)
        case NotText():
            raise NotTextError
        case bytes():
            return value.decode()
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is not JSON")
    return value.tolist()  # NumPy's.


def _asked_on(value: Any) -> Any:  # noqa: ANN401
    """What a null has inside is absent, and printed it is the null."""
    return _Undefined(exc=NullPrintedError) if value is NULL else value  # type: ignore[arg-type]


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles one template and renders it within its limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=_Undefined, optimized=False, keep_trailing_newline=False)
        self._refill()
        self.finalize = self._printed
        self.concat = _put_together  # type: ignore[method-assign]
        for name in _BANNED_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _to_json, "default": _default, "d": _default}
        for name, function in list(self.filters.items()):
            if name not in _FREE_FILTERS:
                self.filters[name] = self._paying(name, function)
        self.filters |= {_TURN: lambda _: self._step(), _CONCAT: self._concat}
        self.tests["none"] = lambda value: value is None or value is NULL
        self.names = {k: v for k, v in self.globals.items() if k not in _BANNED_GLOBALS}
        self.globals = {}  # So that a column may have the name of a global.

    def compile_template(self, source: str) -> tuple[Render, frozenset[str]]:
        """Return how to render a template, and the names that it looks up.

        Raises:
            TemplateSyntaxError: It is no template, or wants another file.
            Exception: Whatever the compiler makes of 10,000 open brackets.
        """
        names = frozenset(meta.find_undeclared_variables(self.parse(source)))
        template = self.from_string(source, globals=self.names)
        known = {name: self.names[name] for name in names & self.names.keys()}
        root = template.root_render_func

        def render(values: dict[str, Any]) -> str:
            self._refill()
            # As `template.render(values)` does, but that copies every global three times a row.
            scope = {**known, **values} if known else values
            return _put_together(root(self.context_class(self, scope, None, template.blocks)))

        return render, names

    def getattr(self, obj: Any, attribute: str) -> Any:  # noqa: ANN401, D102
        if attribute == "decode" and isinstance(obj, str):
            # Text of binary columns came as bytes up to batchgen 0.1.0: templates may decode it.
            return lambda *_: obj
        return super().getattr(_asked_on(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:  # noqa: ANN401, D102
        return super().getitem(_asked_on(obj), argument)

    def _refill(self) -> None:
        """Begin a render."""
        self._chars = MAX_CHARS
        self._steps = MAX_STEPS
        self._until_s = math.inf

    def spend(self, chars: int) -> None:
        """Pay for text or items about to be made; raises BudgetError if they are too many."""
        self._chars -= chars
        if self._chars < 0:
            raise BudgetError(_TOO_MANY_CHARS)

    def _step(self) -> None:
        """Pay for one operation; raises BudgetError for too many, or if they take too long."""
        self._steps -= 1
        if self._steps < 0:
            raise BudgetError(_TOO_MANY_STEPS)
        if self._steps % _STEPS_BETWEEN_LOOKS == 0:
            # The thread's own: a machine that slept or was busy is not the row's fault.
            now_s = time.thread_time()
            if now_s > self._until_s:
                raise BudgetError(_TOO_LONG)
            self._until_s = min(self._until_s, now_s + MAX_S)

    def _charge(self, made: Any) -> Any:  # noqa: ANN401
        """Pay for what an operation made, and return it."""
        if isinstance(made, int):
            _check_int(made.bit_length())
        elif isinstance(made, str | bytes):
            self.spend(len(made))
        elif isinstance(made, _CONTAINERS):
            self.spend(_ITEM_CHARS * len(made))
        return made

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all(_OTHER_FILES):
            msg = f"{type(node).__name__.lower()} reads another file, which a prompt cannot"
            raise TemplateSyntaxError(msg, node.lineno)
        guarded: nodes.Template = _Guards(self).visit(tree)
        return guarded

    @pass_context
    def _printed(self, _: Context, value: object) -> object:
        if type(value) is str:
            self.spend(len(value))
            return value
        if value is None or value is NULL:
            raise NullPrintedError
        is_text = not callable(value) and not isinstance(value, Iterator)
        if not is_text and not isinstance(value, Undefined):
            # As text they would be an address, another one in every run.
            raise TypeError(f"the template prints a {type(value).__name__}, expected text")
        self.spend(_weigh(value))
        return value

    def _concat(self, *parts: object) -> str:
        if None in parts:
            raise NullPrintedError
        self.spend(sum(map(_weigh, parts)))
        return "".join(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401, D102
        self._step()
        self.spend(_operator_cost(operator, left, right))
        if operator == "%" and isinstance(right, tuple) and None in right:
            raise NullPrintedError
        made = super().call_binop(context, operator, left, right)
        return made if isinstance(made, str | bytes) else self._charge(made)

    # Positional, and named so that no keyword of a template's call can clash.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102, N805
        name = getattr(__obj, "__name__", "")
        __self._step()
        owner = getattr(__obj, "__self__", None)
        if owner is not None and name in _CLOCK:
            raise TypeError(f"{name}() reads the clock: the prompt would differ in every run")
        if isinstance(owner, str | bytes | int) and name != "format":  # `_PayingFormatter` pays.
            _, *args = __self._paid(name, (owner, *args), kwargs)  # type: ignore[assignment]
        return __self._charge(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: ANN401
        """Wrap `str.format` and `format_map` as Jinja does, with a formatter that pays."""
        name, text = getattr(value, "__name__", ""), getattr(value, "__self__", None)
        if name not in {"format", "format_map"} or not isinstance(text, str):
            return None
        formatter = _PayingFormatter(self)

        def formatted(*args: Any, **kwargs: Any) -> str:  # noqa: ANN401
            if name == "format_map":
                (kwargs,), args = args, ()
            return formatter.vformat(str(text), args, kwargs)

        return formatted

    def _paying(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter: pays for what it will make, then for what it made."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def paying(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self._step()
            paid = self._paid(name, args[skip:], kwargs)
            return self._charge(function(*args[:skip], *paid, **kwargs))

        return paying

    def _paid(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Pay for a filter or method; returns its arguments, what it is applied to first."""
        cost = _COSTS.get(name)
        if cost is not None:
            args = [list(arg) if isinstance(arg, Iterator) else arg for arg in args]
            self.spend(cost(args[0], (*args[1:], *kwargs.values())))
        return args


class _PayingFormatter(SandboxedFormatter):
    """`str.format`, whose widths may come from values."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self._spend = sandbox.spend

    def format_field(self, value: Any, format_spec: str) -> str:  # noqa: ANN401
        if value is None:
            raise NullPrintedError
        self._spend(_sum_of_numbers(format_spec) + _weigh(value))
        text: str = super().format_field(value, format_spec)
        return text


# Filters of the guards. No template can name one: names of filters hold no blank.
_TURN = "a turn"
_CONCAT = "a concatenation"


class _Guards(NodeTransformer):
    """Wraps what Jinja compiles to plain Python: `~` and loops."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        turn = self._filter(nodes.Const(0), _TURN, node.lineno, [])
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        first, *rest = node.nodes
        return self._filter(first, _CONCAT, node.lineno, rest)

    def _filter(
        self, value: nodes.Expr, name: str, lineno: int, args: list[nodes.Expr]
    ) -> nodes.Filter:
        made = nodes.Filter(value, name, args, [], None, None, lineno=lineno)
        made.set_environment(self._sandbox)
        return made


def _put_together(parts: Iterable[str]) -> str:
    """Join what a template prints; its own text, many times in a loop, counts here."""
    parts = list(parts)
    # Few are the template's own, once each, and values that are paid.
    if len(parts) > _FEW_PARTS and sum(map(len, parts)) > MAX_CHARS:
        raise BudgetError(_TOO_MANY_CHARS)
    return "".join(parts)
