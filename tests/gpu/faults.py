"""Real faults of a real engine on a GPU: its core killed mid-run, and a run out of memory.

    python -m tests.gpu.faults --tokenizer DIR --prompts FILE

Random weights in Qwen3-0.6B's shape. Prints one JSON line a fault: how the run ended, the deaths
that it recorded, and whether every row was answered once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import batchgen
from batchgen.core.errors import BatchgenError
from tests.bench.random_model import make_model


def main() -> None:
    """Run both faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--kv-gib", type=float, default=76.5, help="Leaves too little beside it")
    parser.add_argument("--only", choices=["kill", "memory"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", "0.6b", args.tokenizer)
        with args.prompts.open(encoding="utf-8") as lines:
            rows = list(lines)[: args.rows]
        (folder / "in.jsonl").write_text("".join(rows), encoding="utf-8")
        if args.only != "memory":
            print(json.dumps({"fault": "core killed", **_core_killed(folder, model)}), flush=True)
        if args.only != "kill":
            report = _out_of_memory(folder, model, args.kv_gib)
            print(json.dumps({"fault": "out of memory", **report}), flush=True)


def _job(folder: Path, model: Path, out: str, **engine: Any) -> dict[str, Any]:
    return {
        "input": {"path": str(folder / "in.jsonl")},
        "prompt": {"user": "{{ question }}"},
        "model": {
            "name": str(model),
            "max_model_len": 4096,
            "engine": {"load_format": "dummy", "enforce_eager": True, **engine},
        },
        "sampling": {"max_tokens": 400, "temperature": 1.0, "ignore_eos": True},
        "output": {"path": str(folder / out)},
        "run": {"flush_rows": 200},
    }


def _core_killed(folder: Path, model: Path) -> dict[str, Any]:
    out = folder / "killed"
    killed: list[int] = []

    def kill() -> None:
        while not list(out.glob("_batchgen/parts/*.parquet")):
            time.sleep(0.05)
        command = ["pgrep", "-f", "EngineCore"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        for pid in map(int, found.stdout.split()):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    threading.Thread(target=kill, daemon=True).start()
    return {**_run(_job(folder, model, "killed"), out), "killed": len(killed)}


def _out_of_memory(folder: Path, model: Path, kv_gib: float) -> dict[str, Any]:
    # With the KV cache's size given, vLLM does not measure what else it needs: long prefills find
    # no room beside it.
    memory = {"kv_cache_memory_bytes": int(kv_gib * 2**30), "max_num_batched_tokens": 65536}
    return _run(_job(folder, model, "oom", **memory), folder / "oom")


def _run(job: dict[str, Any], out: Path) -> dict[str, Any]:
    started = time.monotonic()
    report: dict[str, Any] = {}
    try:
        summary = batchgen.run(job)
        report = {"state": summary.state, "num_ok": summary.num_ok, "warnings": summary.warnings}
        rows = batchgen.read(out).collect()
        report["rows"] = len(rows)
        report["ids_in_order"] = rows["question"].to_list() == [
            json.loads(line)["question"]
            for line in Path(job["input"]["path"]).read_text(encoding="utf-8").splitlines()
        ]
    except BatchgenError as error:
        report = {"state": "stopped", "exit_code": int(error.exit_code), "error": str(error)[:600]}
    deaths = sorted(out.glob("_batchgen/runs/*/engine-death-*.json"))
    report["deaths"] = [json.loads(path.read_text())["reason"][:300] for path in deaths]
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


if __name__ == "__main__":
    main()
