"""Which files make the input, in which order, and who reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from batchgen.core.data import pl
from batchgen.core.errors import ConfigError, SourceError, suggestion
from batchgen.source.files import find_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.source.reading import Reader

FORMATS = ("jsonl", "csv", "parquet", "openai")
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_SHEETS = frozenset({".xlsx", ".xls", ".xlsm", ".xlsb", ".ods"})
_COMPRESSED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True, slots=True)
class InputFiles:
    """The files of one input."""

    format: str
    """One of `FORMATS`."""
    paths: Sequence[str]
    """Local or URLs, in the order of their rows."""
    notes: Sequence[str] = ()
    """What was left out, and why."""
    partitions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Path -> columns that its folders tell, see `columns`."""


def find_files(paths: Sequence[str], format_name: str | None = None) -> InputFiles:
    """Resolve paths, patterns and folders.

    Args:
        paths: Local or URLs, by the rules of `source.files`.
        format_name: One of `FORMATS`; None to go by the files' suffixes.

    Raises:
        SourceError: A pattern without files, an unknown format or suffix, or mixed formats.
    """
    if not paths:
        raise SourceError(str(paths), "names no file, expected at least one")
    found = find_inputs(paths)
    if format_name is None:
        format_name = _common_format(found.files)
    else:
        reader_for(format_name)
    partitions = {path: found.partitions[path] for path in found.files}
    return InputFiles(format_name, found.files, found.notes, partitions)


def _common_format(files: Sequence[str]) -> str:
    examples: dict[str, str] = {}
    for path in files:
        examples.setdefault(format_of(path), path)
    if len(examples) > 1:
        (one, first), (other, second) = list(examples.items())[:2]
        text = f"is {other}, but {first} is {one}, expected one format; make it two jobs"
        raise SourceError(second, text)
    return next(iter(examples))


def format_of(path: str) -> str:
    """Tell the format by the name.

    Raises:
        SourceError: The suffix says nothing.
    """
    name = path.rpartition("/")[2].lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    found = _SUFFIXES.get(PurePosixPath(name).suffix)
    is_plain = name == path.rpartition("/")[2].lower()
    if PurePosixPath(name).suffix in _SHEETS:
        text = "is a spreadsheet, expected text or Parquet; save it as CSV, or with polars and"
        call = f"polars.read_excel({name!r}).write_parquet(...)"
        raise SourceError(path, f"{text} fastexcel by {call}")
    if found is None or (found == "parquet" and not is_plain):
        known = ", ".join(_SUFFIXES)
        text = f"has a suffix that names no format, expected {known} (text also with .gz, .zst)"
        raise SourceError(path, f"{text}; rename it or set the input's format")
    return found


def reader_for(
    format_name: str,
    delimiter: str | None = None,
    encoding: str | None = None,
    *,
    counts_lines: bool = True,
) -> Reader:
    """The reader of a format.

    Args:
        format_name: One of `FORMATS`.
        delimiter: Of CSV; None: by the file's name.
        encoding: Of text; None: UTF-8.
        counts_lines: Of CSV, see `Plan.counts_lines`.

    Raises:
        ConfigError: A delimiter or an encoding for another format.
        SourceError: Not one of `FORMATS`.
    """
    if delimiter is not None and format_name in FORMATS and format_name != "csv":
        key = "input.delimiter"
        text = f"{delimiter!r} is for CSV, and the input is {format_name}; leave it out"
        raise ConfigError(key, [text])
    if encoding is not None and format_name == "parquet":
        key = "input.encoding"
        raise ConfigError(
            key, [f"{encoding!r} is for text, and the input is Parquet; leave it out"]
        )
    # Imported here so that a job loads only what its format needs.
    if format_name == "jsonl":
        from batchgen.source.jsonl import JsonlReader

        return JsonlReader(encoding)
    if format_name == "openai":
        from batchgen.source.openai import OpenAIReader

        return OpenAIReader(encoding)
    if format_name == "csv":
        from batchgen.source.csv import CsvReader

        return CsvReader(delimiter, encoding, counts_lines=counts_lines)
    if format_name == "parquet":
        from batchgen.source.parquet import ParquetReader

        return ParquetReader()
    text = f"unknown format {format_name!r}{suggestion(format_name, FORMATS)}"
    raise SourceError(format_name, text)


def read_whole(path: str) -> pl.DataFrame:
    """Read a small file in one go; values of CSV are texts.

    Raises:
        SourceError: Its suffix says nothing.
        PolarsError, OSError: It cannot be read.
    """
    kind = format_of(path)
    if kind == "csv":
        separator = "\t" if ".tsv" in path.lower() else ","
        return pl.read_csv(path, infer_schema=False, separator=separator)
    return pl.read_parquet(path) if kind == "parquet" else pl.read_ndjson(path)
