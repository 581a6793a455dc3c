"""Rows whose request another row has had answered: they get its answer, and keep their own columns.

They are read and rendered as every row is; only the engine is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.answers.validate import refusal
from batchgen.core import arrow
from batchgen.core.expressions import RowTest, parse_row_test
from batchgen.core.records import Request
from batchgen.store.parts import ROW, SEGMENT
from batchgen.store.reuse import Piece

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from batchgen.core.records import Ordinal, RowBatch
    from batchgen.pipeline.prepare import Prepared
    from batchgen.prompt.requests import RequestBuilder
    from batchgen.store.reuse import AnsweredKeys

# Rows looked up together: many, since each row group with an answer is read once for them; not
# too many, since all their answers are in memory at once.
_LOOK_UP_ROWS = 20_000
_LOOK_UP_BYTES = 32 * 2**20


class _Asked(NamedTuple):
    """What is kept of a row that looks for an answer: not its prompt, which may be long."""

    key: str
    ordinal: Ordinal
    carried: pa.RecordBatch
    at: int


def answer_fields(prepared: Prepared) -> list[pa.Field]:
    """What a copy takes from the row that was computed: all but ordinal and carried columns."""
    return list(prepared.part_schema)[2 + len(prepared.carried) :]


def copies(
    batches: Iterable[RowBatch],
    builder: RequestBuilder,
    answered: AnsweredKeys,
    prepared: Prepared,
) -> Iterator[Piece]:
    """Yield the rows that have an answer already, as results in the part schema.

    Args:
        batches: Rows to look at.
        builder: Makes their keys.
        answered: The answers.
        prepared: The job.

    Raises:
        SourceError: The input cannot be read.
        StorageError: An answer cannot be read right now.
    """
    rules = _rules_over_input(prepared)
    held: list[_Asked] = []
    num_bytes = 0
    for batch in batches:
        held += [
            _Asked(request.request_key, request.ordinal, batch.carried, request.index)
            for request in builder.of(batch)
            if isinstance(request, Request)
        ]
        num_bytes += batch.carried.nbytes
        if len(held) >= _LOOK_UP_ROWS or num_bytes >= _LOOK_UP_BYTES:
            yield _copied(held, answered, prepared, rules)
            held, num_bytes = [], 0
    if held:
        yield _copied(held, answered, prepared, rules)


def _copied(
    asked: Sequence[_Asked],
    answered: AnsweredKeys,
    prepared: Prepared,
    rules: Sequence[RowTest],
) -> Piece:
    places, answers = answered.find([row.key for row in asked])
    found = [asked[at] for at in places]
    schema = prepared.part_schema
    if not found:
        return Piece(schema.empty_table(), {}, "")
    rows = [(row.carried, row.at) for row in found]
    columns = [
        pa.array([row.ordinal.segment for row in found], schema.field(SEGMENT).type),
        pa.array([row.ordinal.row for row in found], schema.field(ROW).type),
        *(arrow.gather(rows, prepared.carried) if prepared.carried else ()),
        *answers.columns,
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    prefix = prepared.job.output.prefix
    if rules:
        table = table.filter(_stands(table, rules, prefix))
    engines = pc.unique(table.column(f"{prefix}engine")).drop_null().to_pylist()
    return Piece(table, {}, ", ".join(sorted(engines)))


def _rules_over_input(prepared: Prepared) -> list[RowTest]:
    """The rules that may judge another row's answer otherwise, since they read carried columns."""
    tests = [
        parse_row_test(f"rules[{at}]", text) for at, text in enumerate(prepared.job.checks.rules)
    ]
    return [test for test in tests if set(test.columns) & set(prepared.carried)]


def _stands(table: pa.Table, rules: Sequence[RowTest], prefix: str) -> pa.Array:
    """Rows for which the rules decide as they did for the row that was asked.

    The others, and all whose refusal may have another reason here, have to be asked themselves.
    """
    is_ok = pc.equal(table.column(f"{prefix}status"), "ok").combine_chunks()
    # A further attempt may have been made because of the asked row's own columns.
    stands = pc.less_equal(table.column(f"{prefix}attempts"), 1).combine_chunks()
    for rule in rules:
        arrays = [table.column(name).combine_chunks() for name in rule.columns]
        passed, _ = rule.keep(arrays, table.num_rows)
        refused = pc.equal(table.column(f"{prefix}error"), refusal(rule))
        refused = pc.fill_null(refused, False).combine_chunks()  # noqa: FBT003 - pyarrow's
        stands = pc.and_(stands, pc.or_(pc.invert(is_ok), passed))
        stands = pc.and_(stands, pc.or_(pc.invert(refused), pc.invert(passed)))
    return stands
