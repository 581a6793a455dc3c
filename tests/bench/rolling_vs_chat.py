"""The whole product against `LLM.chat(all rows)`: same rows, options, seeds, one process.

    python -m tests.bench.rolling_vs_chat --shape 8b --rows 2000 --tokenizer DIR --prompts FILE

batchgen reads, renders, commits and publishes; `LLM.chat` does none of that. Both are timed from
the moment that their engine is up. Answers end at random: of a vocabulary of 151,936 tokens drawn
near evenly by random weights, 950 stop an answer, so lengths are geometric with a mean near 160.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import batchgen
from batchgen.records import Ordinal
from batchgen.seeds import row_seed
from tests.bench.random_model import make_model

SYSTEM = "Solve the problem step by step."
MAX_TOKENS = 2048
STOP_TOKEN_IDS = list(range(1000, 1950))
ENGINE = {"load_format": "dummy"}
MODEL = {"max_model_len": 8192, "gpu_memory_utilization": 0.9}


def main() -> None:
    """Time both and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["8b", "0.6b"], default="8b")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--repeats", type=int, default=1, help="Of LLM.chat")
    parser.add_argument(
        "--chunk", type=int, default=256, help="Also LLM.chat by so many rows; 0: no"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", args.shape, args.tokenizer)
        rows = _rows(args.prompts, args.rows, folder / "in.jsonl")
        product = _time_product(folder, model)
        chat = _time_chat(model, rows, args.repeats, args.chunk)
    chat_s = min(chat["chat_s"])
    report = {
        "shape": args.shape,
        "rows": args.rows,
        "python": platform.python_version(),
        **product,
        **chat,
        "ratio_to_chat": product["product_s"] / chat_s,
    }
    print(json.dumps(report))


def _rows(prompts: Path, num_rows: int, path: Path) -> list[str]:
    with prompts.open(encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines]
    questions = (questions * (num_rows // len(questions) + 1))[:num_rows]
    path.write_text(
        "".join(json.dumps({"question": q}) + "\n" for q in questions), encoding="utf-8"
    )
    return questions


def _time_product(folder: Path, model: Path) -> dict[str, Any]:
    summary = batchgen.run(
        {
            "input": {"path": str(folder / "in.jsonl")},
            "prompt": {"system": SYSTEM, "user": "{{ question }}"},
            "model": {"name": str(model), **MODEL, "engine": ENGINE},
            "sampling": {
                "max_tokens": MAX_TOKENS,
                "temperature": 1.0,
                "top_p": 1.0,
                "stop_token_ids": STOP_TOKEN_IDS,
            },
            "output": {"path": str(folder / "out")},
            "checks": {"allow_truncated": True},
        }
    )
    run = summary.run
    published_s = run["elapsed_s"] - run["ready_after_s"]
    return {
        "state": summary.state,
        "engine": summary.engine,
        "product_s": published_s,
        "product_working_s": run["working_s"],
        "product_ok": summary.num_ok,
        "product_output_tokens": run["num_output_tokens"],
        "product_output_tokens_per_s": run["num_output_tokens"] / published_s,
        "parts": run["num_parts"],
    }


def _time_chat(model: Path, rows: list[str], repeats: int, chunk: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(model), **MODEL, **ENGINE)
    chats: list[Any] = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row}] for row in rows
    ]
    params = [
        SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            stop_token_ids=STOP_TOKEN_IDS,
            seed=row_seed(0, Ordinal(0, number)),
        )
        for number in range(len(rows))
    ]
    llm.chat(chats[:32], params[:32], use_tqdm=False)  # Warm, as the product's engine is not.
    times, tokens = [], 0
    for _ in range(repeats):
        llm.reset_prefix_cache()
        started = time.monotonic()
        outputs = llm.chat(chats, params, use_tqdm=False)
        times.append(time.monotonic() - started)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    report: dict[str, Any] = {"chat_s": times, "chat_output_tokens": tokens}
    if chunk:
        llm.reset_prefix_cache()
        started = time.monotonic()
        for at in range(0, len(chats), chunk):
            llm.chat(chats[at : at + chunk], params[at : at + chunk], use_tqdm=False)
        report[f"chat_by_{chunk}_s"] = time.monotonic() - started
    return report


if __name__ == "__main__":
    main()
