"""jobs/nightly: its unit and its crontab line are run as they stand, on the echo engine.

Only paths are replaced; `.venv/bin/batchgen` of the installation is a script that adds `--set`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

import batchgen
from batchgen.core.errors import ExitCode
from batchgen.job.load import load_job
from tests.docs import ROOT
from tests.e2e.support import run_cli

if TYPE_CHECKING:
    from pathlib import Path

NIGHTLY = ROOT / "jobs" / "nightly"
SERVICE, TIMER = "batchgen-nightly.service", "batchgen-nightly.timer"
# Echo answers with the prompt: make that the right label, with blanks that no two rows share.
ECHO = (
    "model.backend=echo",
    "model.engine={}",
    "model.max_model_len=100000",
    "sampling.max_tokens=1000",
    "prompt.system=",
    'prompt.user={"label": "{{ gold_label }}", "urgency": "{{ gold_urgency }}"'
    '{{ " " * (ticket_id[2:] | int) }}}',
)
TICKET = json.loads((NIGHTLY / "tickets" / "2026-01-05.jsonl").read_text().splitlines()[0])


@dataclass(frozen=True)
class Installed:
    """The example where its texts say that it is, below a temporary folder."""

    root: Path

    @property
    def srv(self) -> Path:
        return self.root / "srv" / "batchgen"

    @property
    def log(self) -> Path:
        return self.root / "var" / "log" / "batchgen"

    def here(self, text: str) -> str:
        found = text.replace("/srv/batchgen", str(self.srv))
        return found.replace("/var/log/batchgen", str(self.log))

    def batchgen(self, script: str) -> None:
        path = self.srv / ".venv" / "bin" / "batchgen"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def add_ticket(self, name: str, **changes: Any) -> None:
        path = self.srv / "jobs" / "nightly" / "tickets" / name
        with path.open("a") as file:
            file.write(json.dumps({**TICKET, **changes}) + "\n")


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    made = Installed(tmp_path)
    made.log.mkdir(parents=True)
    shutil.copytree(NIGHTLY, made.srv / "jobs" / "nightly")
    shutil.copy(ROOT / "jobs" / "ticket.schema.json", made.srv / "jobs")
    (made.srv / "sample_data").symlink_to(ROOT / "sample_data")
    changes = " ".join(f"--set {shlex.quote(change)}" for change in ECHO)
    made.batchgen(f'exec {shlex.quote(sys.executable)} -m batchgen "$@" {changes}')
    return made


def environment() -> dict[str, str]:
    """With a zone in which it is not just about to be six in the morning."""
    zone = "UTC" if datetime.now(UTC).hour not in (5, 6) else "Etc/GMT-12"
    return {**os.environ, "TZ": zone, "PYTHONPATH": str(ROOT)}


def sh(command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", command],
        capture_output=True,
        text=True,
        env={**environment(), **changes},
        cwd="/",
        timeout=120,
        check=False,
    )


def unit(name: str = SERVICE) -> dict[str, str]:
    """A unit's settings."""
    lines = (NIGHTLY / name).read_text().splitlines()
    pairs = [line.partition("=") for line in lines if "=" in line and not line.startswith("#")]
    assert len({key for key, _, _ in pairs}) == len(pairs)
    return {key: value for key, _, value in pairs}


def argv(value: str) -> list[str]:
    """A command line as systemd takes it apart: `$$` and `%%` stand for one of them."""
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(value)]


def crontab() -> tuple[str, str]:
    """Schedule and command of the one line."""
    lines = (NIGHTLY / "crontab").read_text().splitlines()
    (line,) = [line for line in lines if line and not line.startswith(("#", "SHELL=", "MAILTO="))]
    assert "%" not in line  # cron would end the command there.
    *schedule, command = line.split(None, 5)
    return " ".join(schedule), command


def test_the_job_passes_its_check():
    done = run_cli("check", NIGHTLY / "nightly.toml")
    assert done.returncode == 0, done.stderr
    assert "3 JSONL files" in done.stdout


def test_the_job_is_run_with_a_gate_a_hook_and_metrics():
    job = load_job(NIGHTLY / "nightly.toml")
    assert job.output.keep_snapshots == 7
    assert None not in (job.gate.max_drift, job.gate.max_shrink)
    assert job.run.on_finish == [str(NIGHTLY / "notify.py")]
    assert os.access(job.run.on_finish[0], os.X_OK)
    assert job.run.metrics_file == str(ROOT / "jobs" / "out" / "nightly.prom")


def test_a_night_that_fails_starts_a_unit_that_is_there():
    name, _, instance = unit()["OnFailure"].partition("@")
    assert instance == "%n.service"
    assert "systemctl status" in unit(f"{name}@.service")["ExecStart"]


def test_the_units_command_labels_the_folder(installed):
    service = unit()
    command = [installed.here(word) for word in argv(service["ExecStart"])]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(),
        cwd=installed.here(service["WorkingDirectory"]),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # The hook's line is not among them.
    summary = json.loads(line)
    assert (summary["state"], summary["num_ok"], summary["num_errors"]) == ("complete", 77, 0)
    told = [text for text in done.stderr.splitlines() if text.startswith("nightly: ")]
    assert len(told) == 1
    assert told[0].startswith("nightly: complete (exit 0): 77 ok, 0 errors, 0 left; ")
    metrics = (installed.srv / "jobs" / "out" / "nightly.prom").read_text()
    output = str(installed.srv / "jobs" / "out" / "nightly")
    assert f'batchgen_last_run_exit_code{{output="{output}"}} 0' in metrics.splitlines()
    rows = batchgen.read(output).collect()
    assert rows["gen_label"].to_list() == rows["gold_label"].to_list()


def test_three_nights_by_cron(installed):
    command = installed.here(crontab()[1])

    def night() -> dict[str, Any]:
        done = sh(command)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # No mail.
        summary: dict[str, Any] = json.loads(
            (installed.log / "nightly.jsonl").read_text().splitlines()[-1]
        )
        return summary

    def computed(summary: dict[str, Any]) -> int:
        return int(summary["run"]["num_ok"]) + int(summary["run"]["num_errors"])

    first = night()
    assert (first["state"], first["num_ok"]) == ("complete", 77)
    installed.add_ticket("2026-01-07.jsonl", ticket_id="T-000401", gold_label="shipping")
    installed.add_ticket("2026-01-08.jsonl", ticket_id="T-000402", gold_label="praise")
    second = night()
    assert (second["state"], second["num_ok"]) == ("complete", 79)
    assert (computed(second), second["num_carried"]) == (2, 77)
    third = night()
    assert (third["state"], computed(third)) == ("nothing_to_do", 0)
    log = (installed.log / "nightly.log").read_text()
    assert [line.partition(":")[2][:10] for line in log.splitlines() if "nightly: " in line] == [
        " complete ",
        " complete ",
        " nothing_t",
    ]


def test_a_file_that_did_not_arrive_is_not_published_over_last_night(installed):
    command = installed.here(crontab()[1])
    sh(command)
    (installed.srv / "jobs" / "nightly" / "tickets" / "2026-01-06.jsonl").unlink()
    done = sh(command)
    assert "over gate.max_shrink = 0.2" in done.stdout  # cron mails it.
    assert len(batchgen.read(installed.srv / "jobs" / "out" / "nightly").collect()) == 77


@pytest.mark.parametrize("code", list(ExitCode))
def test_cron_mails_what_a_person_has_to_see(installed, code):
    installed.batchgen(f"echo '{{}}'; echo trouble >&2; exit {int(code)}")
    done = sh(installed.here(crontab()[1]))
    is_trouble = code not in (ExitCode.COMPLETE, ExitCode.STOPPED)
    assert done.stdout == ("trouble\n" if is_trouble else "")
    assert done.stderr == ""
    assert (installed.log / "nightly.jsonl").read_text() == "{}\n"


def test_cron_mails_where_the_project_is_gone(installed):
    done = sh(installed.here(crontab()[1]).replace(str(installed.srv), "/no-such-folder"))
    assert done.returncode != 0
    assert "/no-such-folder" in done.stderr


def test_cron_starts_well_before_the_end_and_at_night():
    schedule, command = crontab()
    minute, hours, *days = schedule.split()
    assert days == ["*", "*", "*"]
    assert "--until 06:00" in command
    found = set()
    for span in hours.split(","):
        first, _, last = span.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == {22, 23, 0, 1, 2, 3, 4}
    assert 0 <= int(minute) < 60


@pytest.mark.parametrize("code", list(ExitCode))
def test_only_faults_make_systemd_start_again(code):
    service = unit()
    assert (service["Type"], service["Restart"]) == ("oneshot", "on-failure")
    is_success = code == 0 or str(int(code)) in service["SuccessExitStatus"].split()
    is_prevented = str(int(code)) in service["RestartPreventExitStatus"].split()
    assert (not is_success and not is_prevented) == (code is ExitCode.FAULT)
    assert is_success == (code in (ExitCode.COMPLETE, ExitCode.STOPPED))


@pytest.mark.parametrize(
    ("clock", "may_start"),
    [
        ("2159", False),
        ("2200", True),
        ("2230", True),
        ("0000", True),
        ("0544", True),
        ("0545", False),
        ("0600", False),
        ("0859", False),
        ("1200", False),
    ],
)
def test_no_start_by_day_would_run_until_the_next_morning(tmp_path, clock, may_start):
    date = tmp_path / "date"
    date.write_text(f'#!/bin/sh\ntest "$1" = +%H%M && echo {clock}\n')
    date.chmod(0o755)
    done = subprocess.run(
        argv(unit()["ExecCondition"]),
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    # 1 to 254 skip the start; 255 would count as a failure (systemd.service(5)).
    assert (done.returncode, done.stderr) == (0 if may_start else 1, "")


def test_systemd_waits_for_the_rows_in_flight_and_signals_batchgen_alone():
    service = unit()
    job = load_job(NIGHTLY / "nightly.toml")
    assert float(service["TimeoutStopSec"]) >= job.run.grace_s + 60
    assert (service["KillMode"], service["KillSignal"]) == ("mixed", "SIGTERM")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_has_nothing_to_say_against_the_units(installed):
    units = installed.root / "units"
    units.mkdir()
    for name in (SERVICE, TIMER):
        (units / name).write_text(installed.here((NIGHTLY / name).read_text()))
    files = [str(units / name) for name in (SERVICE, TIMER)]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "batchgen" in line]
    assert (done.returncode, said) == (0, [])


def test_the_timer_starts_the_service_at_night():
    timer = unit(TIMER)
    assert timer["OnCalendar"].endswith(" 22:30:00")
    assert timer["Persistent"] == "yes"


def test_the_readme_says_what_every_exit_code_does():
    rows = [
        line.split("|")[1].strip()
        for line in (NIGHTLY / "README.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    assert [int(cell) for cell in rows if cell.isdigit()] == [int(code) for code in ExitCode]
