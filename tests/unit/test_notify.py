"""The hook gets what it was promised and cannot hurt the run; the metrics are Prometheus text."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchgen.pipeline.context import Summary
from batchgen.pipeline.notify import metrics_text, run_hook, write_metrics
from batchgen.pipeline.stats import RunStats

RUN = RunStats(100.0, 10, num_ok=7, num_errors=2, prompt_tokens=900, output_tokens=90)
RUN.error_types.update({"timeout": 2})
SUMMARY = Summary(
    "complete",
    0,
    run_id="20261123T000000-abcdef",
    output="/srv/out",
    num_planned=12,
    num_ok=9,
    num_errors=2,
    num_skipped=1,
    num_carried=2,
    run=RUN.totals(160.0),
    gate=[
        {"name": "max_error_rate", "figure": 0.18, "limit": 0.2, "text": "", "exceeded": False},
        {"name": "max_drift", "figure": None, "limit": None, "column": "gen_label"},
    ],
    started_at="2026-11-23T00:00:00+00:00",
    elapsed_s=60.0,
).as_dict()


def hook(tmp_path: Path, code: str) -> list[str]:
    path = tmp_path / "hook.py"
    path.write_text(f"import json, os, sys, time\n{code}\n")
    return [sys.executable, str(path), "an argument"]


def test_the_hook_gets_the_summary_its_arguments_and_the_environment(tmp_path):
    told = tmp_path / "told.json"
    code = (
        "line = sys.stdin.readline()\n"
        "assert sys.stdin.read() == ''\n"
        "env = {k: v for k, v in os.environ.items() if k.startswith('BATCHGEN_')}\n"
        f"json.dump([json.loads(line), sys.argv[1:], env], open({str(told)!r}, 'w'))"
    )
    assert run_hook(hook(tmp_path, code), SUMMARY) is None
    assert json.loads(told.read_text()) == [
        json.loads(json.dumps(SUMMARY)),
        ["an argument"],
        {
            "BATCHGEN_RUN_ID": "20261123T000000-abcdef",
            "BATCHGEN_STATE": "complete",
            "BATCHGEN_EXIT_CODE": "0",
            "BATCHGEN_OUTPUT": "/srv/out",
        },
    ]


def test_what_the_hook_prints_goes_to_stderr_so_that_stdout_stays_clean(tmp_path):
    code = "print('to stdout'); print('to stderr \\x1b[2J', file=sys.stderr)"
    command = hook(tmp_path, code)
    script = f"from batchgen.pipeline.notify import run_hook\nprint(run_hook({command!r}, {{}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "None\n"
    assert sorted(done.stderr.splitlines()) == ["to stderr \\x1b[2J", "to stdout"]


@pytest.mark.parametrize(
    ("code", "warning"),
    [
        ("sys.exit(3)", "exited with status 3"),
        ("print('a\\nno mail server\\n\\n', file=sys.stderr); sys.exit(1)", "1: no mail server"),
        ("print('x' * 10**6 + 'end', file=sys.stderr); sys.exit(1)", "exited with status 1: xxx"),
        ("os.kill(os.getpid(), 9)", "was killed by signal 9"),
    ],
)
def test_a_hook_that_fails_is_a_warning(tmp_path, code, warning):
    told = run_hook(hook(tmp_path, code), SUMMARY)
    assert told is not None
    assert told.startswith(f"run.on_finish: {sys.executable!r} ")
    assert warning in told
    assert len(told) < 500


def test_a_hook_that_cannot_be_started_is_a_warning(tmp_path):
    (tmp_path / "data").write_text("no program")
    (tmp_path / "data").chmod(0o755)
    (tmp_path / "rights").write_text("#!/bin/sh\n")
    missing = run_hook(["no-such-program-here"], SUMMARY)
    assert missing == (
        "run.on_finish: 'no-such-program-here' was not found, expected a program in PATH or a "
        "path with a slash"
    )
    for name, why in (("data", "Exec format error"), ("rights", "Permission denied")):
        told = run_hook([str(tmp_path / name)], SUMMARY)
        assert told is not None
        assert f"cannot be run ({why}), expected an executable file" in told


def test_a_hook_that_hangs_is_killed_with_its_children(tmp_path):
    child = tmp_path / "child.pid"
    code = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    started_s = time.monotonic()
    told = run_hook(hook(tmp_path, code), SUMMARY, timeout_s=2.0)
    assert told is not None
    assert told.endswith("took longer than 2 s and was killed")
    assert time.monotonic() - started_s < 60
    pid = int(child.read_text())
    deadline_s = time.monotonic() + 20
    while _is_alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        # An orphan that nobody reaps in this container is as good as gone.
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_hook_that_reads_nothing_of_a_long_summary_is_no_trouble(tmp_path):
    long = {**SUMMARY, "warnings": ["w" * 1000] * 1000}
    assert run_hook(hook(tmp_path, "pass"), long) is None


def test_a_child_that_stays_behind_does_not_hold_the_run_up(tmp_path):
    child = tmp_path / "child.pid"
    code = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))"
    )
    started_s = time.monotonic()
    assert run_hook(hook(tmp_path, code), SUMMARY, timeout_s=60.0) is None
    assert time.monotonic() - started_s < 30
    os.kill(int(child.read_text()), signal.SIGKILL)


def test_an_interrupt_while_the_hook_runs_kills_it(tmp_path):
    pid_file = tmp_path / "hook.pid"
    code = f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script = (
        "import signal\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "from batchgen.pipeline.notify import run_hook\n"
        f"run_hook({hook(tmp_path, code)!r}, {{}})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.terminate()
    process.wait(30)
    assert not _is_alive(int(pid_file.read_text()))


def samples(text: str) -> dict[str, float]:
    """Each sample of a file, read strictly."""
    found = {}
    told: set[str] = set()
    for line in text.splitlines():
        if line.startswith("#"):
            kind, name, rest = re.fullmatch(r"# (HELP|TYPE) (\w+) (.+)", line).groups()
            assert kind == "HELP" or rest == "gauge"
            told.add(f"{kind} {name}")
            continue
        match = re.fullmatch(r'((batchgen_[a-z_]+)\{(?:\w+="(?:[^"\\\n]|\\.)*",?)+\}) (\S+)', line)
        assert match, line
        assert {f"HELP {match[2]}", f"TYPE {match[2]}"} <= told
        assert match[1] not in found
        found[match[1]] = float(match[3])
    return found


def test_the_metrics_of_a_complete_run():
    at = 'output="/srv/out"'
    start = 1795392000  # 2026-11-23T00:00:00Z
    assert samples(metrics_text(SUMMARY)) == {
        f"batchgen_last_run_exit_code{{{at}}}": 0,
        f'batchgen_last_run_state{{{at},state="complete"}}': 1,
        f'batchgen_last_run_state{{{at},state="nothing_to_do"}}': 0,
        f'batchgen_last_run_state{{{at},state="stopped"}}': 0,
        f'batchgen_last_run_state{{{at},state="over_limit"}}': 0,
        f'batchgen_last_run_state{{{at},state="refused"}}': 0,
        f'batchgen_last_run_state{{{at},state="fault"}}': 0,
        f"batchgen_last_run_start_timestamp_seconds{{{at}}}": start,
        f"batchgen_last_run_end_timestamp_seconds{{{at}}}": start + 60,
        f"batchgen_last_success_timestamp_seconds{{{at}}}": start + 60,
        f'batchgen_job_rows{{{at},status="planned"}}': 12,
        f'batchgen_job_rows{{{at},status="ok"}}': 9,
        f'batchgen_job_rows{{{at},status="errors"}}': 2,
        f'batchgen_job_rows{{{at},status="skipped"}}': 1,
        f'batchgen_job_rows{{{at},status="left"}}': 0,
        f'batchgen_job_rows{{{at},status="durable"}}': 0,
        f"batchgen_last_run_prompt_tokens{{{at}}}": 900,
        f"batchgen_last_run_cached_prompt_tokens{{{at}}}": 0,
        f"batchgen_last_run_output_tokens{{{at}}}": 90,
        f"batchgen_last_run_retries{{{at}}}": 0,
        f"batchgen_last_run_duration_seconds{{{at}}}": 60,
        f"batchgen_last_run_working_seconds{{{at}}}": 60,
        f"batchgen_last_run_requests_per_second{{{at}}}": 0.15,
        f"batchgen_last_run_output_tokens_per_second{{{at}}}": 1.5,
        f"batchgen_last_run_total_tokens_per_second{{{at}}}": 16.5,
        f"batchgen_last_run_rows_computed{{{at}}}": 9,
        f"batchgen_last_run_rows_taken_over{{{at}}}": 2,
        **(
            {f"batchgen_last_run_rows_copied{{{at}}}": SUMMARY["num_copied"]}
            if "num_copied" in SUMMARY
            else {}
        ),
        f'batchgen_last_run_row_errors{{{at},error_type="timeout"}}': 2,
        f'batchgen_gate_figure{{{at},name="max_error_rate"}}': 0.18,
        f'batchgen_gate_limit{{{at},name="max_error_rate"}}': 0.2,
    }


def test_copied_rows_are_counted():
    text = metrics_text({**SUMMARY, "num_copied": 4})
    assert samples(text)['batchgen_last_run_rows_copied{output="/srv/out"}'] == 4


def test_labels_are_escaped():
    text = metrics_text({"output": 'a\\b"c\nd', "state": "fault", "exit_code": 1})
    assert r'batchgen_last_run_exit_code{output="a\\b\"c\nd"} 1' in text.splitlines()
    samples(text)


def test_a_summary_that_tells_little_gives_few_metrics():
    text = metrics_text(Summary("refused", 2).as_dict() | {"started_at": ""})
    names = {name.partition("{")[0] for name in samples(text)}
    assert "batchgen_last_run_exit_code" in names
    assert not [name for name in names if "timestamp" in name or "tokens" in name]


def test_the_last_success_stays_while_runs_fail(tmp_path):
    path = tmp_path / "job.prom"
    name = 'batchgen_last_success_timestamp_seconds{output="/srv/out"}'

    def after(**changes):
        assert write_metrics(path, {**SUMMARY, **changes}) is None
        return samples(path.read_text()).get(name)

    failed = {"state": "fault", "exit_code": 1, "started_at": "2026-11-24T00:00:00+00:00"}
    assert after(**failed) is None
    assert after() == 1795392060
    assert after(**failed) == 1795392060
    assert after(**failed | {"state": "stopped", "exit_code": 75}) == 1795392060
    assert after(started_at="2026-11-25T00:00:00+00:00", elapsed_s=0.5) == 1795564800.5
    assert after(**failed) == 1795564800.5


def test_an_old_file_that_is_something_else_is_replaced(tmp_path):
    path = tmp_path / "job.prom"
    path.write_bytes(b"\xff\xfe batchgen_last_success_timestamp_seconds nonsense\n")
    assert write_metrics(path, {**SUMMARY, "exit_code": 1}) is None
    assert "batchgen_last_success_timestamp_seconds" not in path.read_text()


def test_the_file_is_replaced_as_a_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "job.prom"
    path.write_text("old\n")
    before = path.open()
    old = os.umask(0o022)
    try:
        assert write_metrics(path, SUMMARY) is None
    finally:
        os.umask(old)
    with before:
        assert before.read() == "old\n"  # Who reads it meanwhile reads the old one to its end.
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["job.prom"]


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path):
    told = write_metrics(tmp_path / "none" / "job.prom", SUMMARY)
    assert told is not None
    assert told.endswith("none/job.prom' cannot be written (No such file or directory)")
    (tmp_path / "folder.prom").mkdir()
    assert write_metrics(tmp_path / "folder.prom", SUMMARY) is not None
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.prom"]
