"""What `import batchgen` promises."""

from __future__ import annotations

import inspect
from dataclasses import fields
from datetime import date

import batchgen
from batchgen import api, cli
from batchgen.executor.options import RunOptions


def test_the_public_names_are_exactly_these() -> None:
    assert sorted(batchgen.__all__) == ["__version__", "read", "run"]
    assert all(getattr(batchgen, name) for name in batchgen.__all__)


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

    monkeypatch.setattr("batchgen.executor.job_run.JobRun", Recorded)
    monkeypatch.setattr(api, "load", lambda *_, **__: None)
    for field in fields(RunOptions):
        batchgen.run("job.toml", **{field.name: f"my {field.name}"})
        assert getattr(seen[-1], field.name) == f"my {field.name}"


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
