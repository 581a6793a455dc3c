"""The one Arrow schema of a job's results: where each row stands, carried columns, our columns.

Fixed at plan time and written with explicit types, so that a part without a single error and a
part with nothing else have the same schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

SEGMENT = "_batchgen_segment"
ROW = "_batchgen_row"
"""The ordinal. In parts only; the published order stands for it."""

RESULT_FIELDS = (
    pa.field("text", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("finish_reason", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error", pa.string()),
    pa.field("num_prompt_tokens", pa.int32()),
    pa.field("num_cached_tokens", pa.int32()),
    pa.field("num_output_tokens", pa.int32()),
    pa.field("latency_s", pa.float32()),
    pa.field("request_key", pa.string()),
    pa.field("run_id", pa.string(), nullable=False),
)
"""What batchgen adds to a row; the job's prefix goes before each name."""

# Few distinct values: worth a dictionary. Texts and keys are not, and building one costs time.
DICTIONARY_FIELDS = ("status", "finish_reason", "error_type", "error", "run_id")


def part_schema(carried: pa.Schema, prefix: str) -> pa.Schema:
    """Schema of a part: ordinal, carried columns, result columns.

    Raises:
        ConfigError: A carried column has the name of one of ours.
    """
    ours = [field.with_name(prefix + field.name) for field in RESULT_FIELDS]
    clash = sorted({SEGMENT, ROW, *(field.name for field in ours)} & set(carried.names))
    if clash:
        where = "output.prefix"
        problem = (
            f"{prefix!r} makes the column {clash[0]!r}, which the input has too; choose another "
            "prefix, or leave the column out of input.columns"
        )
        raise ConfigError(where, [problem])
    # Error rows carry nulls in every carried column, whatever the input's schema allows.
    carried_fields = [field.with_nullable(True) for field in carried]  # noqa: FBT003 - pyarrow's
    ordinal = [
        pa.field(SEGMENT, pa.int32(), nullable=False),
        pa.field(ROW, pa.int64(), nullable=False),
    ]
    return pa.schema([*ordinal, *carried_fields, *ours])


def published_schema(parts: pa.Schema) -> pa.Schema:
    """The same without the ordinal."""
    return pa.schema([field for field in parts if field.name not in {SEGMENT, ROW}])


def dictionary_columns(prefix: str) -> Sequence[str]:
    """Columns for Parquet's dictionary encoding."""
    return [prefix + name for name in DICTIONARY_FIELDS]
