"""What a user of vLLM itself would write, in a process of its own: the rival in `feeding`.

    python -m tests.bench.vllm_program SPEC.json

The spec says `model`, `options` (vLLM's engine arguments) and `works`: name, system, path of the
rows as JSONL with user, sampling and perhaps schema, and `ways`: an empty one hands `LLM.chat` all
rows, `by` so many after each other, `window` keeps so many inside the engine. Rows are in memory
already, and answers stay there. Prints a line `ready`, waits for a line, then prints one JSON
object for each work and way.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.engine.vllm.settings import is_cpu_build, prepare_environment
from tests.bench.works import TEMPERATURE

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

WARM_UP_ROWS = 300
WARM_UP_TOKENS = 64


def main() -> None:
    """Answer the works of the spec in its ways."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if is_cpu_build():
        prepare_environment(is_cpu=True)
    from vllm import LLM

    started_s = time.monotonic()
    llm = LLM(model=spec["model"], **spec["options"])
    print(json.dumps({"startup_s": time.monotonic() - started_s}), flush=True)
    sys.stdin.readline()
    for work in spec["works"]:
        for way in work["ways"]:
            figures = _answer(llm, work, way)
            print(json.dumps({"work": work["name"], "way": way, **figures}), flush=True)


def _answer(llm: LLM, work: dict[str, Any], way: dict[str, Any]) -> dict[str, Any]:
    """Seconds and tokens of one work; a few of its rows come first, to warm up."""
    rows = [json.loads(line) for line in Path(work["path"]).read_text().splitlines()]
    # Each has a beginning of its own, so that none finds the prefix cache of another; what warms
    # up, too: it would spare the engine the prompts that it is timed with.
    name = f"{work['name']} by {json.dumps(way)}"
    chats = _chats(rows, f"{name}. {work['system']}")
    warm_up = _chats(rows[:WARM_UP_ROWS], f"Warm-up of {name}. {work['system']}")
    _chat(llm, warm_up, [_params(row, WARM_UP_TOKENS) for row in rows[:WARM_UP_ROWS]])
    params = [_params(row) for row in rows]
    size = way.get("by", len(rows))
    started_s = time.monotonic()
    if "window" in way:
        outputs = _by_window(llm, chats, params, way["window"])
    else:
        outputs = [
            output
            for at in range(0, len(chats), size)
            for output in _chat(llm, chats[at : at + size], params[at : at + size])
        ]
    return {
        "work_s": time.monotonic() - started_s,
        "rows": len(outputs),
        "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "prompt_tokens": sum(len(output.prompt_token_ids or ()) for output in outputs),
    }


def _chats(rows: list[dict[str, Any]], system: str) -> list[Any]:
    return [
        [{"role": "system", "content": system}, {"role": "user", "content": row["user"]}]
        for row in rows
    ]


def _chat(llm: LLM, chats: list[Any], params: list[SamplingParams]) -> list[RequestOutput]:
    outputs: list[RequestOutput] = llm.chat(chats, params, use_tqdm=False)
    return outputs


def _by_window(
    llm: LLM, chats: list[Any], params: list[SamplingParams], window: int
) -> list[RequestOutput]:
    """As `LLM.chat`, with at most so many requests inside the engine."""
    from vllm.sampling_params import RequestOutputKind

    tokenizer, engine = llm.get_tokenizer(), llm.llm_engine
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    waiting = iter(enumerate(zip(texts, params, strict=True)))
    outputs: list[RequestOutput] = []
    num_inside, is_more = 0, True
    while is_more or num_inside:
        while is_more and num_inside < window:
            if (entry := next(waiting, None)) is None:
                is_more = False
                break
            number, (text, one) = entry
            one.output_kind = RequestOutputKind.FINAL_ONLY
            prompt: Any = {"prompt_token_ids": tokenizer(text)["input_ids"]}
            engine.add_request(f"{window}-{number}", prompt, one)
            num_inside += 1
        done: list[Any] = [output for output in engine.step() if output.finished]
        num_inside -= len(done)
        outputs += done
    return outputs


def _params(row: dict[str, Any], most: int | None = None) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    fields = dict(row["sampling"])
    if most is not None:
        fields["max_tokens"] = min(most, fields["max_tokens"])
    grammar = StructuredOutputsParams(json=row["schema"]) if "schema" in row else None
    return SamplingParams(temperature=TEMPERATURE, structured_outputs=grammar, **fields)


if __name__ == "__main__":
    main()
