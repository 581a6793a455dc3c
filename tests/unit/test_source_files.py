"""Which files make the input; words for types."""

import pyarrow as pa
import pytest

from batchgen.core.errors import ConfigError, SourceError
from batchgen.source.columns import is_json, kind_word, parse_field, type_word
from batchgen.source.csv import CsvReader
from batchgen.source.files import find_files, reader_for
from batchgen.source.jsonl import JsonlReader
from batchgen.source.parquet import ParquetReader


def touch(tmp_path, *names: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()


def test_files_come_in_the_order_of_the_list_sorted_within_a_pattern(tmp_path):
    touch(tmp_path, "b/2.jsonl", "b/1.ndjson", "b/.x", "b/_y", "a/9.jsonl.gz", "a/1.JSON.zst")
    format_name, files = find_files([f"{tmp_path}/b", f"{tmp_path}/a/*", f"{tmp_path}/b/2.jsonl"])
    names = ["b/1.ndjson", "b/2.jsonl", "a/1.JSON.zst", "a/9.jsonl.gz"]
    assert (format_name, files) == ("jsonl", [f"{tmp_path}/{name}" for name in names])


@pytest.mark.parametrize(
    ("name", "format_name"),
    [("a.csv", "csv"), ("a.tsv.gz", "csv"), ("a.parquet", "parquet"), ("a.pq", "parquet")],
)
def test_the_suffix_tells_the_format(tmp_path, name, format_name):
    touch(tmp_path, name)
    assert find_files([f"{tmp_path}/{name}"])[0] == format_name


def test_a_given_format_needs_no_suffix(tmp_path):
    touch(tmp_path, "part-0", "part-1.x")
    assert find_files([f"{tmp_path}/part-*"], "jsonl")[0] == "jsonl"


@pytest.mark.parametrize(
    ("names", "pattern", "format_name", "text"),
    [
        ([], "*.jsonl", None, "names no file, expected at least one; check the path"),
        ([], "a.jsonl", None, "names no file, expected at least one; check the path"),
        (["a.txt"], "*", None, "a.txt: has a suffix that names no format, expected .jsonl"),
        (["a.parquet.gz"], "*", None, "has a suffix that names no format"),
        (["a.jsonl"], "*", "jsnl", r"unknown format 'jsnl'; did you mean 'jsonl'\?"),
        (["a.csv", "b.jsonl"], "*", None, "b.jsonl: is jsonl, but .*a.csv is csv, expected one"),
    ],
)
def test_what_is_no_input_is_refused(tmp_path, names, pattern, format_name, text):
    touch(tmp_path, *names)
    with pytest.raises(SourceError, match=text):
        find_files([f"{tmp_path}/{pattern}"], format_name)


def test_no_paths_are_refused():
    with pytest.raises(SourceError, match="names no file, expected at least one"):
        find_files([])


def test_every_format_has_its_reader():
    readers = [type(reader_for(name)) for name in ("jsonl", "csv", "parquet")]
    assert readers == [JsonlReader, CsvReader, ParquetReader]


@pytest.mark.parametrize("word", ["string", "bool", "int32", "int64", "float64", "json"])
def test_type_words_come_back(word):
    field = parse_field("a", word)
    assert (field.name, type_word(field), is_json(field)) == ("a", word, word == "json")


def test_unknown_type_words_are_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"unknown type 'sting' for column 'a'; did you mean 'st"):
        parse_field("a", "sting")


def test_all_unknown_type_words_are_reported_at_once(tmp_path):
    touch(tmp_path, "a.jsonl")
    with pytest.raises(ConfigError) as caught:
        JsonlReader().columns([f"{tmp_path}/a.jsonl"], {"a": "sting", "b": "int", "c": "json"})
    assert caught.value.where == "input.types"
    assert caught.value.problems == (
        "unknown type 'sting' for column 'a'; did you mean 'string'?",
        "unknown type 'int' for column 'b'; did you mean 'int64'?",
    )


def test_words_for_what_was_found():
    assert type_word(pa.field("a", pa.list_(pa.int8()))) == "list<item: int8>"
    values = [None, "a", True, 1, 1.5, [], {}]
    words = ["null", "string", "bool", "integer", "float", "list", "object"]
    assert [kind_word(value) for value in values] == words
