"""One job of a random model through `batchgen run`, and where its time went.

    python -m tests.bench.one_job --shape 8b --rows 200 --tokens 64 \
        --tokenizer FOLDER --prompts gsm8k_train.jsonl --set run.engine_defaults=vllm

Prints a line: process start to end, to published, to the engine's readiness, work alone, output
tokens a second, what batchgen chose. `--cold` empties vLLM's cache before. With `--log` also the
lines of vLLM's log that tell where its start went.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from tests.bench.random_model import SHAPES, make_model

MARKS = re.compile(
    r"Initializing a V1|Starting to load|oading weights|Model loading|torch.compile|KV cache|"
    r"apturing|init engine|Compil|Autotun|warm|Memory profiling"
)
JOB = """
[input]
path = "rows.jsonl"
[prompt]
user = "{{ question }}"
[model]
name = "model"
max_model_len = 2048
[model.engine]
load_format = "dummy"
enable_prefix_caching = false
[sampling]
temperature = 0
max_tokens = TOKENS
ignore_eos = true
[checks]
allow_truncated = true
[output]
path = "out"
"""


def write_job(folder: Path, args: argparse.Namespace) -> Path:
    """Write a job, its model and its rows."""
    make_model(folder / "model", args.shape, args.tokenizer)
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    # Again and again, if there are too few: a number in front makes each another.
    rows = (
        {"question": f"{number}. " + " ".join([question] * args.repeat)}
        for number, question in enumerate(islice(cycle(questions), args.rows))
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    job = folder / "job.toml"
    job.write_text(JOB.replace("TOKENS", str(args.tokens)), encoding="utf-8")
    return job


def run(job: Path, settings: list[str]) -> tuple[float, dict[str, object]]:
    """Run it in a process of its own; return its seconds and its summary."""
    sets = [word for one in settings for word in ("--set", one)]
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "batchgen", "run", str(job), "--json", *sets],
        capture_output=True,
        text=True,
        check=False,
    )
    wall_s = time.monotonic() - began_s
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    print("".join(f"  {line}\n" for line in done.stderr.splitlines() if "engine:" in line), end="")
    return wall_s, json.loads(done.stdout)


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=1, help="a question in its prompt")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--log", action="store_true")
    args = parser.parse_args()
    if args.cold:
        for cache in ("vllm", "flashinfer"):
            shutil.rmtree(Path.home() / ".cache" / cache, ignore_errors=True)
        shutil.rmtree(Path.home() / ".triton", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder), args)
        wall_s, found = run(job, args.set)
        log = Path(str(found["summary_path"])).with_name("vllm.log")
        lines = log.read_text(errors="replace").splitlines()
    figures, engine = found["run"], found["engine"]
    assert isinstance(figures, dict)
    assert isinstance(engine, dict)
    if args.log:
        kept = [line[:200] for line in lines if MARKS.search(line)]
        print("\n".join(f"  {line}" for line in [lines[0][:200], *kept]))
    chosen = {name: str(value)[:60] for name, value in engine["settings"].items()}
    print(
        f"{args.shape} {args.rows} x {args.tokens} (prompts x {args.repeat}) {' '.join(args.set)}"
        f"{' cold' if args.cold else ''}: process {wall_s:.1f} s, published "
        f"{found['published_s']:.1f} s, ready {figures['ready_after_s']:.1f} s (engine "
        f"{engine['startup_s']:.1f} s), work {figures['working_s']:.2f} s, "
        f"{figures['output_tokens_per_s']:,.0f} tok/s out, "
        f"{figures['num_prompt_tokens'] / figures['working_s']:,.0f} in, seqs "
        f"{engine['max_num_seqs']}, {chosen}",
        flush=True,
    )


if __name__ == "__main__":
    main()
