"""Job files and JSONL of any bytes: an exit code from the list, never a traceback, never a hang.

Job files are mutations of a valid one; JSONL is mutated lines, held against an oracle of a few
lines of plain Python. Examples are the same in every run (`derandomize`), and bounded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import batchgen
from batchgen.core.errors import BatchgenError, ExitCode
from batchgen.source.jsonl import SNIFF_LINES

EXIT_CODES = set(ExitCode)
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

VALID: dict[str, dict[str, Any]] = {
    "input": {"path": "in.jsonl", "limit": 3, "where": "id > 0", "types": {"id": "int64"}},
    "prompt": {"user": "Say {{ text }}", "system": "Be brief"},
    "model": {"backend": "echo", "max_num_seqs": 4, "engine": {"max_steps": 2}},
    "sampling": {"max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "seed": 3},
    "output": {"path": "out", "prefix": "gen_", "rows_per_file": 100},
    "checks": {"allow_truncated": True},
    "gate": {"max_error_rate": 1.0},
    "run": {"flush_rows": 10, "grace_s": 0.5, "stats_s": 2.0, "flush_s": 3},
}
KEYS = [(table, key) for table, keys in VALID.items() for key in keys]

# As TOML text.
WRONG = st.sampled_from(
    [
        "",
        '""',
        "true",
        "[]",
        "{}",
        "-1",
        "0",
        "1e999",
        "nan",
        "-inf",
        "0x10",
        "1979-05-27",
        "'\\x'",
        "99999999999999999999",
        "9" * 5000,
        "1e308",
        "[[]]",
        "[1, 'a']",
        "{a = {b = 1}}",
        "'''",
        '"""',
        '"\\u0000"',
        '"\\ud800"',
        '"\\U0001F600"',
        "'~nobody-of-that-name'",
        "'/'",
        "'..'",
        "'{{'",
        "'{% for %}'",
        "'{{ row }}'",
        "'{{ text * 10**9 }}'",
        "'*'",
        "'['",
        "'s3:'",
        "'://'",
        "'nope://x'",
        "'" + "x" * 5000 + "'",
        "[" * 2000,
        "'id'",
        "'1; DROP TABLE'",
        "'text = ('",
        "'\\'",
        "'a/../b'",
        "'user:password'",
        "'http://u:secretword@h/x'",
        "{password = 'secretword'}",
        "'\t'",
        "'é'",
    ]
)
SOUP = st.text(alphabet="[]{}=.,'\"#\n\r\t \\aé\u202e019-+_", max_size=40)


def toml(job: dict[str, dict[str, Any]], replaced: dict[tuple[str, str], str]) -> list[str]:
    lines = []
    for table, keys in job.items():
        lines.append(f"[{table}]")
        for key, value in keys.items():
            lines.append(f"{key} = {replaced.get((table, key)) or inline(value)}")
    return lines


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {inline(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def outcome_of(place: Path, text: bytes, rows: bytes, *overrides: str) -> tuple[int, str]:
    """Run a job file; anything but our own errors goes through, and fails the test."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        inner = Path(name)
        (inner / "in.jsonl").write_bytes(rows)
        (inner / "job.toml").write_bytes(text)
        try:
            summary = batchgen.run(inner / "job.toml", overrides=overrides)
        except BatchgenError as error:
            return int(error.exit_code), str(error)
        finally:
            shutil.rmtree(inner / "out", ignore_errors=True)
        return summary.exit_code, ""


ROWS = b'{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n'


def test_the_unchanged_job_file_is_right(folder: Path) -> None:
    assert outcome_of(folder, "\n".join(toml(VALID, {})).encode(), ROWS) == (0, "")


@settings(SETTINGS, max_examples=100)
@given(st.dictionaries(st.sampled_from(KEYS), WRONG | SOUP, min_size=1, max_size=2))
@example({("output", "path"): "'x'"})
@example({("prompt", "user"): "'{{ text * 10**9 }}'"})
@example({("input", "path"): "'~nobody-of-that-name/x'"})
@example({("input", "limit"): "9" * 5000})
@example({("input", "types"): "[" * 2000})
@example({("input", "where"): "'" + "(" * 20000 + "'"})
def test_a_value_replaced_by_anything(folder: Path, replaced: dict[tuple[str, str], str]) -> None:
    if ("output", "path") in replaced:
        # Anything else than a folder of the test's own would be somebody's.
        replaced = {**replaced, ("output", "path"): "'out/./x/..'"}
    code, text = outcome_of(folder, "\n".join(toml(VALID, replaced)).encode(), ROWS)
    assert code in EXIT_CODES
    assert code != ExitCode.FAULT, text
    assert "secretword" not in text


@settings(SETTINGS, max_examples=100)
@given(st.data())
def test_lines_of_a_job_file_dropped_doubled_or_soup(folder: Path, data: st.DataObject) -> None:
    lines = toml(VALID, {})
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        change = data.draw(st.sampled_from(["drop", "double", "soup", "cut", "unknown"]))
        if lines[at].startswith('path = "out'):
            continue
        new = {
            "drop": [],
            "double": [lines[at]] * 2,
            "soup": [data.draw(SOUP)],
            "cut": [lines[at][: len(lines[at]) // 2]],
            "unknown": [lines[at], f"{data.draw(st.sampled_from(['pathh', 'é', 'x.y.z']))} = 1"],
        }[change]
        lines[at : at + 1] = new
        lines = lines or [""]
    code, text = outcome_of(folder, "\n".join(lines).encode("utf-8", "replace"), ROWS)
    assert code in {ExitCode.COMPLETE, ExitCode.REFUSED}, text


@settings(SETTINGS, max_examples=60)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-16")))
def test_bytes_that_are_no_job_file(folder: Path, text: bytes) -> None:
    assert outcome_of(folder, text, ROWS)[0] == ExitCode.REFUSED


@settings(SETTINGS, max_examples=80)
@given(
    st.sampled_from([f"{table}.{key}" for table, key in KEYS if key != "path"]) | SOUP,
    WRONG | SOUP,
)
def test_overrides_of_any_kind(folder: Path, key: str, value: str) -> None:
    text = "\n".join(toml(VALID, {})).encode()
    code, said = outcome_of(folder, text, ROWS, f"{key}={value}")
    assert code in {ExitCode.COMPLETE, ExitCode.REFUSED}, said
    assert "secretword" not in said


NUMBERS = st.sampled_from(
    [
        "0",
        "-1",
        "1.5",
        "1e308",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "01",
        "1.",
        "9" * 25,
        "9" * 400,
        "9" * 5000,
        "-" + "9" * 5000,
        "0." + "9" * 5000,
        "1e-999",
        "18446744073709551616",
        "1E400",
    ]
)
VALUES = (
    NUMBERS
    | st.text(max_size=8).map(json.dumps)
    | st.text(max_size=8).map(lambda text: json.dumps(text, ensure_ascii=False))
    | st.sampled_from(
        [r'"\ud800"', r'"\ud83d\ude00"', r'"\u0000"', '"a\x00"', '"a\tb"', "null", "true"]
    )
    | st.sampled_from(
        ["[]", "{}", '{"a": {"b": [1, {}]}}', "[" * 300 + "]" * 300, "[" * 3000 + "]" * 3000]
    )
    | st.sampled_from(
        ["[" * 100_000, '{"a":' * 1100 + "1" + "}" * 1100, '["a", 1e999, ' + "9" * 30 + "]"]
    )
)
OBJECTS = st.builds(
    lambda text, extra: f'{{"id": 7, "text": {text}, "extra": {extra}}}', VALUES, VALUES
)
GOOD = st.text(min_size=1, max_size=12).map(lambda text: json.dumps({"id": 1, "text": f"t{text}"}))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    line = bytearray(draw(GOOD | OBJECTS).encode("utf-8", "surrogatepass")[:2000])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(line)))
        line[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(line).replace(b"\n", b" ")


LINES = st.lists(
    GOOD.map(str.encode)
    | OBJECTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | mutated()
    | st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"?"))
    | st.sampled_from([b"", b"  ", b"\r", b"\xef\xbb\xbf", b"[]", b"null"]),
    max_size=12,
)


ANYTHING = "anything"


def oracle(line: bytes) -> str | None:
    """The text of a line that surely is a good row, as Python's own json reads it."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        value = json.loads(line.decode(), parse_constant=refuse)
        text = value["text"]
        if text is not None and not isinstance(text, str):
            return ANYTHING  # As the template writes it, unless its numbers or levels are too many.
        text.encode()
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    return text if text.strip() else None


def has_wild_numbers(line: bytes) -> bool:
    """Whether other readings of the line are right too: its extra column may be refused."""
    return any(mark in line for mark in (b"extra", b"e9", b"E4")) or len(line) > 1000


# Eighty good rows first, so that a stray kind does not decide a column's type nor what the file is.
HEAD = [json.dumps({"id": n, "text": f"row {n}", "extra": None}).encode() for n in range(80)]


@settings(SETTINGS, max_examples=100)
@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_jsonl_of_any_bytes_is_answered_row_by_row_as_plain_python_says(
    folder: Path, lines: list[bytes], ending: bytes, ends: bool
) -> None:
    lines = HEAD + lines
    content = ending.join(lines) + (ending if ends else b"")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        job = {
            "input": {"path": str(Path(name) / "in.jsonl")},
            "prompt": {"user": "{{ text }}"},
            "model": {"backend": "echo"},
            "sampling": {"max_tokens": 1000, "temperature": 0},
            "output": {"path": str(Path(name) / "out")},
            "gate": {"max_error_rate": 1.0},
        }
        (Path(name) / "in.jsonl").write_bytes(content)
        summary = batchgen.run(job)
        found = batchgen.read(job).select("gen_text", "gen_status").collect().rows()
    physical = content.split(b"\n")
    physical = physical[:-1] if physical[-1] == b"" else physical
    num_blank = sum(not line.strip() for line in physical)
    assert summary.exit_code == ExitCode.COMPLETE
    assert summary.num_planned == len(physical)
    assert summary.num_planned == summary.num_ok + summary.num_errors + summary.num_skipped
    assert summary.num_skipped == num_blank
    told = [line for line in physical if line.strip()]
    assert len(found) == len(told)
    for line, (answer, status) in zip(told, found, strict=True):
        expected = oracle(line)
        if expected is ANYTHING:
            continue
        if expected is None:
            assert status == "error", line
        elif not has_wild_numbers(line) or status == "ok":
            assert (answer, status) == (expected, "ok"), line


@settings(SETTINGS, max_examples=60)
@given(st.lists(st.binary(max_size=30) | OBJECTS.map(str.encode), max_size=SNIFF_LINES + 5))
def test_jsonl_without_one_good_row_is_done_or_refused(folder: Path, lines: list[bytes]) -> None:
    text = "\n".join(toml(VALID, {})).encode()
    code, said = outcome_of(folder, text, b"\n".join(lines))
    assert code in {ExitCode.COMPLETE, ExitCode.REFUSED}, said
