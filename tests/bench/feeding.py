"""The whole product against vLLM itself: same rows, one machine, each as its user would start it.

    python -m tests.bench.feeding --shape 0.6b --tokenizer DIR --prompts FILE \
        --work equal=7000 --work label=6000 --by equal=256 \
        --best '{"max_num_seqs": 1024}' --engines 2

batchgen: `batchgen run` on a job that says of the engine only which model it is (and, with
`--model-option`, what is asked for). LLM.chat: `LLM(model)` at vLLM's own settings, all rows at
once, and for `--by WORK=256` by so many after each other, too. `--best`: engines with these
options, started together and fed by windows (`--windows`), each with its share of the rows: what a
person could get by hand.

Two clocks. `whole`: from the start of the process to the moment when the answers can be read; a
process of vLLM's that does several works is started once, so its whole time is its start and that
work. `work`: nothing is admitted before it starts. batchgen's runs to its published snapshot, with
the last rows committed and everything merged; vLLM's to its last answer in memory.

Works: see `works`; `prefix/N` and `tail` compare batchgen with itself, in the input's order.
`--against vllm` or `--against batchgen` measures one side only; `--log FILE` keeps what was
measured, and a later call with the same file goes on with it. Prints a JSON line for each
measurement, then a table, with the least time that the GPU's memory and arithmetic allow.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.engine.devices import device_name
from tests.bench import works
from tests.bench.limits import least_s
from tests.bench.random_model import make_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bench.works import Work

    Asked = list[tuple[Work, list[dict[str, int]]]]

LOADING = {"load_format": "dummy"}
KEYS = ("max_model_len", "max_num_seqs", "gpu_memory_utilization")
"""Of `[model]`; the others are of `[model.engine]`."""
ITSELF = ("prefix", "tail")
"""Works for which batchgen is compared with itself."""

WORKS: dict[str, tuple[Any, int]] = {
    "decode": (works.decode_heavy, 2000),
    "equal": (works.decode_equal, 7000),
    "night": (works.small_night, 200),
    "label": (works.labeling, 6000),
    "label+schema": (works.labeling_by_schema, 6000),
    "tail": (works.long_tail, 3000),
}


def main() -> None:
    """Time everything asked for."""
    args = _arguments()
    questions = works.read_questions(args.prompts)
    jobs = [make_work(name, questions) for name in args.work]
    figures = Figures(args.log)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or make_model(folder / "model", args.shape, args.tokenizer)
        if args.against != "vllm":
            for repeat in range(args.repeats):
                for work in jobs:
                    own = folder / f"{work.file_name}-{repeat}"
                    _time_batchgen(model, work, args, own, figures)
        rivals = [work for work in jobs if not work.name.startswith(ITSELF)]
        if rivals and args.against != "batchgen":
            _time_vllm(model, _options(args), _chats(args, rivals), folder, figures)
            if args.best is not None:
                _time_best(model, args, rivals, folder, figures)
    _print_table(args, jobs, figures.seen)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=["8b", "0.6b"], default="8b")
    parser.add_argument("--model", type=Path, help="a model's folder, instead of a random one")
    parser.add_argument("--work", action="append", required=True, help="NAME or NAME=ROWS")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--against", choices=["batchgen", "vllm"], help="one of the two only")
    parser.add_argument("--by", action="append", default=[], help="LLM.chat by so many: NAME=ROWS")
    parser.add_argument("--model-option", action="append", default=[], help="batchgen's, KEY=JSON")
    parser.add_argument("--vllm-option", action="append", default=[], help="vLLM's, KEY=JSON")
    parser.add_argument("--run-option", action="append", default=[], help="[run] KEY=JSON")
    parser.add_argument("--best", type=json.loads, help="engine options in JSON, for windows")
    parser.add_argument("--engines", type=int, default=1, help="of --best, started together")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024])
    parser.add_argument("--log", type=Path, help="JSONL to keep the figures in, and to go on with")
    return parser.parse_args()


def make_work(name: str, questions: list[str]) -> Work:
    """The work of `NAME` or `NAME=ROWS`."""
    rng = random.Random(works.SEED)
    name, _, own_num = name.partition("=")
    if name.startswith("prefix/"):
        make, default = works.shared_prefixes(int(name.partition("/")[2])), 6000
    else:
        make, default = WORKS[name]
    work: Work = make(questions, int(own_num or default), rng)
    return work


class Figures:
    """What was measured, by work and way, in the order in which it was."""

    def __init__(self, log: Path | None) -> None:
        """Begin with what the log holds, if there is one."""
        self.seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._log = log
        if log is not None and log.exists():
            for line in log.read_text(encoding="utf-8").splitlines():
                self._keep(json.loads(line))

    def note(self, work: Work, how: str, figures: dict[str, Any]) -> None:
        """Print one measurement and keep it."""
        entry = {"work": work.name, "rows": len(work.users), "how": how, **figures}
        print(line := json.dumps(entry), flush=True)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self._keep(entry)

    def _keep(self, entry: dict[str, Any]) -> None:
        self.seen.setdefault((entry["work"], entry["how"]), []).append(entry)


def _time_batchgen(
    model: Path, work: Work, args: argparse.Namespace, folder: Path, figures: Figures
) -> None:
    figures.note(work, "batchgen", _run_batchgen(model, work, args, folder / "auto", {}))
    if work.name.startswith(ITSELF):
        plain = _run_batchgen(model, work, args, folder / "input", {"order": "input"})
        figures.note(work, "batchgen, input order", plain)


def _run_batchgen(
    model: Path, work: Work, args: argparse.Namespace, folder: Path, run: dict[str, Any]
) -> dict[str, Any]:
    """One `batchgen run`, from the start of its process to its end."""
    folder.mkdir(parents=True)
    job = folder / "job.toml"
    given = {"max_model_len": args.max_model_len, **_pairs(args.model_option)}
    tables = {
        "input": {"path": str(work.write(folder / "in.jsonl"))},
        "prompt": {"system": work.system, "user": "{{ user }}"},
        "model": {
            "name": str(model),
            **{key: value for key, value in given.items() if key in KEYS},
        },
        "model.engine": {
            **{key: value for key, value in given.items() if key not in KEYS},
            **({} if args.model else LOADING),
        },
        "sampling": {
            "max_tokens": works.MAX_TOKENS,
            "temperature": works.TEMPERATURE,
            "ignore_eos": True,
            "column": "sampling",
        },
        "output": {
            "path": str(folder / "out"),
            **({"schema_column": "schema"} if work.with_schema else {}),
        },
        "checks": {"allow_truncated": True},
        "gate": {"max_error_rate": 1.0},
        "run": {**_pairs(args.run_option), **run},
    }
    job.write_text(toml(tables), encoding="utf-8")
    command = [sys.executable, "-m", "batchgen", "run", str(job), "--json"]
    started_s = time.monotonic()
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    process_s = time.monotonic() - started_s
    if ran.returncode:
        msg = f"{work.name}: batchgen ended with {ran.returncode}: {ran.stdout[-2000:]}"
        raise SystemExit(msg)
    summary = json.loads(ran.stdout)
    totals = summary["run"]
    # What the process did before the run began to count (imports) and after it had published.
    before_s = process_s - summary["elapsed_s"]
    return {
        "whole_s": before_s + summary["published_s"],
        "work_s": summary["published_s"] - totals["ready_after_s"],
        "process_s": process_s,
        "ok": summary["num_ok"],
        "errors": summary["num_errors"],
        "output_tokens": totals["num_output_tokens"],
        "prompt_tokens": totals["num_prompt_tokens"],
        "cached_tokens": totals.get("num_cached_tokens"),
        "working_s": totals["working_s"],
        "engine": summary["engine"],
        "warnings": summary["warnings"],
    }


def _pairs(given: list[str]) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in given)}


def toml(tables: dict[str, dict[str, Any]]) -> str:
    """A job file; JSON's strings, numbers, booleans and lists are TOML's as well."""
    lines = [
        line
        for table, keys in tables.items()
        for line in (f"[{table}]", *(f"{key} = {json.dumps(keys[key])}" for key in keys))
    ]
    return "\n".join(lines) + "\n"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    own = {"max_model_len": args.max_model_len, **_pairs(args.vllm_option)}
    return own if args.model else {**own, **LOADING}


def _chats(args: argparse.Namespace, jobs: list[Work]) -> Asked:
    """Each work with all rows at once, as often as asked for, and by so many where that is."""
    sizes = [(name, int(size)) for name, _, size in (by.partition("=") for by in args.by)]
    return [
        (work, [{}] * args.repeats + [{"by": size} for name, size in sizes if name == work.name])
        for work in jobs
    ]


def _time_vllm(
    model: Path, options: dict[str, Any], asked: Asked, folder: Path, figures: Figures
) -> None:
    """`LLM.chat` in one process; its whole time of a work is its start and that work."""
    started_s = time.monotonic()
    with _vllm(_spec(folder, model, options, asked)) as process:
        startup = _line(process)
        ready_s = time.monotonic() - started_s
        _go(process)
        for work, ways in asked:
            for way in ways:
                told = _line(process)
                how = f"LLM.chat by {way['by']}" if way else "LLM.chat(all)"
                whole_s = ready_s + told["work_s"]
                figures.note(work, how, {**told, **startup, "whole_s": whole_s})


def _time_best(
    model: Path, args: argparse.Namespace, jobs: list[Work], folder: Path, figures: Figures
) -> None:
    """Engines that start together and share the rows: until the slowest has answered."""
    options = {**_options(args), **args.best}
    ways = [{"window": size} for size in args.windows]
    with ExitStack() as stack:
        processes = []
        started_s = time.monotonic()
        for number in range(args.engines):
            own = folder / f"engine-{number}"
            own.mkdir()
            asked = [(work.share(number, args.engines), ways) for work in jobs]
            processes.append(stack.enter_context(_vllm(_spec(own, model, options, asked))))
        for process in processes:
            _line(process)
        ready_s = time.monotonic() - started_s
        for process in processes:
            _go(process)
        for work in jobs:
            for way in ways:
                told = [_line(process) for process in processes]
                work_s = max(one["work_s"] for one in told)
                times = {"work_s": work_s, "whole_s": ready_s + work_s}
                num_tokens = sum(one["output_tokens"] for one in told)
                how = f"{args.engines} engine(s), window {way['window']}"
                figures.note(work, how, {**times, "output_tokens": num_tokens})


def _spec(folder: Path, model: Path, options: dict[str, Any], asked: Asked) -> Path:
    entries = [
        {
            "name": work.name,
            "system": work.system,
            "path": str(work.write(folder / f"{work.file_name}.jsonl")),
            "ways": ways,
        }
        for work, ways in asked
    ]
    path = folder / "spec.json"
    spec = {"model": str(model), "options": options, "works": entries}
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


class _vllm:  # noqa: N801 - a context manager that reads as a function.
    """A process of `vllm_program`; nothing of it is left afterwards."""

    def __init__(self, spec: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.vllm_program", str(spec)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *_error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next JSON object that it prints; vLLM may print lines of its own."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            told: dict[str, Any] = json.loads(line)
            return told
    msg = f"vLLM's process ended with {process.wait()} before it had answered"
    raise SystemExit(msg)


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def _print_table(
    args: argparse.Namespace,
    jobs: list[Work],
    seen: dict[tuple[str, str], list[dict[str, Any]]],
) -> None:
    import vllm

    shape = args.model or args.shape
    print(f"{device_name()}, vllm {vllm.__version__}, Python {platform.python_version()}; {shape}")
    for line in _table(args, jobs, seen):
        print(line)


def _table(
    args: argparse.Namespace, jobs: list[Work], seen: dict[tuple[str, str], list[dict[str, Any]]]
) -> Iterator[str]:
    for work in jobs:
        mean_out = statistics.mean(work.max_tokens)
        yield f"{work.name}: {len(work.users)} rows, at most {mean_out:.0f} tokens out on average"
        ours = seen.get((work.name, "batchgen"))
        for (name, how), entries in seen.items():
            if name != work.name:
                continue
            work_s = statistics.median(entry["work_s"] for entry in entries)
            whole_s = statistics.median(entry["whole_s"] for entry in entries)
            rate = statistics.median(entry["output_tokens"] / entry["work_s"] for entry in entries)
            limit = ""
            if not args.model and "prompt_tokens" in entries[0]:
                least = least_s(args.shape, entries[0]["prompt_tokens"], work)
                limit = f", {least / work_s:4.0%} of the GPU's limit"
            ratio = ""
            if ours and how != "batchgen":
                own_work = statistics.median(entry["work_s"] for entry in ours)
                own_whole = statistics.median(entry["whole_s"] for entry in ours)
                ratio = f"; batchgen {own_work / work_s:.2f}x, whole {own_whole / whole_s:.2f}x"
            times = " ".join(f"{entry['work_s']:.1f}" for entry in entries)
            yield (
                f"  {how:26} work {work_s:7.1f} s ({times}), whole {whole_s:7.1f} s, "
                f"{rate:8,.0f} tokens/s out{limit}{ratio}"
            )


if __name__ == "__main__":
    main()
