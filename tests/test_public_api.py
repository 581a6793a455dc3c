"""What `import batchgen` promises."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from dataclasses import fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

import batchgen
from batchgen import api, cli
from batchgen.core.runtime import Caller, called
from batchgen.pipeline.context import RunOptions, Summary
from tests import fakes


def test_the_public_names_are_exactly_these() -> None:
    names = [
        "BatchgenError",
        "ExitCode",
        "__version__",
        "check",
        "compare",
        "doctor",
        "errors",
        "plan",
    ]
    names += ["read", "report", "rollback", "run", "score", "show", "status", "try_out"]
    assert sorted(batchgen.__all__) == names
    assert all(getattr(batchgen, name) for name in batchgen.__all__)
    # No folder of that name takes a function's place once it is imported.
    rooms = {path.stem for path in Path(batchgen.__file__).parent.iterdir()} - {"errors"}
    assert rooms.isdisjoint(batchgen.__all__)


def test_python_and_the_shell_take_every_option_of_a_run() -> None:
    options = {field.name: field.default for field in fields(RunOptions)}
    keywords = {
        name: parameter.default
        for name, parameter in inspect.signature(batchgen.run).parameters.items()
        if name not in {"job", "overrides", "run_date", "tuned"}
    }
    assert keywords == options
    shell = {parameter.name for parameter in cli.cli.commands["run"].params}
    assert shell == {*options, "job", "overrides", "run_date", "tuned", "as_json"}


def test_every_option_of_a_run_reaches_it(monkeypatch) -> None:
    seen: list[RunOptions] = []

    class Recorded:
        def __init__(self, _: object, *, options: RunOptions, **__: object) -> None:
            seen.append(options)

        def run(self) -> None:
            pass

    monkeypatch.setattr("batchgen.pipeline.job_run.JobRun", Recorded)
    monkeypatch.setattr(api, "load", lambda *_, **__: fakes.job())
    checked = {"until": datetime.now(tz=UTC), "max_runtime_s": 7}
    for field in fields(RunOptions):
        given = checked.get(field.name, f"my {field.name}")
        batchgen.run("job.toml", **{field.name: given})
        assert getattr(seen[-1], field.name) == given


def test_importing_batchgen_brings_its_errors_and_names_and_nothing_heavy() -> None:
    code = (
        "import sys, batchgen; assert {'run', 'read', 'errors'} <= set(dir(batchgen)); "
        "assert batchgen.core.errors.ConfigError.__mro__[1] is batchgen.BatchgenError; "
        "heavy = {'pyarrow', 'polars', 'pydantic', 'vllm', 'torch', 'batchgen.api'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def tables_in(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        "input": {"path": str(folder / "{date}.jsonl")},
        "prompt": {"user": "{{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 4},
        "output": {"path": str(folder / "out")},
    }


@pytest.mark.parametrize(
    "run_date", [date(2026, 11, 20), "2026-11-20", datetime(2026, 11, 20, 23, 50, tzinfo=UTC)]
)
def test_a_run_date_is_a_date_its_text_or_a_time_of_it(
    tmp_path: Path, run_date: date | str
) -> None:
    job = api.load(tables_in(tmp_path), run_date=run_date)
    assert job.input.path == [str(tmp_path / "2026-11-20.jsonl")]


def test_a_single_text_of_overrides_is_one(tmp_path: Path) -> None:
    tables = tables_in(tmp_path)
    assert api.load(tables, "sampling.max_tokens=9").sampling.max_tokens == 9
    assert api.load(tables, ["sampling.max_tokens=9"]).sampling.max_tokens == 9


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"run_date": "20.11.2026"}, "run_date: '20.11.2026' is wrong, expected: a date, or"),
        ({"run_date": 20261120}, "run_date: 20261120 is wrong"),
        ({"overrides": [3]}, "overrides: 3 is wrong, expected: texts such as 'run.flush_s=10'"),
        ({"max_runtime_s": "5h"}, "max_runtime_s: '5h' is wrong, expected: seconds, more than 0"),
        ({"max_runtime_s": 0}, "max_runtime_s: 0 is wrong"),
        ({"max_runtime_s": math.nan}, "max_runtime_s: nan is wrong"),
        ({"until": "06:00"}, "until: '06:00' is wrong, expected: a datetime with a time zone"),
        ({"until": datetime(2099, 1, 1)}, "is wrong, expected: a time with a zone, such as"),  # noqa: DTZ001
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(
    tmp_path: Path, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(batchgen.core.errors.ConfigError, match=re.escape(text)):
        batchgen.run(tables_in(tmp_path), **given)
    assert not (tmp_path / "out").exists()


def test_a_job_may_be_tables_and_its_paths_may_hold_a_date(tmp_path) -> None:
    tables = {
        "input": {"path": str(tmp_path / "{date}.jsonl")},
        "prompt": {"user": "{{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 4},
        "output": {"path": str(tmp_path / "out")},
    }
    job = api.load(tables, run_date=date(2026, 11, 20))
    assert job.input.path == [str(tmp_path / "2026-11-20.jsonl")]


def test_a_result_is_shown_as_the_shell_prints_it_and_escaped_in_a_notebook() -> None:
    hostile = "<svg onload=alert(1)>\x1b[2J"
    with called(Caller("out", is_folder=True, python_job="job")):
        summary = Summary("complete", 0, num_ok=3, num_errors=1, warnings=[hostile])
    lines = str(summary).splitlines()
    assert lines[:3] == [
        "warning: <svg onload=alert(1)>\\x1b[2J",
        "complete",
        "  rows     3 ok, 1 errors",
    ]
    assert repr(summary) == str(summary)
    html = summary._repr_html_()
    assert html.startswith("<pre>warning: &lt;svg onload=alert(1)&gt;\\x1b[2J\n")
    assert html.count("<") == 2
