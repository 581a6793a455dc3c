"""The whole product against `LLM.chat`: same rows, same engine options, one machine.

    python -m tests.bench.feeding --shape 0.6b --work label --work label+schema \
        --tokenizer DIR --prompts FILE --repeats 3

`batchgen` is timed from the start of a run to the moment when its snapshot can be read: loading
the job, planning, reading, rendering, tokenizing, generating, committing, publishing; only the
engine's start is left out, for both. `LLM.chat` gets rows that are in memory already, and keeps
its answers there. Each repetition has a system prompt of its own, so that none finds the prefix
cache of another. Repetition 0 is there to warm up: a few rows, shown, not counted.

Works: see `works`. `prefix/N` and `tail` compare batchgen with itself, in the input's order.
Prints one JSON line a repetition, then a table of ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.api import load
from batchgen.engine.process import EngineProcess
from batchgen.engine.settings import is_cpu_build, prepare_environment
from batchgen.engine.supervised import SupervisedEngine
from batchgen.executor.local import LocalRun
from batchgen.runner import StopSwitch
from tests.bench import works
from tests.bench.random_model import make_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchgen.engine.death import EngineDeath
    from batchgen.records import EngineSpec
    from tests.bench.works import Work

LOADING = {"load_format": "dummy"}
KEYS = ("max_model_len", "gpu_memory_utilization")
"""Of `[model]`; the others are of `[model.engine]`."""
TEMPERATURE = 0.7
WARM_UP_ROWS = 300
ITSELF = ("prefix", "tail")
"""Works for which batchgen is compared with itself."""

WORKS: dict[str, tuple[Any, int]] = {
    "decode": (works.decode_heavy, 2000),
    "label": (works.labeling, 6000),
    "label+schema": (works.labeling_by_schema, 6000),
    "tail": (works.long_tail, 3000),
}


class KeptEngine(SupervisedEngine):
    """One engine for many runs."""

    def close(self) -> None:
        """Not yet."""

    def end(self) -> None:
        """Now."""
        super().close()


class Product:
    """batchgen, with one engine for all its runs."""

    def __init__(self, model: Path, options: dict[str, Any], folder: Path) -> None:
        own = {key: value for key, value in options.items() if key in KEYS}
        rest = {key: value for key, value in options.items() if key not in KEYS}
        self._model = {"name": str(model), **own, "engine": {**rest, **LOADING}}
        self._folder = folder
        self._kept: KeptEngine | None = None

    def run(self, work: Work, system: str, order: str) -> dict[str, Any]:
        """Run one job; its figures."""
        folder = self._folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        schema = {"schema_column": "schema"} if work.with_schema else {}
        path = work.write(folder / "in.jsonl")
        started = time.monotonic()
        job = load(
            {
                "input": {"path": str(path)},
                "prompt": {"system": system, "user": "{{ user }}"},
                "model": self._model,
                "sampling": {
                    "max_tokens": works.MAX_TOKENS,
                    "temperature": TEMPERATURE,
                    "ignore_eos": True,
                    "column": "sampling",
                },
                "output": {"path": str(folder / "out"), **schema},
                "checks": {"allow_truncated": True},
                "gate": {"max_error_rate": 1.0},
                "run": {"order": order},
            }
        )
        summary = LocalRun(job, stop=StopSwitch(), start=self._start).run()
        assert summary.published_s is not None
        published_s = time.monotonic() - started - (summary.elapsed_s - summary.published_s)
        run = summary.run
        return {
            "seconds": published_s,
            "ok": summary.num_ok,
            "errors": summary.num_errors,
            "output_tokens": run["num_output_tokens"],
            "prompt_tokens": run["num_prompt_tokens"],
            "cached_tokens": run.get("num_cached_tokens"),
            "planned_s": summary.planned_s,
            "working_s": run["working_s"],
            "startup_s": summary.engine["startup_s"],
            "warnings": summary.warnings,
        }

    def _start(
        self, spec: EngineSpec, *, stall_s: float, on_death: Callable[[EngineDeath], None]
    ) -> SupervisedEngine:
        if self._kept is None:
            self._kept = KeptEngine(EngineProcess, spec, on_death=on_death, stall_s=stall_s)
        return self._kept

    def end(self) -> None:
        """Free the GPU."""
        if self._kept is not None:
            self._kept.end()


class Rival:
    """`LLM.chat`, all rows at once or by so many."""

    def __init__(self, model: Path, options: dict[str, Any]) -> None:
        from vllm import LLM

        started = time.monotonic()
        self.llm = LLM(model=str(model), **options, **LOADING)
        self.startup_s = time.monotonic() - started

    def run(self, work: Work, system: str, chunk: int | None) -> dict[str, Any]:
        """Answer all rows; the figures."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        grammar = StructuredOutputsParams(json=works.SCHEMA) if work.with_schema else None
        params = [
            SamplingParams(temperature=TEMPERATURE, structured_outputs=grammar, **fields)
            for fields in work.params()
        ]
        chats: list[Any] = [
            [{"role": "system", "content": system}, {"role": "user", "content": user}]
            for user in work.users
        ]
        started = time.monotonic()
        size = chunk or len(chats)
        outputs = [
            output
            for at in range(0, len(chats), size)
            for output in self.llm.chat(
                chats[at : at + size], params[at : at + size], use_tqdm=False
            )
        ]
        return {
            "seconds": time.monotonic() - started,
            "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
            "prompt_tokens": sum(len(output.prompt_token_ids or ()) for output in outputs),
        }


def main() -> None:
    """Time everything asked for."""
    args = _arguments()
    questions = works.read_questions(args.prompts)
    jobs = [_work(name, questions, args.rows) for name in args.work]
    seen: dict[tuple[str, str], list[float]] = {}

    def note(work: Work, how: str, number: int, figures: dict[str, Any]) -> None:
        print(json.dumps({"work": work.name, "how": how, "repeat": number, **figures}), flush=True)
        if number:
            seen.setdefault((work.name, how), []).append(figures["seconds"])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options: dict[str, Any] = {"max_model_len": args.max_model_len}
        if is_cpu_build():
            prepare_environment(is_cpu=True)
            options["kv_cache_memory_bytes"] = 1 << 30
        else:
            options["gpu_memory_utilization"] = 0.9
        model = args.model or make_model(folder / "model", args.shape, args.tokenizer)
        product = Product(model, options, folder)
        for work, number, system in _repeated(jobs, args.repeats):
            note(work, "batchgen", number, product.run(work, system, "auto"))
            if work.name.startswith(ITSELF):
                plain = product.run(work, f"Again. {system}", "input")
                note(work, "batchgen, input order", number, plain)
        product.end()
        against = [work for work in jobs if not work.name.startswith(ITSELF)]
        if against and not args.alone:
            rival = Rival(model, options)
            for work, number, system in _repeated(against, args.repeats):
                note(work, "LLM.chat", number, rival.run(work, system, None))
                if work.name == "decode" and args.chunk and number == 1:
                    by_chunks = rival.run(work, f"Again. {system}", args.chunk)
                    note(work, f"LLM.chat by {args.chunk}", 1, by_chunks)
    _print_table(args, jobs, seen)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=["8b", "0.6b"], default="8b")
    parser.add_argument("--model", type=Path, help="a model's folder, instead of a random one")
    parser.add_argument("--work", action="append", required=True, help="decode, label, ...")
    parser.add_argument("--rows", type=int, help="instead of the work's own number")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without LLM.chat")
    parser.add_argument("--chunk", type=int, default=256, help="0: no chunks")
    return parser.parse_args()


def _work(name: str, questions: list[str], num_rows: int | None) -> Work:
    rng = random.Random(works.SEED)
    if name.startswith("prefix/"):
        make, default = works.shared_prefixes(int(name.partition("/")[2])), 6000
    else:
        make, default = WORKS[name]
    work: Work = make(questions, num_rows or default, rng)
    return work


def _repeated(jobs: list[Work], repeats: int) -> Iterator[tuple[Work, int, str]]:
    """A little of each work to warm up, then all of them so many times."""
    for number in range(repeats + 1):
        for work in jobs:
            rows = work if number else work.head(WARM_UP_ROWS)
            yield rows, number, f"Part {number} of {work.name}. {work.system}"


def _print_table(
    args: argparse.Namespace, jobs: list[Work], seen: dict[tuple[str, str], list[float]]
) -> None:
    import vllm

    print(f"{_device()}, vllm {vllm.__version__}, Python {platform.python_version()}; {args.shape}")
    for work in jobs:
        ours = statistics.median(seen[work.name, "batchgen"])
        mean_out = statistics.mean(work.max_tokens)
        print(f"{work.name}: {len(work.users)} rows, {mean_out:.0f} tokens out at most on average")
        for (name, how), times in seen.items():
            if name == work.name:
                median = statistics.median(times)
                told = " ".join(f"{seconds:.1f}" for seconds in times)
                ratio = f"batchgen {ours / median:.2f}x" if how != "batchgen" else ""
                print(f"  {how:24} median {median:7.1f} s  ({told})  {ratio}")


def _device() -> str:
    from batchgen.devices import device_name

    return device_name()


if __name__ == "__main__":
    main()
