"""What the commands print and how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

import batchgen
from batchgen import cli
from batchgen.cli.run import _ended
from batchgen.core.runtime import stop_on_signals
from batchgen.pipeline.context import StopSwitch, Summary, ask_to_stop
from batchgen.store.books import STATE
from tests.e2e.support import command, run_cli, wait_until, write_job, write_rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOW = {"backend": "echo", "engine": {"max_num_seqs": 1, "step_s": 0.02}}
"""A job of 20 ms a row."""


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from batchgen.cli import cli; cli(['run', '--help'], standalone_mode=False); "
        "heavy = {'vllm', 'torch', 'ray', 'pyarrow', 'polars', 'transformers', 'pydantic'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_pandas_is_imported_for_nobody_but_who_asks_for_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 20)
    job = write_job(tmp_path, "in.jsonl")
    code = (
        "import contextlib, sys; from batchgen.cli import cli\n"
        f"with contextlib.suppress(SystemExit): cli(['run', {str(job)!r}])\n"
        "assert 'pandas' not in sys.modules; "
        "import pyarrow; print(pyarrow.table({'a': [7]}).to_pandas())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[-1]) == (0, "7"), done.stderr


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_every_command_has_a_sentence_and_an_example(name: str) -> None:
    text = cli.cli.commands[name].help or ""
    assert text.split("\n")[0].endswith(".")
    assert f"Example: batchgen {name}" in text


def test_check_shows_columns_and_prompts_and_loads_no_engine(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 60)
    shown = run_cli("check", write_job(tmp_path, "in.jsonl"), "-n", "50")
    assert shown.returncode == 0
    assert "columns  id: int64, text: string" in shown.stdout
    assert "--- row 1\n[user]\nRepeat: row 1 lorem" in shown.stdout
    assert "--- row 49\nbad_json" in shown.stdout
    assert not (tmp_path / "out").exists()


def test_a_column_whose_name_has_lines_fakes_none_of_check(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a", "x\nrecipe   no": 1}) + "\n")
    shown = run_cli("check", write_job(tmp_path, "in.jsonl")).stdout
    assert "columns  text: string, x\\nrecipe   no: int64\n" in shown
    assert "carried  text, x\\nrecipe   no\n" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prompt.user={{ txet }}", "no column 'txet' in the input, did you mean 'text'?"),
        ("prompt.user={{ text ", "template error in line 1"),
        ("input.path=nowhere.jsonl", "nowhere.jsonl"),
        ("input.colums=x", "input.colums: unknown key, did you mean 'columns'?"),
        ("input.where=id +", "where"),
        ("model.engine.max_num_sqs=3", "did you mean 'max_num_seqs'?"),
        ("model.backend=vllm", "name is missing"),
        ("output.prefix=", "text"),
    ],
)
def test_a_wrong_job_is_refused_in_one_message_with_exit_2(
    tmp_path: Path, change: str, message: str
) -> None:
    write_rows(tmp_path / "in.jsonl", 10)
    job = write_job(tmp_path, "in.jsonl")
    done = run_cli("run", job, "--set", change)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 10)
    job = write_job(tmp_path, "in.jsonl", model={"backend": "vllm", "name": "./no-model"})
    done = run_cli("run", job)
    assert done.returncode == 2
    assert "no-model' does not exist, expected a model's folder or hub id" in done.stderr


def test_status_follows_a_job(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 100)
    job = write_job(tmp_path, "in.jsonl")
    assert "new" in run_cli("status", job).stdout
    run_cli("run", job, "--set", "gate.max_error_rate=0.001")
    held_back = run_cli("status", job, "--json").stdout
    assert '"state": "held_back"' in held_back
    assert '"num_durable": 100' in held_back
    run_cli("run", job)
    complete = run_cli("status", job.parent / "out", "--json").stdout
    assert '"state": "complete"' in complete


def test_show_prints_rows_without_the_ledgers_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 100)
    job = write_job(tmp_path, "in.jsonl")
    run_cli("run", job)
    shown = run_cli("show", job, "-n", "1").stdout
    assert "row 0" in shown
    assert "_batchgen" not in shown
    assert run_cli("show", job, "--errors").stdout.count("bad_json") == 2
    # Rows are the plan's, whatever the job file says by now.
    for source in ([job, "--set", "output.prefix=my_"], [tmp_path / "out"]):
        assert run_cli("show", *source, "--errors").stdout.count("bad_json") == 2


def test_an_unknown_option_is_refused_with_exit_2(tmp_path: Path) -> None:
    done = run_cli("run", tmp_path / "job.toml", "--frehs")
    assert done.returncode == 2
    assert "--fresh" in done.stderr


# --- the last line of `run --json`: one object, however it ends ---------------------------------


def object_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Whatever is on stdout: one line, one object, and true to the exit code."""
    assert done.stdout.endswith("\n"), done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found.keys() == {*Summary("", 0).as_dict()}
    assert found["exit_code"] == done.returncode
    return found


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", 60)
    return write_job(tmp_path, "in.jsonl")


def test_json_of_a_run_that_completes_and_of_one_with_nothing_to_do(job: Path) -> None:
    first = object_of(run_cli("run", job, "--json"))
    assert (first["state"], first["exit_code"], first["num_planned"]) == ("complete", 0, 60)
    again = object_of(run_cli("run", job, "--json"))
    assert (again["state"], again["exit_code"]) == ("nothing_to_do", 0)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--set", "input.colums=x"], "input.colums: unknown key, did you mean 'columns'?"),
        (["--set", "input.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["--fresh", "--retry-errors"], "expected one of them"),
        (["--fresh", "--accept-recipe"], "fresh begins anew by any recipe"),
        (["--only-errors"], "expected accept_recipe with it"),
        (["--frehs"], "No such option"),
        (["--until", "noon-ish"], "Invalid value for '--until': 'noon-ish' is no time"),
        (["--max-runtime", "a while"], "Invalid value for '--max-runtime'"),
        (["--max-runtime", "0s"], "'0s' is nothing, expected more than 0, such as 5h or 90m"),
        (["--date", "yesterday"], "Invalid value for '--date'"),
    ],
)
def test_json_of_a_run_that_is_refused(job: Path, args: list[str], reason: str) -> None:
    done = run_cli("run", job, "--json", *args)
    found = object_of(done)
    assert (found["state"], found["exit_code"]) == ("refused", 2)
    assert reason in found["reason"]
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (job.parent / "out").exists()


def test_json_of_a_job_that_is_not_there_or_not_named(tmp_path: Path) -> None:
    found = object_of(run_cli("run", tmp_path / "no.toml", "--json"))
    assert (found["state"], found["exit_code"]) == ("refused", 2)
    assert "does not exist" in found["reason"]
    found = object_of(run_cli("run", "--json"))
    assert (found["state"], found["exit_code"]) == ("refused", 2)
    assert "Missing argument 'JOB'" in found["reason"]


def test_a_usage_error_without_json_leaves_stdout_empty(job: Path) -> None:
    assert run_cli("run", job, "--frehs").stdout == ""
    assert run_cli("show", job, "--json").stdout == ""


def test_json_of_a_run_over_a_limit(job: Path) -> None:
    found = object_of(run_cli("run", job, "--json", "--set", "gate.max_error_rate=0.001"))
    assert (found["state"], found["exit_code"]) == ("over_limit", 3)
    assert "over gate.max_error_rate" in found["reason"]


def test_json_of_a_run_that_a_fault_ends(job: Path) -> None:
    assert run_cli("run", job, "--set", "gate.max_error_rate=0.001").returncode == 3
    (part, *_) = sorted((job.parent / "out" / STATE / "parts").glob("*.parquet"))
    data = bytearray(part.read_bytes())
    data[300] ^= 1  # In a page, not in the footer: seen when the snapshot is written.
    part.write_bytes(data)
    found = object_of(run_cli("run", job, "--json"))
    assert (found["state"], found["exit_code"]) == ("fault", 1)
    assert part.name in found["reason"]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A slow job, and its run at work."""
    write_rows(tmp_path / "in.jsonl", 1000)
    job = write_job(tmp_path, "in.jsonl", model=SLOW, run={"flush_rows": 5})
    with subprocess.Popen(
        command("run", job, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: any((tmp_path / "out" / STATE / "parts").glob("*.parquet")))
        yield job, process
        process.kill()


def test_json_of_a_second_run_and_of_one_that_is_stopped(
    running: tuple[Path, subprocess.Popen[str]],
) -> None:
    job, process = running
    found = object_of(run_cli("run", job, "--json"))
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    assert f"process {process.pid}" in found["reason"]
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    code = process.returncode
    found = object_of(subprocess.CompletedProcess(process.args, code, stdout, stderr))
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    assert 0 < found["num_durable"] < 1000
    told = "batchgen: stopping: up to 20 s for rows in flight; SIGTERM again to drop them\n"
    assert told in stderr


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        ([True], ["stopping: up to 7.5 s for rows in flight; Ctrl-C again to drop them"]),
        (
            [True, True],
            [
                "stopping: up to 7.5 s for rows in flight; Ctrl-C again to drop them",
                "stopping now; rows in flight are left to the next run",
            ],
        ),
        ([False], ["stopping after this step; Ctrl-C again to stop at once"]),
        ([False, False], ["stopping after this step; Ctrl-C again to stop at once", None]),
    ],
)
def test_a_signal_is_answered_at_once(
    capfd: pytest.CaptureFixture[str], asked: list[bool], lines: list[str | None]
) -> None:
    """`asked`: for each Ctrl-C, whether a runner's loop hears it; a line of None: interrupted."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    stop = StopSwitch()
    try:
        stop_on_signals(ask_to_stop(stop, 7.5))
        for is_heard, line in zip(asked, lines, strict=True):
            stop.is_heard = is_heard
            with pytest.raises(KeyboardInterrupt) if line is None else nullcontext():
                signal.raise_signal(signal.SIGINT)
            assert capfd.readouterr().err == (f"batchgen: {line}\n" if line else "")
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
        signal.signal(signal.SIGHUP, before[2])


@pytest.mark.parametrize("option", ["--minutes", "--trial-s"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_tune_takes_no_number_that_is_none(tmp_path: Path, option: str, number: str) -> None:
    done = CliRunner().invoke(cli.cli, ["tune", str(tmp_path / "job.toml"), option, number])
    assert done.exit_code == 2
    assert f"'{number}' is not a finite number" in done.output


def test_an_interruption_counts_as_stopped_and_a_bug_as_a_fault() -> None:
    fault = Summary("fault", 1, "run-1", reason="KeyboardInterrupt()", num_planned=7)
    stopped = _ended(KeyboardInterrupt(), fault)
    assert (stopped.state, stopped.exit_code, stopped.num_planned) == ("stopped", 75, 7)
    assert stopped.reason == "interrupted; run again to go on"
    assert _ended(KeyboardInterrupt(), None).exit_code == 75
    bug = _ended(RuntimeError("oh"), None)
    assert (bug.state, bug.exit_code, bug.reason) == ("fault", 1, "RuntimeError('oh')")
    assert _ended(RuntimeError("oh"), fault) is fault


# --- options ------------------------------------------------------------------------------------


def test_the_date_of_a_run_is_what_paths_say(tmp_path: Path) -> None:
    for day, num_rows in (("2026-11-20", 10), ("2026-11-21", 20)):
        write_rows(tmp_path / f"{day}.jsonl", num_rows)
    job = write_job(tmp_path, "{date}.jsonl", output={"path": "out/{date}"})
    assert "\nRepeat: row 1" in run_cli("check", job, "--date", "2026-11-20").stdout
    assert run_cli("check", job, "--date", "2026-11-19").returncode == 2
    found = object_of(run_cli("run", job, "--json", "--date", "2026-11-21"))
    assert (found["num_planned"], found["output"]) == (20, str(tmp_path / "out" / "2026-11-21"))
    assert len(batchgen.read(tmp_path / "out" / "2026-11-21").collect()) == 20


def test_a_run_with_time_enough_completes(job: Path) -> None:
    args = ["--max-runtime", "1h30m", "--until", "2099-01-01 06:00", "--wait"]
    assert object_of(run_cli("run", job, "--json", *args))["state"] == "complete"


def test_the_summary_says_where_rows_come_from() -> None:
    run = {"num_ok": 1200, "num_errors": 34}
    for taken in ({"num_carried": 7}, {"num_copied": 8}, {"num_carried": 7, "num_copied": 8}):
        lines = Summary("complete", 0, run=run, **taken).as_text().splitlines()
        carried, copied = taken.get("num_carried", 0), taken.get("num_copied", 0)
        assert lines[2] == (
            f"  of them  {carried} taken over, {copied} copied from equal rows, 1,234 computed in "
            "this run"
        )
    assert "of them" not in Summary("complete", 0, run=run).as_text()


def test_a_run_that_its_time_ends_exits_75_and_gives_the_reason(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 1000)
    job = write_job(tmp_path, "in.jsonl", model=SLOW)
    done = run_cli("run", job, "--max-runtime", "4s")
    assert done.returncode == 75, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == "stopped: max runtime 4s, with work left; run again to go on"
    assert second.startswith("  rows     ")
    assert second.endswith(" left")


def test_the_summary_of_a_stopped_run_gives_its_reason() -> None:
    reason = "deadline 2026-11-23T06:00+00:00, with work left; run again to go on"
    stopped = Summary("stopped", 75, reason=reason, num_ok=3, num_left=4)
    assert stopped.as_text().splitlines()[:2] == [
        f"stopped: {reason}",
        "  rows     3 ok, 0 errors, 4 left",
    ]
