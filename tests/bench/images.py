"""Rows with an image each: batchgen against `LLM.chat(all)`, and by how many processes it renders.

    python -m tests.bench.images --rows 2000 --workers 0 4

The model is in the shape of SmolVLM-500M (SigLIP base, SmolLM2-360M) with random weights; images
are JPEG of 1,600 x 1,200 pixels, each another. `--workers` are those that batchgen decodes and
resizes images in (`renderer_num_workers`); without a number of workers it chooses. `work` is from
the engine's readiness to the published snapshot, for `LLM.chat` to the answers in memory, after a
few images to warm up.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from batchgen.engine.devices import device_name
from tests.bench.feeding import toml
from tests.contract.vision_model import Shape
from tests.contract.vision_model import main as make_vision_model

SHAPE = Shape(512, 16, 4, (768, 3072, 12, 12), (960, 2560, 32, 15), 8192, 2)
SIZE = (1600, 1200)
TOKENS = 32
WARM_UP_ROWS = 50
QUESTION = "What is in the picture?"
MODEL = {"max_model_len": 2048}


def main() -> None:
    """Time each way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="*", default=[], metavar="N")
    parser.add_argument("--rival", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rival is not None:
        _rival(args.rival)
        return
    print(f"{device_name()}, Python {platform.python_version()}, {args.rows} images of {SIZE}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_vision_model(str(folder / "model"), SHAPE)
        with ProcessPoolExecutor() as pool:
            paths = [folder / f"{number}.jpg" for number in range(args.rows + WARM_UP_ROWS)]
            list(pool.map(_draw, paths, chunksize=32))
        lines = [json.dumps({"image": str(path)}) + "\n" for path in paths]
        (folder / "rows.jsonl").write_text("".join(lines[: args.rows]))
        (folder / "warm-up.jsonl").write_text("".join(lines[args.rows :]))
        command = [sys.executable, "-m", "tests.bench.images", "--rival", name]
        subprocess.run(command, check=False)
        for workers in (None, *args.workers):
            _batchgen(folder, args.rows, workers)


def _draw(path: Path) -> None:
    """Write a picture that JPEG cannot make much smaller: coarse noise, made large."""
    from PIL import Image

    rng = random.Random(path.name)
    coarse = Image.frombytes("RGB", (160, 120), rng.randbytes(160 * 120 * 3))
    file = io.BytesIO()
    coarse.resize(SIZE).save(file, "JPEG", quality=90)
    path.write_bytes(file.getvalue())


def _batchgen(folder: Path, num_rows: int, workers: int | None) -> None:
    own = folder / f"job-{workers}"
    own.mkdir()
    tables: dict[str, dict[str, Any]] = {
        "input": {"path": str(folder / "rows.jsonl")},
        "prompt": {"user": QUESTION, "images": "image", "images_folder": str(folder)},
        "model": {"name": str(folder / "model"), **MODEL},
        "sampling": {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True},
        "output": {"path": str(own / "out")},
        "checks": {"allow_truncated": True},
    }
    if workers is not None:
        tables["model.engine"] = {"renderer_num_workers": max(1, workers)}
    job = own / "job.toml"
    job.write_text(toml(tables), encoding="utf-8")
    command = [sys.executable, "-m", "batchgen", "run", str(job), "--json"]
    began_s = time.monotonic()
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    whole_s = time.monotonic() - began_s
    if ran.returncode:
        sys.exit(ran.stdout[-3000:])
    summary = json.loads(ran.stdout)
    work_s = summary["published_s"] - summary["run"]["ready_after_s"]
    engine = {key: str(value)[:80] for key, value in summary["engine"].items()}
    print(
        f"batchgen, workers {workers}: work {work_s:.1f} s ({num_rows / work_s:.0f} images/s), "
        f"whole {whole_s:.1f} s, {summary['num_ok']} ok, {engine}",
        flush=True,
    )


def _rival(folder: Path) -> None:
    from vllm import LLM, SamplingParams

    began_s = time.monotonic()
    llm = LLM(str(folder / "model"), allowed_local_media_path=str(folder), **MODEL)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)

    def answer(name: str) -> float:
        chats: list[Any] = []
        for line in (folder / name).read_text().splitlines():
            url = {"url": f"file://{json.loads(line)['image']}"}
            parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": QUESTION}]
            chats.append([{"role": "user", "content": parts}])
        started_s = time.monotonic()
        llm.chat(chats, params, use_tqdm=False)
        work_s = time.monotonic() - started_s
        print(
            f"LLM.chat(all), {name}: work {work_s:.1f} s ({len(chats) / work_s:.0f} images/s), "
            f"since its import {time.monotonic() - began_s:.1f} s",
            flush=True,
        )
        return work_s

    answer("warm-up.jsonl")
    answer("rows.jsonl")


if __name__ == "__main__":
    main()
