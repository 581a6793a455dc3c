"""An engine of one's own, named by its import path, through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.support import published, write_job

ROOT = Path(__file__).parents[2]
SHOUT = '''
import os
from collections import deque

from batchgen.core.errors import ConfigError
from batchgen.core.records import Completion, EngineFacts, EngineStats, Sample


class Shout:
    """Answers in capitals, with the process that it is in and the model that it was given."""

    capacity = 8

    def __init__(self, spec):
        if "mood" in spec.model_kwargs:
            raise ConfigError("model.engine", ["mood: it has only one"])
        self.model = spec.model
        self.facts = EngineFacts("shout", "1", "none", None, 4, 0.0)
        self.held = deque()

    num_in_flight = property(lambda self: len(self.held))
    stats = property(lambda self: EngineStats(len(self.held), 0))

    def add(self, requests):
        self.held.extend(requests)

    def step(self, timeout_s):
        done = [self.held.popleft() for _ in range(min(3, len(self.held)))]
        return [Completion(one.request_id, [Sample(self.answer(one), "stop")], 1, 0, 1, 0.1)
                for one in done]

    def answer(self, request):
        return f"{request.prompt[-1]['content'].upper()}|{os.getpid()}|{self.model}"

    def close(self):
        self.held.clear()
'''


def run(folder: Path, *arguments: str, backend: str = "shout:Shout", engine: str = "") -> tuple:
    """Run `batchgen` as its own process, which is the run's."""
    (folder / "lib").mkdir(exist_ok=True)
    (folder / "lib" / "shout.py").write_text(SHOUT)
    (folder / "in.jsonl").write_text("".join(f'{{"text": "row {n}"}}\n' for n in range(50)))
    job = write_job(folder, "in.jsonl", model={"backend": backend, "name": "tiny"})
    job.write_text(f"{job.read_text()}\n[model.engine]\n{engine}\n")
    path = os.pathsep.join([str(ROOT), str(folder / "lib")])
    process = subprocess.Popen(
        [sys.executable, "-m", "batchgen", arguments[0], str(job), *arguments[1:]],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate()
    return process, out, err


@pytest.mark.parametrize("in_process", [True, False], ids=["here", "hosted"])
def test_it_answers_every_row_in_the_process_that_it_should(tmp_path: Path, in_process) -> None:
    engine = "in_process = true" if in_process else ""
    process, out, err = run(tmp_path, "run", "--json", engine=engine)
    assert process.returncode == 0, err
    assert json.loads(out)["engine"]["name"] == "shout"
    answers = [row["gen_text"].split("|") for row in published(tmp_path / "out")]
    assert [answer[0] for answer in answers] == [f"REPEAT: ROW {n}" for n in range(50)]
    assert {answer[2] for answer in answers} == {"tiny"}
    (pid,) = {int(answer[1]) for answer in answers}
    assert (pid == process.pid) == in_process


@pytest.mark.parametrize("verb", ["run", "plan", "check"])
@pytest.mark.parametrize(
    ("backend", "problem"),
    [
        ("nowhere.at_all:Engine", "ModuleNotFoundError: No module named 'nowhere'"),
        ("shout:Whisper", "AttributeError: module 'shout' has no attribute 'Whisper'"),
        ("shout", "model.backend: 'shout' is wrong, expected: 'vllm', 'openai', 'echo' or"),
    ],
)
def test_one_that_is_not_there_is_refused_before_anything_starts(
    tmp_path: Path, verb: str, backend: str, problem: str
) -> None:
    process, out, err = run(tmp_path, verb, backend=backend)
    assert process.returncode == 2
    assert problem in out + err  # `plan` reports on stdout.
    assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


def test_what_it_cannot_do_it_may_refuse(tmp_path: Path) -> None:
    for verb in ("plan", "run"):
        process, out, err = run(tmp_path, verb, engine="mood = 'calm'")
        assert process.returncode == 2
        assert "mood: it has only one" in out + err


def test_its_model_is_of_the_recipe(tmp_path: Path) -> None:
    keys = []
    for name in ("tiny", "large"):
        process, _, err = run(tmp_path, "run", "--json", "--set", f"model.name={name}",
                                "--set", f"output.path={tmp_path / name}")  # fmt: skip
        assert process.returncode == 0, err
        keys.append({row["gen_request_key"] for row in published(tmp_path / name)})
    assert not keys[0] & keys[1]
