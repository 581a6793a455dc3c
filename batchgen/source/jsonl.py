"""JSONL: one JSON object a line. Rows are physical lines; blank ones are skipped.

Invariant: a bad line costs that row and no other. Error texts name the file, the line (from 1)
and the reason, never the line's content, which may be private.

A column's type follows from all values of all files: the scan counts their kinds, so that a plan
knows of a key that comes late, and of a value that is unlike those before. When a key appears
twice in an object, the last one wins, as in every JSON library here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import orjson

from batchgen.core.data import is_deeper
from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges, RowBatch, RowError
from batchgen.source.columns import BIG, MAX_DEPTH, Census, kind_word, planned
from batchgen.source.reading import Rows, make_batch, shape_of, to_arrays, to_values
from batchgen.source.sniff import refuse_other_content, text_looks_like
from batchgen.source.text import (
    MAX_LINE_BYTES,
    blank_lines,
    is_seekable,
    iter_bodies,
    lines_of,
    num_lines_of,
    read_lines,
    scan_lines,
    why_not_utf8,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pyarrow as pa

    from batchgen.source.reading import ReadSpec, Shape
    from batchgen.source.text import Lines, OnBlock, OnRows, Scan

SAMPLE_FILES = 20
SAMPLE_ROWS = 1000
SNIFF_LINES = 20

_MAYBE_BIG = frozenset({float, list, dict})
_MISSING: dict[str, Any] = {}


class JsonlReader:
    """See `Reader`."""

    def __init__(self, encoding: str | None = None) -> None:
        """Fix the encoding of the text, see `text_blocks`."""
        self._encoding = encoding

    def sniff(self, path: str) -> None:
        """See `Reader`."""
        refuse_other_content(path, self._encoding)
        lines = [line for _, line in self._sample(path, SNIFF_LINES)]
        if any(type(parse_line(line)) is dict for line in lines):
            return
        looks = text_looks_like(lines[0] or b"") if lines else None
        if looks is None and len(lines) < SNIFF_LINES:
            return  # too little to judge by; the rows become errors
        text = f"not JSONL? it looks like {looks or 'plain text'}, expected one JSON object a line"
        raise SourceError(path, text)

    def columns(self, paths: Sequence[str], types: Mapping[str, str]) -> pa.Schema:
        """See `Reader`. Looks at the first 1,000 rows of each of the first 20 files."""
        return planned(map(self._look, paths[:SAMPLE_FILES]), types, paths[0])

    def is_all_seen(self, paths: Sequence[str]) -> bool:
        """See `Reader`."""
        return len(paths) <= SAMPLE_FILES and all(
            len(self._sample(path, SAMPLE_ROWS + 1)) <= SAMPLE_ROWS for path in paths
        )

    def scan(self, path: str, on_rows: OnRows = None, on_block: OnBlock = int) -> Scan:
        """See `Reader`."""
        census = Census()

        def on_lines(row: int, lines: Sequence[bytes | None]) -> None:
            on_block()
            _count(census, range(row, row + len(lines)), lines)

        scan = scan_lines(path, on_rows, on_lines, self._encoding)
        return replace(scan, columns=census.columns)

    def read(self, path: str, segment: int, todo: Ranges, spec: ReadSpec) -> Iterator[RowBatch]:
        """See `Reader`. Rows that are not in `todo` are not parsed."""
        shape = shape_of(path, segment, spec)
        batches = read_lines(
            path, todo, spec.batch_rows, indexes=spec.line_indexes, encoding=self._encoding
        )
        for lines in batches:
            yield make_batch(shape, self._parse(path, lines, shape, spec.columns))

    def is_seekable(self, path: str) -> bool:
        """See `Reader`."""
        return is_seekable(path, self._encoding)

    def _look(self, path: str) -> Mapping[str, Iterable[str]]:
        """Return what the keys of the first rows hold."""
        census = Census()
        sample = self._sample(path, SAMPLE_ROWS)
        _count(census, [row for row, _ in sample], [line for _, line in sample])
        return census.columns

    def _sample(self, path: str, num_lines: int) -> list[tuple[int, bytes | None]]:
        """Return the first lines that are not blank, and their rows."""
        found: list[tuple[int, bytes | None]] = []
        row = 0
        for body in iter_bodies(path, self._encoding):
            num_blank = blank_lines(body)
            lines = enumerate([] if num_blank else lines_of(body), row)
            full = ((at, line) for at, line in lines if line is None or line.strip())
            found += islice(full, num_lines - len(found))
            if len(found) == num_lines:
                break
            row += num_blank or num_lines_of(body)
        return found

    def _parse(self, path: str, found: Lines, shape: Shape, schema: pa.Schema) -> Rows:
        rows, lines, blank = found
        errors: dict[int, RowError] = {}
        objects = _objects(lines)
        if objects is None:
            parsed = [parse_line(line, self._encoding) for line in lines]
            kept = [at for at, value in enumerate(parsed) if value is not None]
            blank |= Ranges.of({*rows} - {rows[at] for at in kept})
            rows, lines = [rows[at] for at in kept], [lines[at] for at in kept]
            parsed = [parsed[at] for at in kept]
            errors = {at: value for at, value in enumerate(parsed) if isinstance(value, RowError)}
            objects = [value if isinstance(value, dict) else _MISSING for value in parsed]
        names = list(dict.fromkeys([*shape.table_columns, *shape.needed]))
        columns, unread = _exact_columns(objects, lines, names)
        errors |= unread
        for at, bad in errors.items():
            errors[at] = RowError(bad.error_type, f"{path}:{rows[at] + 1}: {bad.error}")
        tested = {name: columns[name] for name in shape.table_columns}
        arrays, misfits = to_arrays(tested, schema, lambda at: f"{path}:{rows[at] + 1}")
        values = to_values(columns, shape.needed, len(rows))
        return Rows(rows, values, arrays, misfits | errors, blank)


def _objects(lines: Sequence[bytes | None]) -> list[dict[str, Any]] | None:
    """Parse lines, all of them objects; None if there is any that is not."""
    try:
        values = list(map(orjson.loads, lines))  # type: ignore[arg-type]
    except orjson.JSONDecodeError:
        return None
    return values if {*map(type, values)} <= {dict} else None


def parse_line(line: bytes | None, encoding: str | None = None) -> dict[str, Any] | RowError | None:
    """Parse a line; None if it is blank."""
    if line == b"":
        return None
    if line is None:
        return RowError("line_too_long", f"line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return None
        # orjson gives no position for what is not UTF-8.
        why = why_not_utf8(line, encoding) or f"{error.msg}, column {error.colno}"
        return RowError("bad_json", f"invalid JSON: {why}")
    if type(value) is not dict:
        return RowError("not_an_object", f"expected a JSON object, found {kind_word(value)}")
    return value


def _count(census: Census, rows: Sequence[int], lines: Sequence[bytes | None]) -> None:
    """Note what lines hold, which stand in these rows."""
    objects: Sequence[dict[str, Any]] | None = _objects(lines)
    if objects is None:
        parsed = {
            at: value for at, line in enumerate(lines) if type(value := parse_line(line)) is dict
        }
        rows, lines = [rows[at] for at in parsed], [lines[at] for at in parsed]
        objects = list(parsed.values())

    def exact(at: int) -> Mapping[str, Any]:
        value = _reparse(lines[at] or b"", objects[at])
        return objects[at] if isinstance(value, RowError) else value

    if objects:
        census.add(rows, objects, exact)


def _reparse(line: bytes, value: Mapping[str, Any]) -> dict[str, Any] | RowError:
    """Parse what orjson parsed into `value`, slower, with integers of any size."""
    if is_deeper(value, MAX_DEPTH):
        return RowError("bad_json", "invalid JSON: nested too deeply for integers over 64 bits")
    exact: dict[str, Any] = json.loads(line)
    return exact


def _has_big_float(value: object) -> bool:
    # A stack and not recursion: orjson lets 1,024 levels pass, Python's own limit is lower.
    stack = [value]
    while stack:
        item = stack.pop()
        if type(item) is float:
            if abs(item) >= BIG:
                return True
        elif type(item) is dict:
            stack.extend(item.values())
        elif type(item) is list:
            stack.extend(item)
    return False


def _exact_columns(
    objects: Sequence[Mapping[str, Any]], lines: Sequence[bytes | None], names: Iterable[str]
) -> tuple[dict[str, Sequence[Any]], dict[int, RowError]]:
    """Turn objects into columns, putting back integers that orjson made floats of.

    Looking at columns and not at objects is what makes the search cheap: most hold only strings.

    Returns:
        Name -> values, None where missing; and index -> why a row could not be read exactly.
    """
    present: set[str] = set().union(*objects)
    nothing = [None] * len(objects)
    columns: dict[str, Sequence[Any]] = {
        name: [item.get(name) for item in objects] if name in present else nothing for name in names
    }
    suspects: set[int] = set()
    for name in present & columns.keys():
        if _MAYBE_BIG & set(map(type, columns[name])):
            suspects.update(at for at, value in enumerate(columns[name]) if _has_big_float(value))
    errors: dict[int, RowError] = {}
    for at in suspects:
        exact = _reparse(lines[at] or b"", objects[at])
        if isinstance(exact, RowError):
            errors[at], exact = exact, {}
        for name in objects[at].keys() & columns.keys():
            columns[name][at] = exact.get(name)  # type: ignore[index]
    return columns, errors
