"""Text in other encodings than UTF-8: JSONL and CSV, plain and compressed."""

from __future__ import annotations

import codecs
import gzip
import json

import pyarrow as pa
import pytest
import zstandard

from batchgen.core.errors import ConfigError, SourceError
from batchgen.core.records import Ranges
from batchgen.job.model import InputConfig
from batchgen.source.csv import CsvReader
from batchgen.source.formats import reader_for
from batchgen.source.jsonl import JsonlReader
from batchgen.source.reading import ReadSpec

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXTS = ["Caf\u00e9 \u00df", "na\u00efve", "plain", '"quoted", too']
WIDE = ["\u65e5\u672c\u8a9e", "\U0001f600", "\u0394\u03b5"]
WIDE_ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "gb18030", "utf-7"]


def read(reader, path, **words):
    columns = pa.schema([pa.field(name, pa.string()) for name in words or ("text",)])
    spec = ReadSpec(columns, columns.names, frozenset(columns.names))
    num_rows = reader.scan(path).num_rows
    batches = list(reader.read(path, 0, Ranges.until(num_rows), spec))
    texts = [value and value["text"] for batch in batches for value in batch.values]
    errors = [error for batch in batches for error in batch.errors.values()]
    return texts, errors


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("encoding", [*WIDE_ENCODINGS, "latin-1", "cp1252", "iso8859-15"])
def test_rows_come_as_they_were_written(tmp_path, encoding, suffix):
    texts = TEXTS + (WIDE if encoding in WIDE_ENCODINGS else [])
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(PACK[suffix]("\n".join(lines).encode(encoding)))
    reader = JsonlReader(encoding)
    reader.sniff(str(path))
    assert reader.columns([str(path)], {}).names == ["text"]
    assert read(reader, str(path)) == (texts, [])
    cells = ['"' + text.replace('"', '""') + '"' for text in texts]
    path = tmp_path / f"in.csv{suffix}"
    path.write_bytes(PACK[suffix]("\r\n".join(["text", *cells, ""]).encode(encoding)))
    reader = CsvReader(encoding=encoding)
    reader.sniff(str(path))
    assert read(reader, str(path)) == (texts, [])


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, b""])
def test_a_mark_at_the_start_belongs_to_no_line(tmp_path, mark):
    path = tmp_path / "in.jsonl"
    path.write_bytes(mark + '{"text": "a"}\n{"text": "b"}\n'.encode("utf-16-le"))
    assert read(JsonlReader("utf-16-le"), str(path)) == (["a", "b"], [])


@pytest.mark.parametrize(
    ("encoding", "wrong"), [("utf-16-le", b"\x00\xd8"), ("cp1252", b"\x81"), ("shift_jis", b"\x80")]
)
def test_what_cannot_be_decoded_costs_its_line(tmp_path, encoding, wrong):
    one, two = ('{"text": "', '"}\n')
    bad = one.encode(encoding) + wrong + two.encode(encoding)
    good = f"{one}good{two}".encode(encoding)
    path = tmp_path / "in.jsonl"
    path.write_bytes(good + bad + good)
    texts, (error,) = read(JsonlReader(encoding), str(path))
    assert texts == ["good", None, "good"]
    assert (error.error_type, error.error) == (
        "bad_json",
        f"{path}:2: invalid JSON: not {encoding}",
    )
    path = tmp_path / "in.csv"
    path.write_bytes("text\n1\n".encode(encoding) + wrong + "\n2\n".encode(encoding))
    texts, (error,) = read(CsvReader(encoding=encoding), str(path))
    assert texts == ["1", None, "2"]
    assert (error.error_type, error.error) == (
        "invalid_utf8",
        f"{path}:3: not {encoding}",
    )


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("utf-32", "utf-32"),
        ("utf-32-le", "utf-32-le"),
        ("utf-32-be", "utf-32-be"),
    ],
)
@pytest.mark.parametrize("text", ["plain", "\u65e5\u672c\u8a9e"])
def test_what_looks_like_another_encoding_is_refused(tmp_path, text, encoding, told, name, suffix):
    content = f'{{"text": "{text}"}}\n' if "jsonl" in name else f"text,n\n{text},1\n"
    path = tmp_path / (name + suffix)
    path.write_bytes(PACK[suffix](content.encode(encoding)))
    with pytest.raises(SourceError, match=f'set input.encoding = "{told}"$'):
        reader_for("jsonl" if "jsonl" in name else "csv").sniff(str(path))


@pytest.mark.parametrize("odd", [b"\0\x01\0", b"\0a\0b\0c", b"\0" * 40, b"a\0b\0c\0d\0"])
@pytest.mark.parametrize("shift", [b"", b" "])
def test_zeros_in_a_line_of_utf_8_are_that_lines_affair(tmp_path, odd, shift):
    good = b'{"id": 1, "text": "row"}\n'
    path = tmp_path / "in.jsonl"
    path.write_bytes(shift + good * 5 + odd + b"\n" + good * 5)
    JsonlReader().sniff(str(path))


@pytest.mark.parametrize("name", ["base64", "rot13", "no-such", "idna", "undefined", ""])
def test_what_is_no_encoding_of_text_is_refused(name):
    with pytest.raises(ValueError, match="is none that Python knows, expected such as 'utf-16'"):
        InputConfig(path="a.jsonl", encoding=name)


@pytest.mark.parametrize("name", ["utf-8", "UTF8", "utf_8_sig"])
def test_utf_8_is_what_there_is_without_the_key(name):
    assert InputConfig(path="a.jsonl", encoding=name).encoding is None


def test_parquet_has_no_encoding():
    with pytest.raises(ConfigError, match="is for text, and the input is Parquet; leave it out"):
        reader_for("parquet", encoding="latin-1")
