"""What works on one batch, or is its engine: a process, which ends when the server does.

    python -m batchgen.serve.work batch FOLDER HOW       FOLDER/job.json says what
    python -m batchgen.serve.work engine FILE            becomes vLLM's server

HOW is `run`, or the code of OpenAI that lines get which have no answer yet: `batch_cancelled`,
`batch_expired`. FOLDER/checked.json tells of the batch's lines, FOLDER/result.json of how it ended.
Exit codes are those of `batchgen run`; 2 also for a batch whose lines are at fault.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import pyarrow.compute as pc

from batchgen.core.data import spare_pandas
from batchgen.core.errors import BatchgenError, ExitCode
from batchgen.core.records import Completion, EngineFacts, EngineStats, RowError
from batchgen.core.runtime import stop_on_signals
from batchgen.engine.base import EngineRequest, failed
from batchgen.job.load import parse_job
from batchgen.pipeline.compute import OneEngine
from batchgen.pipeline.context import StopSwitch, ask_to_stop
from batchgen.pipeline.job_run import JobRun
from batchgen.serve.store import write_whole
from batchgen.views.batch_files import write
from batchgen.views.rows import output_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.engine.base import Engine
    from batchgen.views.rows import Output

JOB, CHECKED, RESULT = "job.json", "checked.json", "result.json"
RUN = "run"
REASONS = {
    "batch_cancelled": "the batch was cancelled before this line was answered",
    "batch_expired": "the batch expired before this line was answered",
}
_MOST_ERRORS = 100
_REFUSED_AT_ONCE = 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def main(words: Sequence[str]) -> int:
    """Do what the command line says; return the exit code."""
    if words[0] == "engine":
        from batchgen.endpoints.warm import serve

        told = json.loads(Path(words[1]).read_bytes())
        serve(parse_job(told, base=Path.cwd(), where="serve"), None, None)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spare_pandas()
    folder, how = Path(words[1]), words[2]
    try:
        return _batch(folder, how)
    except BatchgenError as error:
        _tell(folder, {"error": str(error)})
        return int(error.exit_code)


def _end_with_parent() -> None:
    """Die as by kill -9 once the server is gone: the job goes on with the next one."""
    with suppress(OSError):
        os.read(0, 1)  # Not by `sys.stdin`, which would be in use when the interpreter ends.
    os.kill(os.getpid(), signal.SIGKILL)


def _tell(folder: Path, told: Mapping[str, Any]) -> None:
    write_whole(folder / RESULT, json.dumps(told).encode())


def _batch(folder: Path, how: str) -> int:
    asked = json.loads((folder / JOB).read_bytes())
    checked = folder / CHECKED
    if not checked.exists():
        found = check_lines(Path(asked["input"]), Rules(**asked["rules"]))
        write_whole(checked, json.dumps(found._asdict()).encode())
    if json.loads(checked.read_bytes())["errors"]:
        return int(ExitCode.REFUSED)
    job = parse_job(asked["tables"], base=folder, where=folder.name)
    stop = StopSwitch()
    stop_on_signals(ask_to_stop(stop, job.run.grace_s))
    compute = OneEngine if how == RUN else partial(OneEngine, build=partial(_refusing, how))
    summary = JobRun(job, stop=stop, compute=compute).run()
    if summary.exit_code:
        return summary.exit_code
    output = output_of(Path(job.output.path))
    assert output is not None  # noqa: S101 - the run has published
    paths = [Path(asked[name]) for name in ("answers", "errors")]
    for path in paths:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    counts = write(output, *paths)
    _tell(folder, {**counts._asdict(), "usage": _usage(output)})
    return int(ExitCode.COMPLETE)


def _usage(output: Output) -> dict[str, Any]:
    """Sum what answers have cost, as the API has it."""
    names = [output.column(f"num_{kind}_tokens") for kind in ("prompt", "cached", "output")]
    there = [name for name in names if name in output.column_names()]
    sums = dict.fromkeys(names, 0)
    for _, _, table in output.groups(there):
        for name in there:
            sums[name] += pc.sum(table.column(name)).as_py() or 0
    prompt, cached, out = sums.values()
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + out,
    }


class Rules(NamedTuple):
    """What holds for each line of a batch."""

    endpoint: str
    models: Sequence[str]
    """Names that there are."""
    max_requests: int


class Checked(NamedTuple):
    """Lines of a batch, and what is wrong with them, in OpenAI's form."""

    total: int
    errors: Sequence[Mapping[str, Any]]
    """The first hundred."""
    model: str | None


def check_lines(path: Path, rules: Rules) -> Checked:
    """Find all faults of a file that end a batch before it begins.

    What is wrong with a body alone is the error of its line, once the batch runs.
    """
    errors: list[Mapping[str, Any]] = []
    seen: set[str] = set()
    model: str | None = None
    total = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            line = data.removeprefix(_BYTE_ORDER_MARK) if number == 1 else data
            if not line.strip():
                continue
            total += 1
            for code, message, param in _faults(line, rules, seen, model):
                if len(errors) < _MOST_ERRORS:
                    fault = {"code": code, "message": message, "param": param, "line": number}
                    errors.append(fault)
            model = model or _model_of(line)
    if not total:
        fault = {"code": "empty_file", "message": "the file has no requests"}
        errors.append({**fault, "param": None, "line": None})
    if total > rules.max_requests:
        text = f"{total:,} requests, expected at most {rules.max_requests:,} in a batch"
        errors.append({"code": "too_many_requests", "message": text, "param": None, "line": None})
    return Checked(total, errors, model)


def _model_of(line: bytes) -> str | None:
    with suppress(ValueError, TypeError, LookupError):
        model = orjson.loads(line)["body"]["model"]
        return model if isinstance(model, str) else None
    return None


def _faults(
    data: bytes, rules: Rules, seen: set[str], model: str | None
) -> Iterator[tuple[str, str, str | None]]:
    """Yield code, message and parameter of what is wrong with a line."""
    try:
        line = orjson.loads(data)
    except ValueError as error:
        yield "invalid_json_line", f"is no JSON: {error}", None
        return
    body = line.get("body") if isinstance(line, dict) else None
    if not isinstance(body, dict):
        yield "invalid_json_line", "expected {custom_id, method, url, body: {...}}", "body"
        return
    own_id = line.get("custom_id")
    if not isinstance(own_id, str) or not own_id:
        yield "missing_required_parameter", "custom_id: expected a text", "custom_id"
    elif own_id in seen:
        text = f"custom_id {own_id!r:.80} stands in an earlier line, too"
        yield "duplicate_custom_id", text, "custom_id"
    else:
        seen.add(own_id)
    if line.get("method") != "POST":
        yield "invalid_method", f"method: {line.get('method')!r:.40}, expected 'POST'", "method"
    if line.get("url") != rules.endpoint:
        text = f"url: {line.get('url')!r:.80}, expected the batch's endpoint, {rules.endpoint!r}"
        yield "invalid_url", text, "url"
    yield from _faults_of(body, rules, model)


def _faults_of(
    body: Mapping[str, Any], rules: Rules, model: str | None
) -> Iterator[tuple[str, str, str | None]]:
    if body.get("stream"):
        yield "invalid_request", "stream: a batch's answers are not streamed", "body.stream"
    name = body.get("model")
    if not isinstance(name, str):
        yield "missing_required_parameter", "model: expected a text", "body.model"
    elif name not in rules.models:
        known = ", ".join(rules.models)
        yield "model_not_found", f"model {name!r:.80}: there is {known}", "body.model"
    elif model is not None and name != model:
        text = f"model {name!r:.80}, but {model!r} before it: one model a file"
        yield "mismatched_model", text, "body.model"


def _refusing(code: str, *_: object) -> Engine:
    return Refusing(code)


class Refusing:
    """An `Engine` that has no answer for any row: why, is the row's error."""

    def __init__(self, code: str) -> None:
        self._error = RowError(code, REASONS[code])
        self._inside: deque[int] = deque()
        self.facts = EngineFacts(
            name="none",
            version="1",
            device="none",
            max_model_len=None,
            max_num_seqs=_REFUSED_AT_ONCE,
            startup_s=0.0,
        )
        self.capacity = _REFUSED_AT_ONCE
        self.stats = EngineStats()

    @property
    def num_in_flight(self) -> int:
        """See `Engine`."""
        return len(self._inside)

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """See `Engine`."""
        self._inside.extend(request.request_id for request in requests)

    def step(self, timeout_s: float) -> list[Completion]:
        """See `Engine`."""
        done = [failed(request_id, self._error) for request_id in self._inside]
        self._inside.clear()
        return done

    def close(self) -> None:
        """See `Engine`."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
