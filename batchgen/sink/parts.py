"""Results to parts. A part is whatever finished since the last flush, in ordinal order.

The part file is the commit record: once `commit` returns, its rows are durable and will not be
done again. It is built in memory and put under its name in one piece; nothing is ever streamed
to a final name, because a writer that is closed by an exception leaves a valid, short file.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen import arrow
from batchgen.errors import AccountingError
from batchgen.footer import PartFooter
from batchgen.ranges import Ranges
from batchgen.sink.schema import RESULT_FIELDS, dictionary_columns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.records import Result
    from batchgen.storage import Storage

_NUM_RESULT_FIELDS = len(RESULT_FIELDS)
# Publishing reads parts by row group: small enough that a straggler does not drag a whole part.
_ROW_GROUP_ROWS = 4096


@dataclass(frozen=True, slots=True)
class PartContext:
    """What all parts of one run share."""

    plan_id: str
    epoch: int
    worker: int
    run_id: str
    schema: pa.Schema
    prefix: str


class PartWriter:
    """Commits parts of one worker in one epoch, numbered from 0."""

    def __init__(self, storage: Storage, folder: str, context: PartContext) -> None:
        """Bind; nothing is written yet."""
        self._storage = storage
        self._folder = folder
        self._context = context
        self._serial = 0

    def commit(
        self,
        results: Sequence[Result],
        skipped: Mapping[int, Ranges],
        engine: Mapping[str, str],
    ) -> str:
        """Make a part durable and return its name.

        Args:
            results: At least one, or none if `skipped` has rows; any order.
            skipped: Segment -> rows that end without a result.
            engine: Who answered, for the footer.

        Raises:
            StorageError: Not durable; the same call may be made again.
            AccountingError: The part's name holds something else.
        """
        context = self._context
        name = (
            f"{self._folder}/e{context.epoch:06d}-w{context.worker:02d}-s{self._serial:06d}.parquet"
        )
        ordered = sorted(results, key=lambda result: result.ordinal)
        footer = PartFooter(
            plan=context.plan_id,
            epoch=context.epoch,
            run_id=context.run_id,
            done=_done(ordered, skipped),
            num_ok=sum(result.error is None for result in ordered),
            num_errors=sum(result.error is not None for result in ordered),
            num_skipped=sum(len(rows) for rows in skipped.values()),
            engine=engine,
        )
        data = _encode(_table(ordered, context), footer, context.prefix)
        if not self._storage.put_if_absent(name, data):
            # Epochs are exclusive, so nobody else writes this name; silence would lose rows.
            msg = f"{self._storage.where}/{name}: holds other rows than this run's; run again"
            raise AccountingError(msg)
        self._serial += 1
        return name


def _done(ordered: Sequence[Result], skipped: Mapping[int, Ranges]) -> dict[int, Ranges]:
    rows: dict[int, list[int]] = {}
    for result in ordered:
        rows.setdefault(result.ordinal.segment, []).append(result.ordinal.row)
    none = Ranges()
    return {
        segment: Ranges.of(rows.get(segment, [])) | skipped.get(segment, none)
        for segment in sorted(rows.keys() | skipped.keys())
    }


def _table(ordered: Sequence[Result], context: PartContext) -> pa.Table:
    """One row a result: ordinal, carried columns, result columns, in the part schema."""
    schema = context.schema
    completions = [result.completion for result in ordered]
    errors = [result.error for result in ordered]
    columns = [
        [result.ordinal.segment for result in ordered],
        [result.ordinal.row for result in ordered],
        *_carried_columns(ordered, schema),
        [c and c.text for c in completions],
        ["ok" if e is None else "error" for e in errors],
        [c and c.finish_reason for c in completions],
        [e and e.error_type for e in errors],
        [e and e.error for e in errors],
        [c and c.num_prompt_tokens for c in completions],
        [c and c.num_cached_tokens for c in completions],
        [c and c.num_output_tokens for c in completions],
        [c and c.latency_s for c in completions],
        [result.request_key for result in ordered],
        [context.run_id] * len(ordered),
    ]
    arrays = [
        column if isinstance(column, pa.ChunkedArray | pa.Array) else pa.array(column, field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _carried_columns(ordered: Sequence[Result], schema: pa.Schema) -> list[pa.ChunkedArray]:
    """Gather the carried columns of rows that lie in several batches, in the order given."""
    batches: dict[int, tuple[pa.RecordBatch, int]] = {}
    offset = 0
    take = []
    for result in ordered:
        key = id(result.batch)
        if key not in batches:
            batches[key] = (result.batch.carried, offset)
            offset += result.batch.carried.num_rows
        take.append(batches[key][1] + result.index)
    fields = list(schema)[2:-_NUM_RESULT_FIELDS]
    names = [field.name for field in fields]
    if not batches or not names:
        return [pa.chunked_array([], field.type) for field in fields]
    table = pa.Table.from_batches([carried for carried, _ in batches.values()])
    return list(arrow.take(table, pa.array(take, pa.int64())).select(names).columns)


def _encode(table: pa.Table, footer: PartFooter, prefix: str) -> bytes:
    sink = io.BytesIO()
    metadata = {**(table.schema.metadata or {}), **footer.to_metadata()}
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="lz4",
        row_group_size=_ROW_GROUP_ROWS,
        use_dictionary=dictionary_columns(prefix),
        write_page_checksum=True,
    )
    return sink.getvalue()
