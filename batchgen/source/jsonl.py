"""JSONL: one JSON object a line. Rows are physical lines; blank ones are skipped.

Invariant: a bad line costs that row and no other. Error texts name the file, the line (from 1)
and the reason, never the line's content, which may be private.

When a key appears twice in an object, the last one wins, as in every JSON library here. Keys
that are not in the plan's columns are not carried; name a rare one in `types` to carry it.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import orjson

from batchgen.core.errors import SourceError
from batchgen.core.records import RowError
from batchgen.source.columns import infer_field, is_too_deep, kind_word, override
from batchgen.source.reading import Rows, make_batch, shape_of, to_arrays, to_values
from batchgen.source.text import (
    MAX_LINE_BYTES,
    digest_prefix,
    is_seekable,
    iter_lines,
    read_lines,
    refuse_other_content,
    scan_lines,
    scan_rows,
    text_looks_like,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import pyarrow as pa

    from batchgen.core.records import Ranges, RowBatch
    from batchgen.source.reading import ReadSpec, Shape
    from batchgen.source.text import Scan

SAMPLE_FILES = 20
SAMPLE_ROWS = 1000
SNIFF_LINES = 20

# From here on, a float may be an integer that orjson could not hold (it goes to 2**64 - 1).
_BIG = float(2**63)
_MAYBE_BIG = frozenset({float, list, dict})
_MISSING: dict[str, Any] = {}


class JsonlReader:
    """See `Reader`."""

    def sniff(self, path: str) -> None:
        """See `Reader`."""
        refuse_other_content(path)
        lines = _sample(path, SNIFF_LINES)
        if any(type(_parse_line(line)) is dict for line in lines):
            return
        looks = text_looks_like(lines[0] or b"") if lines else None
        if looks is None and len(lines) < SNIFF_LINES:
            return  # too little to judge by; the rows become errors
        text = f"not JSONL? it looks like {looks or 'plain text'}, expected one JSON object a line"
        raise SourceError(path, text)

    def columns(self, paths: Sequence[str], types: Mapping[str, str]) -> pa.Schema:
        """See `Reader`. Looks at the first 1,000 rows of each of the first 20 files."""
        samples: dict[str, list[Any]] = {}
        for path in paths[:SAMPLE_FILES]:
            for line in _sample(path, SAMPLE_ROWS):
                value = _parse_exact(line)
                if not isinstance(value, RowError):
                    for name, item in value.items():
                        samples.setdefault(name, []).append(item)
        found = {name: infer_field(name, values) for name, values in samples.items()}
        return override(found, types, paths[0], may_add=True)

    def scan(self, path: str, on_rows: Callable[[bytes], object] | None = None) -> Scan:
        """See `Reader`."""
        return scan_lines(path) if on_rows is None else scan_rows(path, on_rows)

    def digest_prefix(self, path: str, size_bytes: int) -> str:
        """See `Reader`."""
        return digest_prefix(path, size_bytes)

    def read(self, path: str, segment: int, todo: Ranges, spec: ReadSpec) -> Iterator[RowBatch]:
        """See `Reader`. Rows that are not in `todo` are not parsed."""
        shape = shape_of(segment, spec)
        for rows, lines in read_lines(path, todo, spec.batch_rows, indexes=spec.line_indexes):
            yield make_batch(shape, _parse(path, rows, lines, shape, spec.columns))

    def is_seekable(self, path: str) -> bool:
        """See `Reader`."""
        return is_seekable(path)


def _sample(path: str, num_lines: int) -> list[bytes | None]:
    """The first non-blank lines."""
    lines = (line for line in iter_lines(path) if line is None or line.strip())
    return list(islice(lines, num_lines))


def _parse(
    path: str, rows: list[int], lines: list[bytes | None], shape: Shape, schema: pa.Schema
) -> Rows:
    blank = [
        row for row, line in zip(rows, lines, strict=True) if line is not None and not line.strip()
    ]
    if blank:
        gone = set(blank)
        lines = [line for row, line in zip(rows, lines, strict=True) if row not in gone]
        rows = [row for row in rows if row not in gone]
    parsed = [_parse_line(line) for line in lines]
    errors = {at: value for at, value in enumerate(parsed) if isinstance(value, RowError)}
    objects = [_MISSING if isinstance(value, RowError) else value for value in parsed]
    columns, unread = _exact_columns(objects, lines, {*shape.table_columns, *shape.needed})
    errors |= unread
    for at, bad in errors.items():
        errors[at] = RowError(bad.error_type, f"{path}:{rows[at] + 1}: {bad.error}")
    tested = {name: columns[name] for name in shape.table_columns}
    arrays, misfits = to_arrays(tested, schema, lambda at: f"{path}:{rows[at] + 1}")
    values = to_values(columns, shape.needed, len(rows))
    return Rows(rows, values, arrays, misfits | errors, blank)


def _parse_line(line: bytes | None) -> dict[str, Any] | RowError:
    if line is None:
        return RowError("line_too_long", f"line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return RowError("bad_json", f"invalid JSON: {_why(line, error)}")
    if type(value) is not dict:
        return RowError("not_an_object", f"expected a JSON object, found {kind_word(value)}")
    return value


def _why(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as bad:  # orjson gives no position for this one
        return f"not UTF-8, byte {bad.start + 1}"
    return f"{error.msg}, column {error.colno}"


def _parse_exact(line: bytes | None) -> dict[str, Any] | RowError:
    """As `_parse_line`, with integers of any size."""
    value = _parse_line(line)
    if line is not None and type(value) is dict and _has_big_float(value):
        return _reparse(line, value)
    return value


def _reparse(line: bytes, value: Mapping[str, Any]) -> dict[str, Any] | RowError:
    """Parse what orjson parsed into `value`, slower, with integers of any size."""
    if is_too_deep(value):
        return RowError("bad_json", "invalid JSON: nested too deeply for integers over 64 bits")
    exact: dict[str, Any] = json.loads(line)
    return exact


def _has_big_float(value: object) -> bool:
    # A stack and not recursion: orjson lets 1,024 levels pass, Python's own limit is lower.
    stack = [value]
    while stack:
        item = stack.pop()
        if type(item) is float:
            if abs(item) >= _BIG:
                return True
        elif type(item) is dict:
            stack.extend(item.values())
        elif type(item) is list:
            stack.extend(item)
    return False


def _exact_columns(
    objects: Sequence[Mapping[str, Any]], lines: Sequence[bytes | None], names: Iterable[str]
) -> tuple[dict[str, list[Any]], dict[int, RowError]]:
    """Turn objects into columns, putting back integers that orjson made floats of.

    Looking at columns and not at objects is what makes the search cheap: most hold only strings.

    Returns:
        Name -> values, None where missing; and index -> why a row could not be read exactly.
    """
    columns = {name: [item.get(name) for item in objects] for name in names}
    suspects: set[int] = set()
    for values in columns.values():
        if _MAYBE_BIG & set(map(type, values)):
            suspects.update(at for at, value in enumerate(values) if _has_big_float(value))
    errors: dict[int, RowError] = {}
    for at in suspects:
        exact = _reparse(lines[at] or b"", objects[at])
        if isinstance(exact, RowError):
            errors[at], exact = exact, {}
        for name, values in columns.items():
            values[at] = exact.get(name)
    return columns, errors
