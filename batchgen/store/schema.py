"""The one Arrow schema of a job's results: ordinal, carried columns, answer, what is known of it.

Fixed at plan time and written with explicit types, so that a part without a single error and a
part with nothing else have the same schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

SEGMENT = "_batchgen_segment"
ROW = "_batchgen_row"
"""The ordinal. In parts only; the published order stands for it."""

RESULT_FIELDS = (
    pa.field("status", pa.string(), nullable=False),
    pa.field("verdict", pa.string(), nullable=False),
    pa.field("finish_reason", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error", pa.string()),
    pa.field("attempts", pa.int16(), nullable=False),
    pa.field("seed", pa.int64()),
    pa.field("num_prompt_tokens", pa.int32()),
    pa.field("num_cached_tokens", pa.int32()),
    pa.field("num_output_tokens", pa.int32()),
    pa.field("latency_s", pa.float32()),
    pa.field("request_key", pa.string()),
    pa.field("run_id", pa.string(), nullable=False),
    pa.field("model", pa.string()),
    pa.field("recipe", pa.string(), nullable=False),
    pa.field("engine", pa.string()),
)
"""What batchgen tells of a row beside its answer; the job's prefix goes before each name."""
OPTIONAL = "seed"
"""Only with `output.with_seed`: a column of noise does not compress."""

# Few distinct values: worth a dictionary. Texts and keys are not, and building one costs time.
DICTIONARY_FIELDS = (
    *("status", "verdict", "finish_reason", "error_type", "error", "attempts"),
    *("run_id", "model", "recipe", "engine"),
)


def part_schema(
    carried: pa.Schema, answer: Sequence[pa.Field], prefix: str, *, with_seed: bool = False
) -> pa.Schema:
    """Schema of a part: ordinal, carried columns, answer, result columns.

    Args:
        carried: Columns of the input.
        answer: Columns that answers become, without the prefix.
        prefix: Goes before the name of each column of ours.
        with_seed: Whether seeds are kept.

    Raises:
        ConfigError: Two columns have one name.
    """
    fields = [field for field in RESULT_FIELDS if with_seed or field.name != OPTIONAL]
    _check_answer(answer, fields)
    ours = [field.with_name(prefix + field.name) for field in (*answer, *fields)]
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


def _check_answer(answer: Sequence[pa.Field], fields: Sequence[pa.Field]) -> None:
    names = [field.name for field in (*answer, *fields)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        where = "output.flatten"
        problem = f"the schema's field {twice[0]!r} is a column of batchgen's too; rename it"
        raise ConfigError(where, [problem])


def published_schema(parts: pa.Schema) -> pa.Schema:
    """The same without the ordinal."""
    return pa.schema([field for field in parts if field.name not in {SEGMENT, ROW}])


def dictionary_columns(prefix: str, labels: Sequence[str] = ()) -> Sequence[str]:
    """Columns for Parquet's dictionary encoding."""
    return [prefix + name for name in (*DICTIONARY_FIELDS, *labels)]
