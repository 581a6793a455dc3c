"""What can be asked of a job before it was run, of a wrong place, and while the gate holds it."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from typing import TYPE_CHECKING

import pytest

import batchgen
from batchgen.core.errors import ConfigError, GateError
from batchgen.store.books import STATE
from tests.e2e.support import run_cli, write_job, write_rows

if TYPE_CHECKING:
    from pathlib import Path

STEERS = "\x1b]0;owned\x07\x9b2J\u202eb\ra"
OVER = ["gate.max_error_rate=0.001"]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", 60)
    return write_job(tmp_path, "in.jsonl")


def test_a_job_that_was_never_run_says_so_to_each_command(job: Path) -> None:
    out = job.parent / "out"
    not_yet = f"the job has not been run yet; start it with `batchgen run {job}`"
    told = {name: run_cli(name, job) for name in ("status", "show", "snapshots", "verify")}
    ends = {name: (done.returncode, done.stdout, done.stderr) for name, done in told.items()}
    assert ends == {
        "status": (0, f"{out}\n  state    new: {not_yet}\n", ""),
        "show": (0, "", f"{out}: {not_yet}\n"),
        "snapshots": (0, "", f"{out}: {not_yet}\n"),
        "verify": (2, "", f"batchgen: {out}: nothing to verify, {not_yet}\n"),
    }


def test_a_folder_that_holds_no_job_is_refused_by_that_name(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    problem = (
        f"{foreign}: holds no batchgen job (no {STATE}/ in it), expected a job file or an output "
        "folder"
    )
    done = run_cli("status", foreign)
    assert (done.returncode, done.stderr) == (2, f"batchgen: {problem}\n")
    with pytest.raises(ConfigError) as caught:
        batchgen.read(foreign)
    assert str(caught.value) == problem
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError) as caught:
        batchgen.read(nowhere)
    assert str(caught.value) == (
        f"{nowhere}: does not exist, expected a job file or an output folder"
    )


def test_status_of_a_job_that_is_held_back_says_what_readers_see(job: Path) -> None:
    with pytest.raises(GateError):
        batchgen.run(job, overrides=OVER)
    told = run_cli("status", job)
    assert told.returncode == 3
    assert "  snapshot nothing is published yet" in told.stdout.splitlines()
    assert run_cli("snapshots", job).stderr == "nothing is published yet\n"
    batchgen.run(job)
    with pytest.raises(GateError):
        batchgen.run(job, fresh=True, overrides=OVER)
    lines = run_cli("status", job).stdout.splitlines()
    assert lines[1].startswith("  state    held back by the gate; the last run: over_limit, ")
    (line,) = [line for line in lines if line.startswith("  snapshot ")]
    assert line.startswith("  snapshot 1 of 20")
    assert line.endswith("+00:00: 59 ok, 1 errors")
    batchgen.run(job)
    told = run_cli("status", job)
    assert (told.returncode, "snapshot" in told.stdout) == (0, False)


def steering(text: str) -> set[str]:
    return {c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e")}


def test_nothing_that_is_printed_of_data_steers_the_terminal(tmp_path: Path) -> None:
    name = STEERS.replace("/", "")
    source = tmp_path / f"in{name}.jsonl"

    def write(*texts: str) -> None:
        rows = [{"id": at, "text": text, STEERS: text} for at, text in enumerate(texts)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write(STEERS, "a")
    job = write_job(tmp_path, "in*.jsonl", sampling={"max_tokens": 100})
    shown = [run_cli(verb, job) for verb in ("check", "plan", "run", "status", "show", "verify")]
    write(f"b{STEERS}", f"a{STEERS}")
    shown += [run_cli("run", job), run_cli("diff", job), run_cli("snapshots", job)]
    assert [done.returncode for done in shown] == [0] * 9, shown
    wrong = ["show", tmp_path / STEERS], ["check", job, "--set", f"prompt.user={{{{ {STEERS} }}}}"]
    shown += [run_cli(*words) for words in (*wrong, ["diff", job, "--on", f"no{STEERS}"], [STEERS])]
    assert [done.returncode for done in shown[9:]] == [2] * 4, shown
    for done in shown:
        assert not steering(done.stdout + done.stderr), done
    assert "\\x1b]0;owned" in shown[4].stdout
    done = run_cli("diff", job, "--json")
    assert STEERS in json.loads(done.stdout)["examples"][0]["columns"]["text"][0]


def test_a_hint_is_a_command_that_works(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 60)
    folder = tmp_path / "it's here"
    folder.mkdir()
    (tmp_path / "in.jsonl").rename(folder / "in.jsonl")
    job = write_job(folder, "in.jsonl")
    job = job.rename(folder / "a job.toml")
    given = ["--set", "output.path=other {date}", "--date", "2026-01-31"]
    done = run_cli("run", job, *given)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  see ")]
    _, program, *words = shlex.split(line)
    seen = run_cli(*words)
    assert (program, seen.returncode, "error" in seen.stdout) == ("batchgen", 0, True), seen
    over = ["--set", "gate.max_error_rate=0.001", "--set", "sampling.max_tokens=1"]
    over += ["--set", "checks.allow_truncated=false"]
    refused = run_cli("run", job, *given, "--fresh", *over)
    hints = re.findall(r"`batchgen ([^`]*)`", refused.stderr)
    again = [run_cli(*shlex.split(hint)) for hint in hints]
    assert [done.returncode for done in again] == [0, 3], again  # As before: truncated.
    assert "truncated" in again[0].stdout
    assert again[1].stderr.splitlines()[-1] == refused.stderr.splitlines()[-1]


def test_in_python_a_hint_is_pythons(job: Path) -> None:
    over = [*OVER, "sampling.max_tokens=1", "checks.allow_truncated=false"]
    texts = dict(text.split("=", 1) for text in over)
    told = {key: tomllib.loads(f"value = {text}")["value"] for key, text in texts.items()}
    with pytest.raises(GateError) as caught:
        batchgen.run(job, overrides=over)
    (hint,) = re.findall(r"`batchgen(\.run[^`]*)`", str(caught.value))
    assert hint == f".run({str(job)!r}, overrides={told!r}, retry_errors=True)"
    assert "publish_anyway=True" in str(caught.value)
    tables = tomllib.loads(job.read_text())
    tables["input"]["path"] = str(job.parent / tables["input"]["path"])
    tables["output"]["path"] = str(job.parent / "mapped")
    with pytest.raises(GateError) as caught:
        batchgen.run(tables, overrides=over)
    (shows,) = re.findall(r"`batchgen\.(show[^`]*)`", str(caught.value))
    assert shows == f"show(job, overrides={told!r}, errors=True)"
    found = batchgen.show(tables, overrides=over, errors=True)
    assert "truncated" in str(found)


def test_what_of_the_input_is_left_out_is_said_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    for name in ("a.jsonl", "_b.jsonl"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_rows(tmp_path / "in" / name, 3)
    job = write_job(tmp_path, "in")
    for state in ("complete", "nothing to do"):
        done = run_cli("run", job)
        assert state in done.stdout
        assert "_b.jsonl left out" in done.stdout
    assert "_b.jsonl left out" in run_cli("plan", job).stdout


@pytest.mark.parametrize("verb", ["check", "show", "diff"])
def test_fewer_rows_than_none_are_refused(job: Path, verb: str) -> None:
    done = run_cli(verb, job, "-n", -1)
    assert (done.returncode, "-1 is not in the range" in done.stderr) == (2, True), done


def test_diff_of_folders_names_compare(job: Path) -> None:
    done = run_cli("diff", job, "out/a", "out/b")
    assert done.returncode == 2
    assert f"for two outputs: batchgen compare {job} out/a" in " ".join(done.stderr.split())
