"""The whole product against `LLM.chat`: same rows, same engine options, one machine.

    python -m tests.bench.feeding --shape 0.6b --work label --work label+schema \
        --tokenizer DIR --prompts FILE --repeats 3

`batchgen` is timed from the start of a run to the moment when its snapshot can be read: loading
the job, planning, reading, rendering, tokenizing, generating, committing, publishing; only the
engine's start is left out, for both. `LLM.chat` gets rows that are in memory already, and keeps
its answers there. Each repetition has a system prompt of its own, so that none finds the prefix
cache of another. Repetition 0 is there to warm up: a few rows, shown, not counted.

Works: see `works`. `prefix/N` and `tail` compare batchgen with itself, in the input's order. With
`--fresh` each of batchgen's runs starts its own engine, as it does at night, and is timed from the
moment when that is up: what is read and sorted meanwhile is not counted.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.api import load
from batchgen.engine.devices import device_name
from batchgen.engine.process import EngineProcess
from batchgen.engine.vllm.settings import is_cpu_build, prepare_environment
from batchgen.pipeline.compute import OneEngine
from batchgen.pipeline.context import StopSwitch
from batchgen.pipeline.job_run import JobRun
from tests.bench import works
from tests.bench.random_model import make_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.core.records import EngineSpec
    from tests.bench.works import Work

LOADING = {"load_format": "dummy"}
KEYS = ("max_model_len", "max_num_seqs", "gpu_memory_utilization")
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


class KeptEngine(EngineProcess):
    """One engine for many runs."""

    def close(self) -> None:
        """Not yet."""

    def end(self) -> None:
        """Now."""
        super().close()


class Product:
    """batchgen, with one engine for all its runs."""

    def __init__(
        self, model: Path, options: dict[str, Any], folder: Path, *, is_fresh: bool = False
    ) -> None:
        own = {key: value for key, value in options.items() if key in KEYS}
        rest = {key: value for key, value in options.items() if key not in KEYS}
        self._model = {"name": str(model), **own, "engine": {**rest, **LOADING}}
        self._folder = folder
        self.is_fresh = is_fresh
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
        summary = JobRun(
            job, stop=StopSwitch(), compute=partial(OneEngine, build=self._build)
        ).run()
        assert summary.published_s is not None
        published_s = time.monotonic() - started - (summary.elapsed_s - summary.published_s)
        run = summary.run
        if self.is_fresh:
            self.end()
        return {
            "seconds": published_s - (run["ready_after_s"] if self.is_fresh else 0.0),
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

    def _build(self, spec: EngineSpec) -> KeptEngine:
        if self._kept is None:
            self._kept = KeptEngine(spec)
        return self._kept

    def end(self) -> None:
        """Free the GPU."""
        if self._kept is not None:
            self._kept.end()
            self._kept = None


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


class Figures:
    """What was measured, by work and way, in the order in which it was."""

    def __init__(self, log: Path | None) -> None:
        """Begin with what the log holds, if there is one."""
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self._log = log
        if log is not None and log.exists():
            for line in log.read_text(encoding="utf-8").splitlines():
                self._keep(json.loads(line))

    def note(self, work: Work, how: str, number: int, figures: dict[str, Any]) -> None:
        """Print one repetition and keep it."""
        entry = {"work": work.name, "how": how, "repeat": number, **figures}
        line = json.dumps(entry)
        print(line, flush=True)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self._keep(entry)

    def _keep(self, entry: dict[str, Any]) -> None:
        if entry["repeat"]:
            self.seconds.setdefault((entry["work"], entry["how"]), []).append(entry["seconds"])


def main() -> None:
    """Time everything asked for."""
    args = _arguments()
    questions = works.read_questions(args.prompts)
    jobs = [_work(name, questions, args.rows) for name in args.work]
    figures = Figures(args.log)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = _options(args)
        model = args.model or make_model(folder / "model", args.shape, args.tokenizer)
        if args.only != "chat":
            product = Product(model, options, folder, is_fresh=args.fresh)
            _time_product(product, jobs, args.repeats, figures)
        against = [work for work in jobs if not work.name.startswith(ITSELF)]
        if against and args.only != "batchgen":
            _time_rival(Rival(model, options), against, args, figures)
    _print_table(args, jobs, figures.seconds)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"max_model_len": args.max_model_len}
    if args.max_num_seqs is not None:
        options["max_num_seqs"] = args.max_num_seqs
    if is_cpu_build():
        prepare_environment(is_cpu=True)
        return {**options, "kv_cache_memory_bytes": 1 << 30}
    return {**options, "gpu_memory_utilization": 0.9}


def _time_product(product: Product, jobs: list[Work], repeats: int, figures: Figures) -> None:
    for work, number, system in _repeated(jobs, repeats):
        if product.is_fresh and not number:
            continue  # There is nothing that would stay warm.
        figures.note(work, "batchgen", number, product.run(work, system, "auto"))
        if work.name.startswith(ITSELF):
            plain = product.run(work, f"Again. {system}", "input")
            figures.note(work, "batchgen, input order", number, plain)
    product.end()


def _time_rival(rival: Rival, jobs: list[Work], args: argparse.Namespace, figures: Figures) -> None:
    for work, number, system in _repeated(jobs, args.repeats):
        figures.note(work, "LLM.chat", number, rival.run(work, system, None))
        if work.name == "decode" and args.chunk and number == 1:
            by_chunks = rival.run(work, f"Again. {system}", args.chunk)
            figures.note(work, f"LLM.chat by {args.chunk}", number, by_chunks)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=["8b", "0.6b"], default="8b")
    parser.add_argument("--model", type=Path, help="a model's folder, instead of a random one")
    parser.add_argument("--work", action="append", required=True, help="NAME or NAME=ROWS")
    parser.add_argument("--rows", type=int, help="instead of the work's own number")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, help="instead of vLLM's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["batchgen", "chat"], help="one of the two")
    parser.add_argument("--fresh", action="store_true", help="an engine for each run of batchgen")
    parser.add_argument("--log", type=Path, help="JSONL to keep the figures in, and to go on with")
    parser.add_argument("--chunk", type=int, default=256, help="0: no chunks")
    return parser.parse_args()


def _work(name: str, questions: list[str], num_rows: int | None) -> Work:
    rng = random.Random(works.SEED)
    name, _, own_num = name.partition("=")
    num_rows = int(own_num) if own_num else num_rows
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
            rows = work if number else work.warm_up(WARM_UP_ROWS)
            yield rows, number, f"Part {number} of {work.name}. {work.system}"


def _print_table(
    args: argparse.Namespace, jobs: list[Work], seen: dict[tuple[str, str], list[float]]
) -> None:
    import vllm

    python = platform.python_version()
    print(f"{device_name()}, vllm {vllm.__version__}, Python {python}; {args.shape}")
    for work in jobs:
        ours = seen.get((work.name, "batchgen"))
        mean_out = statistics.mean(work.max_tokens)
        print(f"{work.name}: {len(work.users)} rows, {mean_out:.0f} tokens out at most on average")
        for (name, how), times in seen.items():
            if name == work.name:
                median = statistics.median(times)
                told = " ".join(f"{seconds:.1f}" for seconds in times)
                ratio = ""
                if ours and how != "batchgen":
                    ratio = f"batchgen {statistics.median(ours) / median:.2f}x"
                print(f"  {how:24} median {median:7.1f} s  ({told})  {ratio}")


if __name__ == "__main__":
    main()
