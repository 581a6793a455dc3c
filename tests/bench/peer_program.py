"""What a user of each peer would write: run by that peer's own interpreter, never imported.

    PYTHON peer_program.py NAME SPEC.json

The spec says `model`, `options` (vLLM's engine arguments), `sampling`, `rows` (JSONL with id and
user), `folder` (where answers go) and, for a client, `endpoint`. Every program may be started
again after a crash, and then does what the peer's documentation promises.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

RAY_BATCH = 64
"""As in the example of vLLMEngineProcessorConfig, ray 2.60."""


def chat_all(spec: dict[str, Any]) -> None:
    """`LLM.chat` with everything, written at the end."""
    _chat(spec, len(_rows(spec)))


def chat_by_256(spec: dict[str, Any]) -> None:
    """`LLM.chat` by 256 rows, each appended; what the file has is skipped."""
    _chat(spec, 256)


def _chat(spec: dict[str, Any], size: int) -> None:
    from vllm import LLM, SamplingParams

    path = Path(spec["folder"]) / "answers.jsonl"
    done = set()
    if path.exists():
        kept = path.read_bytes()
        kept = kept[: kept.rfind(b"\n") + 1]  # A line that was being written.
        path.write_bytes(kept)
        done = {json.loads(line)["id"] for line in kept.splitlines()}
    rows = [row for row in _rows(spec) if row["id"] not in done]
    llm = LLM(model=spec["model"], **spec["options"])
    params = SamplingParams(**spec["sampling"])
    with path.open("a", encoding="utf-8") as file:
        for at in range(0, len(rows), size):
            chunk = rows[at : at + size]
            chats: list[Any] = [[{"role": "user", "content": row["user"]}] for row in chunk]
            outputs = llm.chat(chats, params, use_tqdm=False)
            for row, output in zip(chunk, outputs, strict=True):
                answer = {"id": row["id"], "text": output.outputs[0].text}
                file.write(json.dumps(answer) + "\n")
            file.flush()
            os.fsync(file.fileno())


def distribatch(spec: dict[str, Any]) -> None:
    """One engine in this process; a checkpoint folder, then all answers as Parquet."""
    import distribatch as dib  # type: ignore[import-not-found, unused-ignore]
    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

    sampling = {key: value for key, value in spec["sampling"].items() if key != "ignore_eos"}
    job = dib.GenerateJob(
        model=dib.models.path(spec["model"]),
        engine="vllm",
        engine_options=spec["options"],
        prompt="{user}",
        sampling=dib.Sampling(**sampling),
    )
    folder = Path(spec["folder"])
    answered = job.run(
        pd.DataFrame(_rows(spec)),
        checkpoint=str(folder / "checkpoint"),
        id_col="id",
        **spec["settings"],
    )
    answered[["id", "output", "output_error"]].to_parquet(folder / "answers.parquet")


def ray(spec: dict[str, Any]) -> None:
    """Ray Data LLM from JSONL to Parquet, with checkpoints by id."""
    import ray  # type: ignore[import-not-found, unused-ignore]
    from ray.data.checkpoint import CheckpointConfig  # type: ignore[import-not-found, unused-ignore]
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # type: ignore[import-not-found, unused-ignore]

    folder = Path(spec["folder"])
    # Every stage wants a processor, and the engine's a GPU: where there are too few, tell Ray of
    # more, or it waits for ever.
    told = {"num_gpus": 1} if spec["is_cpu"] else {}
    ray.init(num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, **told)
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(folder / "checkpoint")
    )
    config = vLLMEngineProcessorConfig(
        model_source=spec["model"],
        engine_kwargs=spec["options"],
        concurrency=1,
        batch_size=RAY_BATCH,
    )
    sampling = spec["sampling"]
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "messages": [{"role": "user", "content": row["user"]}],
            "sampling_params": sampling,
        },
        postprocess=lambda row: {"id": row["id"], "text": row["generated_text"]},
    )
    processor(ray.data.read_json(spec["rows"])).write_parquet(str(folder / "answers"))


def saturate(spec: dict[str, Any]) -> None:
    """A client of a server that is up already."""
    from saturate import pump  # type: ignore[import-not-found, unused-ignore]

    pump(
        _rows(spec),
        to_request=lambda row: {
            "model": spec["model"],
            "messages": [{"role": "user", "content": row["user"]}],
            **spec["sampling"],
        },
        parse=lambda _row, told: {"text": told["choices"][0]["message"]["content"]},
        endpoint=spec["endpoint"],
        output=str(Path(spec["folder"]) / "answers"),
        id_key="id",
    )


def _rows(spec: dict[str, Any]) -> list[dict[str, str]]:
    with Path(spec["rows"]).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


PROGRAMS = {
    program.__name__: program for program in (chat_all, chat_by_256, distribatch, ray, saturate)
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
