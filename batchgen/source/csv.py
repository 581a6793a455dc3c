"""CSV and TSV, RFC 4180 with quotes and line breaks inside them. The first record is the header.

Row numbers count records after the header, from 0; error texts name the physical line, from 1,
on which the record begins. Every column is a string unless `types` says otherwise; then a text
must be the value's one canonical spelling ("7", not "007"), and an empty field is null.

A quote that is not closed where it should be makes one record of many lines, since within quotes
line breaks and delimiters are text. Nobody can tell the rows of such lines apart, so that each of
them is a row of its own and an error (`bad_csv`); reading goes on with the line after them. So it
is with a record over several lines where

- the file ends within its quotes, or a field goes beyond `MAX_LINE_BYTES`,
- a closing quote is followed by anything but a delimiter, a line end or the end of the file,
- it has another number of fields than the header,
- or it is sound by itself, and each of its lines, blank ones aside, is what a record of this file
  looks like: a quote that was left open in one record and closed by a stray one in a later record,
  see `_is_glued`.

A quote within a field that does not begin with one is text. Plans of earlier versions counted
every bad record as one row; they are read as they were counted, see `Plan.counts_lines`.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections import Counter
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.core.data import parse_json
from batchgen.core.errors import SourceError
from batchgen.core.records import Ranges, RowBatch, RowError
from batchgen.source.columns import fits, is_json, moment, override, parse_field
from batchgen.source.reading import Rows, make_batch, mismatch, shape_of, to_arrays, to_values
from batchgen.source.sniff import refuse_other_content, text_looks_like
from batchgen.source.text import (
    MAX_BATCH_BYTES,
    MAX_LINE_BYTES,
    Scan,
    blank_lines,
    iter_bodies,
    lines_of,
    scan_blocks,
    why_not_utf8,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.source.reading import ReadSpec, Shape
    from batchgen.source.text import OnBlock, OnRows

Record = tuple[int, list[str], RowError | None, int]
"""Physical line, from 1; fields, none for blank lines; why it cannot be read; number of lines. Each
blank line is a row."""

# RFC 8259, section 6: a JSON number, so that the same texts are numbers in both formats.
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


@dataclass(eq=False)
class CsvReader:
    """See `Reader`."""

    delimiter: str | None = None
    """Ends fields; None: a tab in .tsv, a comma in the rest."""
    encoding: str | None = None
    """See `text_blocks`."""
    _: KW_ONLY
    counts_lines: bool = True
    """See `Plan.counts_lines`."""

    def sniff(self, path: str) -> None:
        """See `Reader`."""
        refuse_other_content(path, self.encoding)
        first = lines_of(next(iter_bodies(path, self.encoding), b""))[0] or b""
        looks = text_looks_like(first)
        if looks not in (None, "CSV or TSV") or first.startswith(b"{"):
            text = f"not CSV? it looks like {looks or 'JSONL'}, expected a header and records"
            raise SourceError(path, text)

    def columns(self, paths: Sequence[str], types: Mapping[str, str]) -> pa.Schema:
        """See `Reader`. Files may order their columns differently."""
        headers = {path: header for path in paths if (header := self._header(path)[0])}
        if not headers:
            return override({}, types, paths[0], may_add=False)
        first_path, first = next(iter(headers.items()))
        for path, header in headers.items():
            if set(header) != set(first):
                only = sorted(set(header) ^ set(first))
                text = f"has other columns than {first_path}: {only} are in one of them only"
                raise SourceError(path, text)
        hint = delimiter_hint(first) if self.delimiter is None else None
        if hint and not types.keys() <= set(first):
            raise SourceError(first_path, hint)
        return override(
            {n: parse_field(n, "string") for n in first}, types, first_path, may_add=False
        )

    def is_all_seen(self, paths: Sequence[str]) -> bool:
        """See `Reader`."""
        return True

    def scan(self, path: str, on_rows: OnRows = None, on_block: OnBlock = int) -> Scan:
        """See `Reader`. Takes a second pass if there is any quote."""
        has_quote = False

        def look(block: bytes) -> None:
            nonlocal has_quote
            on_block()
            has_quote = has_quote or b'"' in block

        lines = scan_blocks(path, look, self.encoding)
        if has_quote:
            num_rows = 0
            for record in self._header(path)[1]:
                on_block()
                num_rows += _num_rows(record)
            return Scan(num_rows, lines.digest)
        return Scan(max(lines.num_rows - 1, 0), lines.digest)

    def read(self, path: str, segment: int, todo: Ranges, spec: ReadSpec) -> Iterator[RowBatch]:
        """See `Reader`. Records before the wanted ones are split into fields, for their quotes."""
        shape = shape_of(path, segment, spec)
        header, after = self._header(path)
        for rows, records in _in_batches(_pick(path, after, todo), spec.batch_rows):
            yield make_batch(shape, _convert(path, header, rows, records, (shape, spec.columns)))

    def is_seekable(self, path: str) -> bool:
        """See `Reader`. Whether a line begins a record is known only from the quotes before it."""
        return False

    def _header(self, path: str) -> tuple[list[str], Iterator[Record]]:
        is_tsv = ".tsv" in path.rpartition("/")[2].lower()
        delimiter = self.delimiter or ("\t" if is_tsv else ",")
        raw = _raw_records(path, delimiter, self.encoding)
        return _header(path, raw, delimiter, counts_lines=self.counts_lines)


def delimiter_hint(names: Sequence[str]) -> str | None:
    """What to tell of a header that seems to be cut by another character; None of a sound one."""
    found = [char for char in ";\t|" if char in names[0]] if len(names) == 1 else []
    if not found:
        return None
    return (
        f"the file's columns are {names!r:.200}: is the delimiter {found[0]!r}? set input.delimiter"
    )


def _raw_records(path: str, delimiter: str, encoding: str | None) -> Iterator[Record]:
    """Yield the records as their quotes make them, the header first."""
    # The limit is the csv module's only, and global; its default of 128 KiB is below one prompt.
    csv.field_size_limit(MAX_LINE_BYTES)
    texts = _Texts(path, encoding)
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        line = texts.num_lines + 1
        texts.is_between = True
        try:
            fields = next(reader, None)
        except csv.Error as bad:
            fields = []
            texts.troubles.append(RowError("bad_csv", f"bad CSV: {bad}"))
        if texts.num_blank:
            yield line, [], None, texts.num_blank
            texts.num_lines += texts.num_blank
            texts.num_blank = 0
            continue
        if fields is None:
            return
        # What is wrong with quotes costs many lines: it comes before a byte that costs one.
        error = next((it for it in texts.troubles if it.error_type == "bad_csv"), None)
        error = error or (texts.troubles[0] if texts.troubles else None)
        yield line, fields, error, texts.num_lines - line + 1
        if error is not None:
            texts.troubles.clear()


def _records(
    raw: Iterator[Record], header: Sequence[str], delimiter: str, *, counts_lines: bool
) -> Iterator[Record]:
    """Yield the records after the header, and each line of what cannot be told apart."""
    before: Sequence[str] = ()
    for record in raw:
        line, fields, error, num_lines = record
        if num_lines > 1 and counts_lines and (fields or error):
            why = _why_glued(fields, error, len(header), delimiter, before)
            if why is not None:
                last = line + num_lines - 1
                text = f"bad CSV: lines {line} to {last} are one record by their quotes: {why}"
                gone = RowError("bad_csv", f"{text}; is a quote in line {line} not closed?")
                yield from ((at, [], gone, 1) for at in range(line, last + 1))
                continue
        if error is None and len(fields) == len(header):
            before = fields
        yield record


def _why_glued(
    fields: list[str],
    error: RowError | None,
    num_columns: int,
    delimiter: str,
    before: Sequence[str],
) -> str | None:
    """Why the lines of a record are taken for lost; None if they are one record."""
    if error is not None and error.error_type == "bad_csv":
        return error.error.removeprefix("bad CSV: ")
    if len(fields) != num_columns:
        return f"expected {num_columns} fields, found {len(fields)}"
    if _is_glued(fields, delimiter, before):
        return f"but each line by itself is one, of {num_columns} fields"
    return None


_FEW_LINES = 3
_SURE_LINES = 20
"""From so many lines on, a column of words is evidence enough, and one line in ten may be unlike
the others: a record with a delimiter too many is among them."""
_MOST_LINES = 1_000
"""The first so many are looked at, since a field may have millions of them."""


def _is_glued(fields: Sequence[str], delimiter: str, before: Sequence[str]) -> bool:
    """Whether a sound record over several lines is rather one record a line.

    RFC 4180 cannot tell a long text from records between two stray quotes. The evidence: exactly
    one field holds the line breaks; every line has as many fields as the record if its quotes are
    taken for text; and some column holds the same kind of thing in all of them, one with a digit
    if they are few: a number, say, or a name with one. Two lines need more, see `_is_next`. Lines
    of a text seldom have just that many delimiters, without the spaces that people write behind a
    comma, and more seldom begin with a number where the record does. Where numbers rise from the
    record before to this one they must go on rising: a list within a text begins anew.

    What it cannot tell: fewer than twenty lines without a digit in common, two lines whose numbers
    do not count on, a file of one column. These stay one record.

    Args:
        fields: Of the record.
        delimiter: The file's.
        before: Fields of the record before, if there is one.
    """
    if (found := _as_records(fields, delimiter)) is None:
        return False
    lines, broken, has_blank = found
    alike = [at for at in range(len(fields)) if _is_alike(at, lines, before, broken)]
    if len(lines) == 2:
        return not has_blank and any(_is_next(at, lines, before) for at in alike)
    has_digit = any(_kind(lines[0][at])[0] for at in alike)
    return bool(alike) and len(lines) >= (_FEW_LINES if has_digit else _SURE_LINES)


def _as_records(fields: Sequence[str], delimiter: str) -> tuple[list[list[str]], int, bool] | None:
    """The lines of a record as records, None if they are none; its broken field; blank lines."""
    broken = [at for at, field in enumerate(fields) if "\n" in field]
    if len(broken) != 1 or len(fields) == 1:
        return None
    # First what is quickly told of nearly every text: its first line alone.
    at, text = broken[0], fields[broken[0]]
    if text.count(delimiter, 0, text.index("\n")) != len(fields) - 1 - at:
        return None
    others = [field for column, field in enumerate(fields) if column not in (0, at)]
    is_spaced = bool(others) and all(field.startswith(" ") for field in others)
    lines: list[list[str]] = []
    num_blank = num_unlike = 0
    for line in itertools.islice(_lines_of(fields, at, delimiter), _MOST_LINES):
        if len(line) == 1 and not line[0].strip():
            num_blank += 1
        elif len(line) != len(fields):
            num_unlike += 1
            if num_unlike * 10 > len(lines) + _SURE_LINES:
                return None
        elif not is_spaced and all(field.startswith(" ") for field in line[1:]):
            return None
        else:
            lines.append(line)
    is_enough = len(lines) >= (_SURE_LINES if num_unlike else 2)
    return (lines, at, num_blank > 0) if is_enough and num_unlike * 10 <= len(lines) else None


def _is_alike(at: int, lines: Sequence[Sequence[str]], before: Sequence[str], broken: int) -> bool:
    """Whether a column holds the same kind of thing in all lines, and rises as it did before."""
    kinds = {_kind(line[at]) for line in lines}
    # The broken column tells only where it holds numbers.
    if len(kinds) > 1 or (at == broken and kinds != {(True, False)}):
        return False
    numbers = [_number(line[at]) for line in lines]
    rising = [number for number in numbers if number is not None]
    last = _number(before[at]) if before else None
    if last is None or len(rising) < len(numbers) or rising[0] <= last:
        return True
    return all(a < b for a, b in itertools.pairwise(rising))


def _number(field: str) -> int | None:
    return int(field) if field.isdecimal() and len(field) <= _MOST_DIGITS else None


def _lines_of(fields: Sequence[str], at: int, delimiter: str) -> Iterator[list[str]]:
    """Yield the fields of each line of a record with its quotes taken for text."""
    text, start = fields[at], 0
    line = [*fields[:at]]
    while (end := text.find("\n", start)) >= 0:
        yield line + text[start:end].removesuffix("\r").split(delimiter)
        line, start = [], end + 1
    yield [*text[start:].split(delimiter), *fields[at + 1 :]]


_MOST_DIGITS = 18
_NUMBERED = re.compile(rf"(.*?)(\d{{1,{_MOST_DIGITS}}})", re.DOTALL)
_SURE_CHARS = 8


def _is_next(at: int, lines: Sequence[Sequence[str]], before: Sequence[str]) -> bool:
    """Whether a column of two lines goes on as records do: enough for two.

    Its number is one more (7 and 8, row-9 and row-10) or goes on in the step from the record
    before, or both have the form of a key or a date: equally many characters, at least
    `_SURE_CHARS`, letters or digits at the same places.
    """
    first, second = lines[0][at], lines[1][at]
    step = _step(first, second)
    if step is not None and (step == 1 or (before and step and step == _step(before[at], first))):
        return True
    has_digits = any(map(str.isdigit, first)) and any(map(str.isdigit, second))
    return has_digits and len(first) >= _SURE_CHARS and _form(first) == _form(second)


def _step(field: str, other: str) -> int | None:
    """What the number at the end of one value is more than that of another like it."""
    one, two = _NUMBERED.fullmatch(field), _NUMBERED.fullmatch(other)
    return int(two[2]) - int(one[2]) if one and two and one[1] == two[1] else None


def _form(field: str) -> str:
    return "".join("x" if char.isalnum() else char for char in field)


def _kind(field: str) -> tuple[bool, bool]:
    """Whether there are digits, whether there are letters."""
    return any(map(str.isdigit, field)), any(map(str.isalpha, field))


class _Texts:
    """The lines of a file as csv reads them, but for long stretches of blank lines."""

    def __init__(self, path: str, encoding: str | None) -> None:
        self.troubles: list[RowError] = []
        """What is wrong with the lines of the record at hand."""
        self.num_lines = 0
        """Lines that were read."""
        self.is_between = True
        """Whether csv is between two records, where blank lines are no text."""
        self.num_blank = 0
        """Blank lines that were passed over and are still to be told: csv's end is none."""
        self._encoding = encoding
        self._bodies = iter_bodies(path, encoding)
        self._lines: Iterator[bytes | None] = iter(())

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for line in self._lines:
            self.is_between = False
            self.num_lines += 1
            return self._text(line)
        body = next(self._bodies)
        if self.is_between and (num_blank := blank_lines(body)):
            self.num_blank = num_blank
            raise StopIteration
        self._lines = iter(lines_of(body))
        return next(self)

    def _text(self, line: bytes | None) -> str:
        if line is None:
            text = f"line is longer than {MAX_LINE_BYTES >> 20} MiB"
            self.troubles.append(RowError("line_too_long", text))
            return "\n"
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError:
            why = why_not_utf8(line, self._encoding)
            self.troubles.append(RowError("invalid_utf8", str(why)))
            return line.decode(errors="replace") + "\n"


def _header(
    path: str, raw: Iterator[Record], delimiter: str, *, counts_lines: bool
) -> tuple[list[str], Iterator[Record]]:
    """The column names, and the records after them; no names for an empty file.

    Raises:
        SourceError: The header cannot be read or repeats a name.
    """
    _, names, error, num_lines = next(raw, (1, [], None, 1))
    if error is not None:
        raise SourceError(path, f"the header cannot be read: {error.error}")
    if num_lines > 1 and counts_lines and _as_records(names, delimiter) is not None:
        text = f"the header goes on to line {num_lines}; is a quote in line 1 not closed?"
        raise SourceError(path, text)
    repeated = sorted(name for name, num in Counter(names).items() if num > 1)
    if repeated:
        raise SourceError(path, f"the header repeats {repeated}, expected every name once")
    if not names and next(raw, None) is not None:
        raise SourceError(path, "begins with a blank line, expected a header")
    return names, _records(raw, names, delimiter, counts_lines=counts_lines)


def _num_rows(record: Record) -> int:
    _, fields, error, num_lines = record
    return 1 if fields or error else num_lines


def _pick(path: str, records: Iterator[Record], todo: Ranges) -> Iterator[tuple[int, Record]]:
    left = list(reversed(todo.spans))
    stop = 0
    for record in records if left else ():
        start, stop = stop, stop + _num_rows(record)
        if stop <= left[-1][0]:
            continue
        if stop == start + 1:
            yield start, record
        else:
            for first, end in todo.within(start, stop):
                yield first, (record[0] + first - start, [], None, end - first)
        while left and left[-1][1] <= stop:
            left.pop()
        if not left:
            return
    if left:
        raise SourceError(path, f"has {stop} rows, expected at least {todo.spans[-1][1]}")


def _in_batches(
    pairs: Iterator[tuple[int, Record]], batch_rows: int
) -> Iterator[tuple[list[int], list[Record]]]:
    """Gather records into batches bounded in rows and in bytes.

    Raises:
        SourceError: What `pairs` raised, after everything before it was yielded.
    """
    rows: list[int] = []
    items: list[Record] = []
    num_bytes = 0
    failure: SourceError | None = None
    try:
        for row, item in pairs:
            rows.append(row)
            items.append(item)
            num_bytes += sum(map(len, item[1]))
            if len(rows) >= batch_rows or num_bytes >= MAX_BATCH_BYTES:
                yield rows, items
                rows, items, num_bytes = [], [], 0
    except SourceError as error:
        failure = error
    if rows:
        yield rows, items
    if failure is not None:
        raise failure


def _convert(
    path: str,
    header: Sequence[str],
    rows: list[int],
    records: list[Record],
    spec: tuple[Shape, pa.Schema],
) -> Rows:
    shape, schema = spec
    full = [at for at, record in enumerate(records) if record[1] or record[2]]
    blank = Ranges()
    if len(full) < len(rows):
        ends = ((row, row + _num_rows(it)) for row, it in zip(rows, records, strict=True))
        blank = Ranges(ends) - Ranges.of(rows[at] for at in full)
        rows, records = [rows[at] for at in full], [records[at] for at in full]

    def where_is(index: int) -> str:
        return f"{path}:{records[index][0]}"

    errors = _bad_records(header, records, where_is)
    missing = [None] * len(header)
    fields = [missing if at in errors else record[1] for at, record in enumerate(records)]
    by_name = dict(zip(header, zip(*fields, strict=True), strict=True)) if fields else {}
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys([*shape.table_columns, *shape.needed]):
        columns[name], misfits = _from_texts(schema.field(name), by_name.get(name, ()))
        for at, found in misfits.items():
            errors.setdefault(at, mismatch(where_is(at), schema.field(name), found))
    tested = {name: columns[name] for name in shape.table_columns}
    arrays, _ = to_arrays(tested, schema, where_is)
    return Rows(rows, to_values(columns, shape.needed, len(rows)), arrays, errors, blank)


def _bad_records(
    header: Sequence[str], records: Sequence[Record], where_is: Callable[[int], str]
) -> dict[int, RowError]:
    errors = {}
    for at, (_, fields, trouble, _) in enumerate(records):
        if trouble is not None:
            errors[at] = RowError(trouble.error_type, f"{where_is(at)}: {trouble.error}")
        elif len(fields) != len(header):
            text = f"bad CSV: expected {len(header)} fields, found {len(fields)}"
            errors[at] = RowError("bad_csv", f"{where_is(at)}: {text}")
    return errors


def _from_texts(field: pa.Field, texts: Sequence[str | None]) -> tuple[list[Any], dict[int, str]]:
    """Read a column's texts as its type; None and the index of each that is not."""
    if field.type == pa.string() and not is_json(field):
        return list(texts), {}
    values: list[Any] = []
    misfits: dict[int, str] = {}
    for at, text in enumerate(texts):
        try:
            values.append(parse_text(field, text) if text else None)
        except ValueError:
            values.append(None)
            misfits[at] = "a text that is not exactly one"
    return values, misfits


def parse_text(field: pa.Field, text: str) -> Any:  # noqa: ANN401 - of the field's type
    """Read one text as a value.

    Raises:
        ValueError: It is not this type's own spelling of a value, or out of range.
    """
    value: Any = None
    if is_json(field):
        return parse_json(text)
    if field.type == pa.bool_():
        value = {"true": True, "false": False}.get(text)
    elif pa.types.is_temporal(field.type):
        value = moment(field.type, text)
    elif text.lstrip("-").isdigit():
        value = int(text) if str(int(text)) == text else None
    elif field.type == pa.float64() and _NUMBER.fullmatch(text):
        value = float(text)
    if value is None or not fits(field.type, value) or value in (math.inf, -math.inf):
        raise ValueError(f"not a {field.type}")
    return float(value) if field.type == pa.float64() else value
