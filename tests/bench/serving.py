"""A warm server against the engine in the run's own process: same rows, model and settings.

    python -m tests.bench.serving --shape 0.6b --work equal=3000 --tokenizer DIR --prompts FILE \
        --concurrency 256 512 1024

Offline: `batchgen run` with one engine, which is what one server is. By HTTP: `batchgen engine up`
once, then the same rows through `backend = "openai"`; then `night` rows on the warm server, from
the start of the process to published; then `vllm bench serve` against it, with the same prompts, at
each concurrency. `work` is from the engine's readiness, or from the first trial request's answer,
to the published snapshot; for `vllm bench serve` it is the duration that it tells.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.engine.devices import device_name
from tests.bench import works
from tests.bench.feeding import LOADING, make_work, toml
from tests.bench.random_model import SHAPES, make_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bench.works import Work

MAX_MODEL_LEN = 8192


def main() -> None:
    """Time the work offline and by HTTP."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # No server is left behind.
    questions = works.read_questions(args.prompts)
    print(f"{device_name()}, Python {platform.python_version()}, {args.shape}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", args.shape, args.tokenizer)
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        jobs = [make_work(one, questions) for one in args.work]
        offline = [_time(folder / f"offline-{job.file_name}", model, job, {}) for job in jobs]
        with _server(folder, model, jobs[0]) as (url, key):
            os.environ["BENCH_KEY"] = key
            server = {"backend": "openai", "base_url": url, "api_key_env": "BENCH_KEY"}
            _time(folder / "warm-up", model, make_work("night=300", questions), server)
            for job, own in zip(jobs, offline, strict=True):
                _time(folder / f"http-{job.file_name}", model, job, server, own)
                for size in args.concurrency:
                    _bench_serve(folder, model, job, url, size)
            night = make_work("night", questions)
            _time(folder / "night", model, night, server)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.6b")
    parser.add_argument("--work", action="append", required=True, help="NAME or NAME=ROWS")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[256, 1024])
    return parser.parse_args()


def _job(folder: Path, model: Path, work: Work, more: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    tables = {
        "input": {"path": str(work.write(folder / "in.jsonl"))},
        "prompt": {"system": work.system, "user": "{{ user }}"},
        "model": {"name": str(model), "max_model_len": MAX_MODEL_LEN, **more},
        **({} if more else {"model.engine": LOADING}),
        "sampling": {
            "max_tokens": works.MAX_TOKENS,
            "temperature": works.TEMPERATURE,
            "ignore_eos": True,
            "column": "sampling",
        },
        "output": {"path": str(folder / "out")},
        "checks": {"allow_truncated": True},
        **({} if more else {"run": {"engines_per_gpu": 1}}),
    }
    path = folder / "job.toml"
    path.write_text(toml(tables), encoding="utf-8")
    return path


def _time(
    folder: Path, model: Path, work: Work, more: dict[str, Any], offline: float | None = None
) -> float:
    """Run a job in a process of its own; return the tokens a second of its work."""
    began_s = time.monotonic()
    job = _job(folder, model, work, more)
    command = [sys.executable, "-m", "batchgen", "run", str(job), "--json"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    process_s = time.monotonic() - began_s
    if ran.returncode:
        sys.exit(f"{folder.name}: {ran.returncode}: {ran.stdout[-2000:]}")
    summary = json.loads(ran.stdout)
    figures = summary["run"]
    work_s = summary["published_s"] - figures["ready_after_s"]
    rate = float(figures["num_output_tokens"] / work_s)
    ratio = f", {rate / offline:.2f} of offline" if offline else ""
    print(
        f"{folder.name}: {len(work.users)} rows, {summary['num_ok']} ok, process {process_s:.1f} s,"
        f" work {work_s:.1f} s, {rate:,.0f} tokens/s out{ratio}",
        flush=True,
    )
    print(f"  {json.dumps({key: figures[key] for key in figures if key != 'series'})[:1500]}")
    return rate


@contextmanager
def _server(folder: Path, model: Path, work: Work) -> Iterator[tuple[str, str]]:
    job = _job(folder / "server", model, work, {})
    command = [sys.executable, "-m", "batchgen", "engine", "up", str(job)]
    began_s = time.monotonic()
    log = (folder / "server.log").open("wb")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    ) as server:
        try:
            yield _wait(server, began_s)
        finally:
            os.killpg(server.pid, 15)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)
            print((folder / "server.log").read_text(errors="replace")[-1500:])


def _wait(server: subprocess.Popen[bytes], began_s: float) -> tuple[str, str]:
    """Return its address and its key once it is up."""
    import httpx

    assert server.stdout is not None
    first = server.stdout.readline().decode()
    found = re.search(r"engine: (\S+), its key is in (\S+)", first)
    if found is None:
        sys.exit(f"engine up: {first}")
    url, key = found[1], Path(found[2]).read_text().strip()
    while server.poll() is None:
        try:
            if httpx.get(f"{url.removesuffix('/v1')}/health", timeout=5).status_code == 200:
                print(f"server: up after {time.monotonic() - began_s:.1f} s", flush=True)
                return url, key
        except httpx.HTTPError:
            time.sleep(0.5)
    sys.exit(f"engine up ended with {server.returncode}")


def _bench_serve(folder: Path, model: Path, work: Work, url: str, size: int) -> None:
    """Let vLLM's own client ask the same prompts, so many at once."""
    rows = folder / "bench.jsonl"
    rng = random.Random(size)  # Prompts that no prefix cache knows.
    with rows.open("w", encoding="utf-8") as out:
        for user in work.users:
            prompt = f"{rng.random()} {work.system}\n{user}"
            out.write(json.dumps({"prompt": prompt}) + "\n")
    out_len = sum(work.max_tokens) // len(work.max_tokens)
    words = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    words += ["--base-url", url.removesuffix("/v1"), "--model", str(model), "--ignore-eos"]
    words += ["--dataset-name", "custom", "--dataset-path", str(rows), "--skip-chat-template"]
    words += ["--custom-output-len", str(out_len), "--num-prompts", str(len(work.users))]
    words += ["--max-concurrency", str(size), "--disable-tqdm", "--seed", "0"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *words]
    environment = {**os.environ, "OPENAI_API_KEY": os.environ["BENCH_KEY"]}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    told = dict(re.findall(r"^([^:\n]+):\s+([0-9.]+)\s*$", ran.stdout, re.MULTILINE))
    kept = ("Successful requests", "Benchmark duration (s)", "Output token throughput (tok/s)")
    print(f"vllm bench serve, {size} at once:", {key: told.get(key) for key in kept}, flush=True)
    if ran.returncode or not told:
        print(f"  ended with {ran.returncode}: {ran.stderr[-800:]}", flush=True)


if __name__ == "__main__":
    main()
