"""Bad inputs, by the numbers that the names of the tests have, on whole jobs.

Proven elsewhere:
    26 in part: token counts, tests/unit/test_engine_encoder.py; 27, 28: test_runner.py, and here
    33, 34: tests/unit/test_planning.py (changed and vanished files, files that come later)
    39, 40: the sweep of failed system calls and tests/unit/test_storage.py
    44, 45, 46: tests/e2e/test_resume.py and the kill loop; 47 to 51: the engine's fault tests
    56: tests/unit/test_sandbox.py (75 attacks); here one of them through a whole job
    59, 60: tests/unit/test_config.py names every kind of credential; here the canary
    63, 64: tests/e2e/test_resume.py, tests/unit/test_ledger.py; 65: tests/e2e/test_resume.py
Not built yet, so that there is nothing to prove: 41, 42, 43 (object stores as output).
52 (clocks): every timer is monotonic, held by a test of the source text below.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen.core.errors import BatchgenError
from tests.e2e.support import command, run_cli, write_job, write_rows

GOOD = b'{"id": 1, "text": "good"}\n'
LAST = b'{"id": 2, "text": "last"}\n'


def job_of(folder: Path, **tables: dict[str, Any]) -> dict[str, Any]:
    """Tables of a job over `in.jsonl`; errors of rows do not stop it."""
    job: dict[str, dict[str, Any]] = {
        "input": {"path": str(folder / "in.jsonl")},
        "prompt": {"user": "{{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 40, "temperature": 0},
        "output": {"path": str(folder / "out")},
        "checks": {"allow_truncated": True},
        "gate": {"max_error_rate": 1.0},
    }
    for name, keys in tables.items():
        job[name] = {**job.get(name, {}), **keys}
    return job


def run(job: dict[str, Any]) -> tuple[int, str]:
    """Exit code, and the error's text if there is one; anything but our own errors fails."""
    try:
        return batchgen.run(job).exit_code, ""
    except BatchgenError as error:
        return int(error.exit_code), str(error)


def rows_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    return batchgen.read(job).collect().to_dicts()


@pytest.mark.parametrize(
    ("number", "line", "answer"),
    [
        (9, b'{"id": 36893488147419103232, "text": "a"}', "a"),
        (12, b'{"id": "three", "text": "a"}', "a"),
        (24, b'{"id": 3, "text": ["a"]}', "['a']"),
        (24, b'{"id": 3, "text": 5}', "5"),
    ],
)
def test_a_value_of_another_kind_is_answered_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, line: bytes, answer: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + line + b"\n" + GOOD * 25 + LAST)
    job = job_of(tmp_path)
    assert run(job) == (0, ""), number
    assert "is mixed and is carried as" in capsys.readouterr().err
    assert [row["gen_text"] for row in rows_of(job)] == ["good", answer, *["good"] * 25, "last"]


@pytest.mark.parametrize(
    ("number", "line", "error_type", "error"),
    [
        (1, b'{"id": 3, "text": ', "bad_json", "in.jsonl:2: invalid JSON"),
        (1, b"plain text", "bad_json", "in.jsonl:2: invalid JSON"),
        (3, b'["text"]', "not_an_object", "in.jsonl:2: expected a JSON object, found list"),
        (3, b'"text"', "not_an_object", "found string"),
        (3, b"7", "not_an_object", "found integer"),
        (3, b"null", "not_an_object", "found null"),
        (
            5,
            b'{"id": 3, "text": "\xff\xfe"}',
            "bad_json",
            "2: invalid JSON: not UTF-8",
        ),
        (6, b'{"id": 3, "text": "a\x00b"}', "bad_json", "in.jsonl:2"),
        (6, b'{"id": 3, "text": "a\x1bb"}', "bad_json", "in.jsonl:2"),
        (7, rb'{"id": 3, "text": "\ud800"}', "bad_json", "in.jsonl:2"),
        (8, b'{"id": NaN, "text": "a"}', "bad_json", "in.jsonl:2"),
        (8, b'{"id": Infinity, "text": "a"}', "bad_json", "in.jsonl:2"),
        (9, b'{"id": ' + b"9" * 5000 + b', "text": "a"}', "bad_json", "in.jsonl:2"),
        (10, b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "bad_json", "in.jsonl:2"),
        (10, b'{"text": ' + b"[" * 500_000, "bad_json", "in.jsonl:2"),
        (13, b'{"text": "' + b"x" * (65 << 20) + b'"}', "line_too_long", "longer than 64 MiB"),
        (23, b'{"id": 3, "text": null}', "null_value", "text"),
        (23, b'{"id": 3}', "null_value", "text"),
        (23, b'{"id": 3, "text": "  "}', "empty_prompt", "renders to nothing"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, int | bytes) else "",
)
def test_a_bad_line_costs_its_row_and_no_other(
    tmp_path: Path, number: int, line: bytes, error_type: str, error: str
) -> None:
    good = GOOD * 25  # A line of another kind must not decide a column's type.
    (tmp_path / "in.jsonl").write_bytes(GOOD + line + b"\n" + good + LAST)
    job = job_of(tmp_path)
    assert run(job) == (0, ""), number
    first, bad, *rest = rows_of(job)
    assert first["gen_text"] == "good"
    assert [row["gen_text"] for row in rest] == ["good"] * 25 + ["last"]
    assert (bad["gen_status"], bad["gen_error_type"]) == ("error", error_type)
    assert error in bad["gen_error"]


@dataclass(frozen=True)
class Accepted:
    """A job that runs to its end; `texts` are its answers in order."""

    number: int
    files: dict[str, bytes]
    texts: list[str]
    path: str = "in.jsonl"
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_skipped: int = 0


ACCEPTED = [
    Accepted(2, {"in.jsonl": GOOD + b"\n  \n" + LAST}, ["good", "last"], num_skipped=2),
    Accepted(4, {"in.jsonl": b"\xef\xbb\xbf" + GOOD + LAST}, ["good", "last"]),
    Accepted(6, {"in.jsonl": rb'{"text": "a\u0001b"}'}, ["a\x01b"]),
    Accepted(11, {"in.jsonl": b'{"text": "first", "text": "second"}'}, ["second"]),
    Accepted(17, {"in.jsonl.gz": gzip.compress(GOOD) + gzip.compress(LAST)}, ["good", "last"], "*"),
    Accepted(18, {"in.jsonl": b""}, [], tables={"prompt": {"user": "{{ row }}"}}),
    Accepted(25, {"in.jsonl": GOOD + GOOD}, ["good", "good"]),
    Accepted(53, {"in.jsonl": rb'{"id": "../../../etc/x\u0000", "text": "a"}'}, ["a"]),
    Accepted(
        55, {"in.jsonl": GOOD}, ["${HOME} good"], tables={"prompt": {"user": "${HOME} {{ text }}"}}
    ),
    Accepted(
        8,
        {"in.jsonl": b'{"x": 1e308, "text": "a"}\n{"x": 0.1, "text": "b"}'},
        ["1e+308a", "0.1b"],
        tables={"prompt": {"user": "{{ x }}{{ text }}"}},
    ),
    Accepted(
        9,
        {"in.jsonl": b'{"x": 36893488147419103233, "text": "a"}'},
        ["36893488147419103233a"],
        tables={"prompt": {"user": "{{ x }}{{ text }}"}},
    ),
]


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: str(case.number))
def test_what_is_odd_but_right_is_accepted(tmp_path: Path, case: Accepted) -> None:
    for name, content in case.files.items():
        (tmp_path / name).write_bytes(content)
    job = job_of(tmp_path, **{"input": {"path": str(tmp_path / case.path)}, **case.tables})
    summary = batchgen.run(job)
    assert summary.exit_code == 0
    assert summary.num_skipped == case.num_skipped
    assert [row["gen_text"] for row in rows_of(job)] == case.texts
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*case.files, "out"])


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def repeated_names() -> bytes:
    return parquet(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))


REFUSED = [
    (14, "in.jsonl", b'{\n  "text": "a"\n}\n' * 30, "not JSONL? it looks like pretty-printed JSON"),
    (14, "in.jsonl", b'[{"text": "a"}]', "not JSONL? it looks like a JSON array"),
    (14, "in.jsonl", b"bad line\n" * 20 + GOOD, "not JSONL? it looks like plain text"),
    (15, "in.jsonl.gz", gzip.compress(GOOD * 50_000)[:-20], "input ends early: the gzip stream"),
    (16, "in.jsonl.gz", GOOD, "is not gzip, though its name says so"),
    (16, "in.jsonl.gz", gzip.compress(GOOD) + b"garbage", "or more follows it"),
    (16, "in.jsonl", gzip.compress(GOOD), "it looks like gzip; add .gz to its name"),
    (19, "other.txt", b"", "in.jsonl: names no file, expected at least one"),
    (
        21,
        "in.jsonl",
        b'{"id": 1, "txt": "a"}',
        "no column 'text' in the input, did you mean 'txt'",
    ),
    (22, "in.jsonl", b'{"id": 1}', "no column 'text' in the input, it has: id"),
    (30, "in.parquet", repeated_names(), "repeats the columns ['text'], expected every name once"),
    (31, "in.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "is not readable as Parquet"),
    (31, "in.parquet", b"PARE" + b"x" * 100 + b"PARE", "encrypted Parquet"),
    (31, "in.parquet", parquet(pa.table({"text": ["a"]}))[:-9], "in.parquet: "),
]


@pytest.mark.parametrize(
    ("number", "name", "content", "message"), REFUSED, ids=lambda value: str(value)[:16]
)
def test_an_input_that_is_not_what_it_says_is_refused_before_the_engine(
    tmp_path: Path, number: int, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    path = name if name != "other.txt" else "in.jsonl"
    code, text = run(job_of(tmp_path, input={"path": str(tmp_path / path)}))
    assert (code, message in text) == (2, True), (number, text)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_20_nothing_is_left_to_do_for_a_second_run(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + LAST)
    job = job_of(tmp_path)
    assert run(job) == (0, "")
    assert batchgen.run(job).state == "nothing_to_do"


def test_26_to_28_long_prompts_are_errors_and_cut_answers_are_not(tmp_path: Path) -> None:
    long = json.dumps({"id": 2, "text": "x" * 500}).encode() + b"\n"
    (tmp_path / "in.jsonl").write_bytes(GOOD + long + LAST)
    model = {"max_model_len": 100}
    job = job_of(tmp_path, model=model, sampling={"max_tokens": 2})
    assert run(job) == (0, "")
    first, second, third = rows_of(job)
    assert (first["gen_status"], first["gen_finish_reason"], first["gen_text"]) == (
        "ok",
        "length",
        "go",
    )
    assert (second["gen_status"], second["gen_error_type"]) == ("error", "prompt_too_long")
    assert third["gen_status"] == "ok"


def test_29_parquet_types_pass_through_unchanged(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b"], pa.large_string()),
            "view": pa.array(["c", None], pa.string_view()),
            "dictionary": pa.array(["d", "d"]).dictionary_encode(),
            "decimal": pa.array([1, 2], pa.decimal128(30, 2)),
            "time": pa.array([1000, 2000], pa.timestamp("ns")),
            "nested": pa.array([{"l": [{"x": 1}]}, None]),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    job = job_of(tmp_path, input={"path": str(tmp_path / "in.parquet")})
    assert run(job) == (0, "")
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    found = pq.read_table(part)
    for name in ("text", "decimal", "time", "nested"):
        assert found.schema.field(name).type == table.schema.field(name).type
        assert found[name].to_pylist() == table[name].to_pylist()
    assert found["view"].to_pylist() == ["c", None]
    assert found["dictionary"].to_pylist() == ["d", "d"]


def test_32_files_with_different_columns_are_refused_with_the_difference(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": ["x"]}), tmp_path / "b.parquet")
    code, text = run(job_of(tmp_path, input={"path": str(tmp_path / "*.parquet")}))
    assert code == 2
    assert "'n' is" in text
    assert "b.parquet" in text


def test_35_an_output_that_is_a_file_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    code, text = run(job_of(tmp_path))
    assert (code, "out: is a file, expected a folder" in text) == (2, True)
    code, text = run(job_of(tmp_path, output={"path": str(tmp_path / "out" / "deeper")}))
    assert (code, "out: is a file, expected a folder" in text) == (2, True)
    code, text = run(job_of(tmp_path, output={"path": "/proc/batchgen"}))
    assert code in {1, 2}
    assert "/proc/batchgen" in text


def test_36_an_output_with_files_of_others_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine", encoding="utf-8")
    code, text = run(job_of(tmp_path))
    assert (code, "holds files that are not batchgen's" in text) == (2, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_37_an_output_that_holds_the_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    code, text = run(job_of(tmp_path, output={"path": str(tmp_path)}))
    assert code == 2
    assert "in.jsonl" in text or "not batchgen's" in text
    assert (tmp_path / "in.jsonl").read_bytes() == GOOD


def test_38_an_input_may_be_a_link_and_so_may_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_bytes(GOOD)
    (tmp_path / "in.jsonl").symlink_to(tmp_path / "real.jsonl")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    job = job_of(tmp_path)
    assert run(job) == (0, "")
    assert [row["gen_text"] for row in rows_of(job)] == ["good"]
    assert run(job) == (0, "")


def test_54_a_wrong_job_is_refused_with_every_mistake(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    job = job_of(tmp_path, run={"flush_row": 5, "flush_rows": "x"}, sampling={"max_tokens": 10**30})
    code, text = run(job)
    assert code == 2
    assert "run.flush_row: unknown key, did you mean 'flush_rows'?" in text
    assert "run.flush_rows: 'x' is wrong" in text


def test_56_a_bomb_in_a_template_costs_its_row(tmp_path: Path) -> None:
    lines = [{"text": "a", "n": 2}, {"text": "b", "n": 10**9}, {"text": "c", "n": 1}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    job = job_of(tmp_path, prompt={"user": "{{ text * n }}"})
    assert run(job) == (0, "")
    found = rows_of(job)
    assert [row["gen_text"] for row in found] == ["aa", None, "c"]
    assert found[1]["gen_error"] == "the template makes more than 16,777,216 characters"


def test_57_58_code_and_pickles_of_a_model_are_off_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"")
    code, text = run(job_of(tmp_path, model={"backend": "vllm", "name": str(folder)}))
    assert (code, "set model.allow_pickle = true" in text) == (2, True), text
    hub = {"backend": "vllm", "name": "org/model", "trust_remote_code": True, "revision": "main"}
    code, text = run(job_of(tmp_path, model=hub))
    assert (code, "model.revision has to be the commit" in text) == (2, True), text


CANARIES = {
    "HF_TOKEN": "hf_canary0123456789canary0123456789xx",
    "AWS_SECRET_ACCESS_KEY": "canaryAWS/0123456789/canary",
    "AWS_SESSION_TOKEN": "canarySESSION0123456789",
    "AZURE_STORAGE_ACCOUNT_KEY": "canaryAZURE0123456789==",
}


@pytest.mark.parametrize("refused", [False, True])
def test_59_to_62_secrets_and_prompts_reach_no_file_and_no_screen(
    tmp_path: Path, *, refused: bool
) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + b'{"id": 3, "text": \n' + b'{"text": null}\n' + LAST)
    job = job_of(tmp_path)
    if refused:
        job["input"]["path"] = f"s3://user:{CANARIES['AWS_SECRET_ACCESS_KEY'][:9]}@bucket/x.jsonl"
        job["model"]["engine"] = {"hf_token": CANARIES["HF_TOKEN"]}
    toml = "\n".join(
        f"[{name}]\n" + "\n".join(f"{k} = {_toml(v)}" for k, v in keys.items())
        for name, keys in job.items()
    )
    (tmp_path / "job.toml").write_text(toml, encoding="utf-8")
    said = ""
    for verb in ("check", "run", "status", "show"):
        done = subprocess.run(
            command(verb, tmp_path / "job.toml"),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **CANARIES},
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == (2 if refused else 0), done.stderr
        said += done.stdout + done.stderr
    assert ("HF_TOKEN" in said) == refused
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert bool(written) != refused
    kept = said.encode() + b"".join(path.read_bytes() for path in written)
    for name, value in CANARIES.items():
        assert value.encode() not in kept, name
        assert value[:9].encode() not in said.encode(), name
    for path in written:
        if "runs" in path.parts and path.suffix in {".log", ".json", ".jsonl"}:
            assert b"good" not in path.read_bytes(), f"{path} holds a prompt"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


def test_52_no_decision_is_taken_from_the_clock_on_the_wall() -> None:
    package = Path(batchgen.__file__).parent
    for path in package.rglob("*.py"):
        # `--until` is a time of that clock, and so are a server's Retry-After and a bucket's moment
        # of writing, by which `status` tells people whether a run lives. The Batch API tells its
        # clients when a batch and a file end, by that clock.
        is_api = path.parent.name == "serve"
        if is_api or path.name in {"deadline.py", "server.py", "remote.py"}:
            continue
        assert "time.time(" not in path.read_text(encoding="utf-8"), path


def test_62_the_state_of_a_job_is_nobody_elses_business(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    assert run(job_of(tmp_path)) == (0, "")
    state = tmp_path / "out" / "_batchgen"
    assert state.stat().st_mode & 0o022 == 0
    for name in ("parts", "runs", "rows", "keys"):  # What is no reader's.
        assert (state / name).stat().st_mode & 0o077 == 0


def test_18_an_empty_input_still_has_the_outputs_columns(tmp_path: Path) -> None:
    pl.DataFrame({"text": []}, schema={"text": pl.String}).write_parquet(tmp_path / "in.parquet")
    job = job_of(tmp_path, input={"path": str(tmp_path / "in.parquet")})
    assert run(job) == (0, "")
    assert batchgen.read(job).collect_schema().names()[:3] == ["text", "gen_text", "gen_status"]


def test_a_text_too_long_for_the_screen_is_cut_in_errors(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    code, text = run(job_of(tmp_path, output={"path": str(tmp_path / ("x" * 5000))}))
    assert code == 2
    assert len(text) < 1000


@pytest.mark.parametrize("place", ["", "/parts", "/runs"])
def test_working_state_that_is_a_link_is_refused(tmp_path: Path, place: str) -> None:
    """Catalogue 38: nothing is ever written where a link in the output leads."""
    write_rows(tmp_path / "in.jsonl", 5)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    state = tmp_path / "out" / "_batchgen"
    (state.parent if not place else state).mkdir(parents=True)
    Path(f"{state}{place}").symlink_to(elsewhere)
    done = run_cli("run", write_job(tmp_path, "in.jsonl"))
    assert done.returncode == 2
    assert "is a link, expected a folder" in done.stderr
    assert list(elsewhere.iterdir()) == []


def test_lines_that_an_open_quote_swallows_are_error_rows_with_their_lines(tmp_path: Path) -> None:
    lines = [f"{n},line {n}" for n in range(1000)]
    lines[299] = '299,"never closed'
    lines[699] = '699,24" wide "'
    (tmp_path / "in.csv").write_text("id,text\n" + "\n".join(lines) + "\n")
    job = job_of(tmp_path, input={"path": str(tmp_path / "in.csv")})
    assert run(job) == (0, "")
    rows = batchgen.read(job).collect().to_dicts()
    assert len(rows) == 1000
    bad = {at: row for at, row in enumerate(rows) if row["gen_error"] is not None}
    assert list(bad) == list(range(299, 700))
    assert all(f"in.csv:{at + 2}: bad CSV: lines 301 to 701 " in bad[at]["gen_error"] for at in bad)
    good = [row for at, row in enumerate(rows) if at not in bad]
    assert all(row["text"] == f"line {row['id']}" for row in good)
    assert run(job) == (0, "")
