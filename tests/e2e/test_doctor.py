"""`batchgen doctor` as a command, on the machine that the tests run on."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.e2e.support import run_cli, write_job, write_rows

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs" / "quickstart.toml"
LIGHT = """
import sys
from batchgen.cli import cli
try:
    cli(sys.argv[1:])
except SystemExit as end:
    heavy = sorted({"torch", "vllm", "transformers"} & sys.modules.keys())
    sys.exit(f"imported {heavy}" if heavy else end.code)
"""


def test_the_quickstart_runs_here_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    args = [str(QUICKSTART), "--json", "--set", f"output.path={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, "doctor", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["exit_code"], found["reason"]) == (0, None)
    assert found["weights"]["num_parameters"] == 1_115_520
    if found["machine"]["build"] == "cpu":
        # As vLLM 0.32 says itself of this job: "CPU KV cache size: 262,144 tokens".
        assert found["kv_cache_tokens"] == 262_144
    assert found["rows"]["prompt"] > 50
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_run_exits_with_2_and_says_why(tmp_path: Path) -> None:
    source = str(write_rows(tmp_path / "in.jsonl", 10))
    job = write_job(tmp_path, source, model={"backend": "vllm", "name": str(tmp_path / "absent")})
    done = run_cli("doctor", job)
    assert done.returncode == 2
    last = done.stdout.splitlines()[-1]
    assert last.startswith("this machine cannot run the job: ")
    assert "does not exist" in last
    assert done.stderr == ""
    done = run_cli("doctor", tmp_path / "none.toml", "--json")
    assert (done.returncode, json.loads(done.stdout)["state"]) == (2, "problem")


def test_the_guides_commands_judge_machines_that_are_not_here(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guide" / "doctor.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (batchgen doctor .*--(?:gpu|memory).*)$", guide, re.MULTILINE)
    assert len(lines) == 3
    where = f"output.path={tmp_path / 'out'}"
    for line in lines:
        words = shlex.split(line, comments=True)[3:]
        done = run_cli("doctor", QUICKSTART, "--set", where, *words)
        assert done.stderr == ""
        assert done.stdout.splitlines()[-1].startswith("such a machine can run the job")
        assert "rows at once, by the tokens of a row" in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = run_cli("doctor", QUICKSTART, "--gpu", "RTX 9999")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--memory 24GiB --capability 8.6" in done.stderr
