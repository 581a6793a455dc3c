"""Tables of polars, pandas or Arrow as a job's input: written to a Parquet file of its own."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.core.data import pl
from batchgen.core.errors import ConfigError

_ARROW = "__arrow_c_stream__"
"""What Arrow reads a table by: arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface."""


def is_table(value: object) -> bool:
    """Whether a value is a table: what Arrow can read, or a lazy one of polars."""
    return hasattr(value, _ARROW) or hasattr(value, "collect_schema")


def _as_arrow(value: Any) -> pa.Table:  # noqa: ANN401 - see `is_table`
    """Read a table into Arrow's; polars' with strings as Parquet has them, not as views."""
    if not hasattr(value, "collect_schema"):
        table = pa.table(value)  # With pandas' index, unless that only counts.
        has_unnamed = any(name.startswith("__index_level_") for name in table.column_names)
        # As pandas itself names it: `index`, or `level_0`, `level_1`.
        is_pandas = has_unnamed and hasattr(value, "reset_index")
        return pa.table(value.reset_index()) if is_pandas else table
    return value.lazy().collect().to_arrow(compat_level=pl.CompatLevel.oldest())


def write_table(value: Any, path: Path, may_change: Callable[[], None]) -> None:  # noqa: ANN401 - see `is_table`
    """Write a table; a file that holds just this is left alone, so that nights see no change.

    Args:
        value: The table.
        path: The file; its folder is made.
        may_change: Called before a file that is there gets another content; raises to keep it.

    Raises:
        ConfigError: Parquet cannot hold it.
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(_as_arrow(value), beside)
        if path.exists():
            if filecmp.cmp(beside, path, shallow=False):
                return
            may_change()
        beside.replace(path)
    except (pa.ArrowException, TypeError, ValueError) as error:
        where = "input.path"
        raise ConfigError(where, [f"the table cannot be written as Parquet: {error}"]) from error
    finally:
        beside.unlink(missing_ok=True)
