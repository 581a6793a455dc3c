"""What one template render may cost: characters, steps, time; and what operations will cost.

Costs are told *before* anything is computed, since `'a' * 10**9` cannot be taken back. Invariant:
no value that a template makes weighs more than `MAX_CHARS`, however often it holds another one,
so that printing, comparing or hashing it ends in milliseconds. Knows nothing of Jinja.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, KeysView, ValuesView
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Args = Sequence[Any]

T = TypeVar("T")

MAX_CHARS = 16 << 20
"""Characters that one render may print and make on the way; some 4 million tokens."""
MAX_STEPS = 2_000_000
"""Calls, filters and turns of loops in one render."""
MAX_S = 1.5
"""Seconds of the thread's own time; the last resort where steps are unlike in cost."""
MAX_INT_BITS = 1 << 16

ITEM_CHARS = 8
"""What an item of a list counts, beside itself: the bytes of its reference."""
_MAX_WORK = 2 << 30  # Characters moved by what is quadratic: about a second.
_MAX_DIGITS = 400  # `round` computes 10**precision; no float has more digits.

_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)
_NUMBER = re.compile(r"\d+")
_SPEC = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")


class BudgetError(Exception):
    """A render costs more than it may."""


class Budget:
    """One template's means, refilled before every render. Used by one thread at a time."""

    __slots__ = ("_late_at_s", "chars", "steps", "until_s")

    def __init__(self) -> None:
        self.refill()

    def refill(self) -> None:
        """Begin a render."""
        self.chars = MAX_CHARS
        self.steps = MAX_STEPS
        self.until_s = time.monotonic() + MAX_S
        self._late_at_s: float | None = None

    def spend(self, chars: int) -> None:
        """Pay for text or items about to be made.

        Raises:
            BudgetError: They are too many.
        """
        self.chars -= chars
        if self.chars < 0:
            msg = f"the template makes more than {MAX_CHARS:,} characters"
            raise BudgetError(msg)

    def step(self) -> None:
        """Pay for one operation.

        Raises:
            BudgetError: Too many, or they take too long.
        """
        self.steps -= 1
        if self.steps < 0:
            msg = f"the template takes more than {MAX_STEPS:,} steps"
            raise BudgetError(msg)
        if time.monotonic() > self.until_s:
            self._late()

    def _late(self) -> None:
        # A machine that slept or was busy is not the template's fault: the thread's own time
        # decides, as far as it can be told without asking for it in every render.
        used_s = time.thread_time()
        if self._late_at_s is None:
            self._late_at_s = used_s
        elif used_s - self._late_at_s > MAX_S / 2:
            msg = f"the template takes longer than {MAX_S:g} s"
            raise BudgetError(msg)

    def charge(self, made: T) -> T:
        """Pay for what a call made, and return it."""
        kind = type(made)
        if kind is int:
            _check_int(made.bit_length())  # type: ignore[attr-defined]
        elif isinstance(made, str | bytes):
            self.spend(len(made))
        elif isinstance(made, _CONTAINERS):
            self.spend(weigh(made))
        return made

    def hold(self, made: T) -> T:
        """Pay for a new list of old things, whose texts are paid already, and return it."""
        if isinstance(made, _CONTAINERS):
            self.spend(ITEM_CHARS * len(made))
            weigh(made)
            return made
        return self.charge(made)


def weigh(value: object) -> int:
    """Characters of a value, each as often as it would be printed.

    Raises:
        BudgetError: More than any value may weigh.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        return 1
    total = ITEM_CHARS * len(value)
    for item in value:
        total += weigh(item)
        if isinstance(value, dict):
            total += weigh(value[item])
        if total > MAX_CHARS:
            msg = f"the template makes more than {MAX_CHARS:,} characters"
            raise BudgetError(msg)
    return total


def _check_int(num_bits: int) -> None:
    if num_bits > MAX_INT_BITS:
        msg = f"the template makes a number of more than {MAX_INT_BITS:,} bits"
        raise BudgetError(msg)


def operator_cost(operator: str, left: Any, right: Any) -> int:  # noqa: ANN401 - any operands
    """Characters that `left operator right` makes.

    Raises:
        BudgetError: A number of far too many digits.
    """
    if isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            _check_int(left.bit_length() + right.bit_length())
        elif operator == "**":
            _check_int(left.bit_length() * max(right, 0))
        return 0
    if operator == "*":
        if isinstance(right, int):
            left, right = right, left
        if isinstance(left, int) and isinstance(right, str | bytes | list | tuple):
            return max(left, 0) * max(weigh(right), 1)
    elif operator == "%" and isinstance(left, str | bytes):
        return format_cost(left, right)
    elif operator == "+" and isinstance(left, str | bytes) and isinstance(right, str | bytes):
        return len(left) + len(right)
    return 0


def format_cost(template: str | bytes, values: object) -> int:
    """Characters that `template % values` makes at most."""
    text = template.decode("latin-1") if isinstance(template, bytes) else template
    found = _SPEC.findall(text)
    if any("*" in spec for spec in found):
        msg = "the template takes the width of a format from a value"
        raise BudgetError(msg)
    widths = sum(_sum_of_numbers(" ".join(spec)) for spec in found)
    # Of a mapping, each value may be printed by every spec.
    if isinstance(values, dict):
        size = len(found) * max(map(weigh, values.values()), default=0)
    else:
        size = weigh(values)
    # `%r` writes up to ten characters for one, all of them ASCII: the memory of 2.5.
    return len(text) + widths + size * (3 if "r" in text or "a" in text else 1)


def spec_cost(spec: str) -> int:
    """Characters that a format spec such as `>80` pads to at most."""
    return _sum_of_numbers(spec)


def _sum_of_numbers(text: str) -> int:
    # More digits are over any budget, and int() of a million digits is a bomb of its own.
    return sum(
        int(number[-10:]) + (len(number) > 10) * MAX_CHARS for number in _NUMBER.findall(text)
    )


def _largest(args: Args) -> int:
    return max((abs(arg) for arg in args if isinstance(arg, int)), default=0)


def _pad(_: object, args: Args) -> int:
    return _largest(args)


def _pad_items(_: object, args: Args) -> int:
    return 8 * ITEM_CHARS * _largest(args)  # A list each, for `slice`.


def _per_line(value: object, args: Args) -> int:
    lines = 1 + (value.count("\n") if isinstance(value, str) else weigh(value))
    return lines * max(_largest(args), *(weigh(arg) for arg in args), 0, 0)


def _per_tab(value: Any, args: Args) -> int:  # noqa: ANN401 - str or bytes
    tab = "\t" if isinstance(value, str) else b"\t"
    return int(value.count(tab) * (_largest(args) or 8))


def _json(value: object, args: Args) -> int:
    return weigh(value) * (1 + _largest(args))


def _round(_: object, args: Args) -> int:
    return MAX_CHARS + 1 if _largest(args) > _MAX_DIGITS else 0


def _replace(value: Any, args: Args) -> int:  # noqa: ANN401
    if len(args) < 2 or not isinstance(value, str | bytes):
        return weigh(value)
    old: Any
    new: Any
    old, new = (str(arg) if isinstance(value, str) else arg for arg in args[:2])
    times = value.count(old)
    return int(times * max(len(new) - len(old), 0))


def _translate(value: Any, args: Args) -> int:  # noqa: ANN401 - str or bytes
    table = args[0] if args else None
    values = table.values() if isinstance(table, dict) else ()
    return len(value) * max(map(weigh, values), default=1)


def _to_characters(value: object, _: Args) -> int:
    return ITEM_CHARS * len(value) if isinstance(value, str | bytes) else 0


def _to_words(value: Any, args: Args) -> int:  # noqa: ANN401 - any value
    if not isinstance(value, str | bytes):
        return 0
    separator = args[0] if args else None
    if separator and type(separator) is type(value):
        text: Any = value
        return ITEM_CHARS * int(text.count(separator))
    if isinstance(value, str) and value.isascii():
        return ITEM_CHARS * sum(map(value.count, " \n\t\r\v\f\x1c\x1d\x1e\x1f"))
    return ITEM_CHARS * len(value) // 2


def _quadratic(num_times: int, num_chars: int) -> int:
    return MAX_CHARS + 1 if num_times * num_chars > _MAX_WORK else 0


def _tags(value: object, _: Args) -> int:
    return _quadratic(value.count("<"), len(value)) if isinstance(value, str) else 0


def _wrap(value: object, args: Args) -> int:
    width = next((arg for arg in args if type(arg) is int), 79)
    separators = sum(weigh(arg) for arg in args if isinstance(arg, str))
    size = weigh(value)
    return _quadratic(size // max(width, 1), size) + size // max(width, 1) * separators


def _whole(value: object, _: Args) -> int:
    return _quadratic(weigh(value) // 8, weigh(value))


def _sum(_: object, args: Args) -> int:
    # To add up lists copies what there is so far, for each of them.
    return MAX_CHARS + 1 if any(isinstance(arg, list | tuple) for arg in args) else 0


METHOD_COSTS: Mapping[str, Callable[[Any, Args], int]] = {
    "center": _pad,
    "expandtabs": _per_tab,
    "join": lambda value, args: len(value) * len(args[0]) + weigh(args[0]),
    "ljust": _pad,
    "replace": _replace,
    "rjust": _pad,
    "rsplit": _to_words,
    "split": _to_words,
    "splitlines": _to_words,
    "striptags": _tags,
    "to_bytes": _pad,
    "translate": _translate,
    "zfill": _pad,
}
"""Method of str, bytes and int -> characters that it makes beyond those of the text it is of.

What is not listed makes no more than its operands hold.
"""

FILTER_COSTS: Mapping[str, Callable[[Any, Args], int]] = {
    "batch": _pad_items,
    "center": _pad,
    "format": lambda value, args: format_cost(str(value), args),
    "groupby": _to_characters,
    "indent": _per_line,
    "list": _to_characters,
    "pprint": _whole,
    "replace": _replace,
    "round": _round,
    "slice": _pad_items,
    "sort": _to_characters,
    "striptags": _tags,
    "sum": _sum,
    "tojson": _json,
    "unique": _to_characters,
    "urlize": _whole,
    "wordcount": _to_words,
    "wordwrap": _wrap,
}
"""The same, by filter."""
