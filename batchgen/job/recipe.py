"""The recipe: everything in a job that changes what an answer would be, and nothing else.

Two runs with equal fingerprints may share results; a different one is refused with `diff`.
Values are hashed as parsed, never as TOML text, so that comments and order do not matter.

Here too: the seed that each attempt of a row is sampled with, the same in every run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchgen.core.records import Ordinal
    from batchgen.job.model import JobConfig
    from batchgen.job.sampling import SamplingConfig


# Options of [model.engine] that only move time and memory about. Any other option is taken to
# change answers: to refuse once too often is cheap, to mix two models' answers is not.
SPEED_OPTIONS = frozenset(
    {
        "async_scheduling",
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "cudagraph_capture_sizes",
        "data_parallel_size",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_cudagraph_capture_size",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "num_gpu_blocks_override",
        "optimization_level",
        "performance_mode",
        "pipeline_parallel_size",
        "renderer_num_workers",
        "swap_space",
        "tensor_parallel_size",
    }
)

Recipe = dict[str, Any]
_SHOWN_CHARS = 120
_CHARS_BEFORE = 40
"""Of what two long values have in common before they differ."""


def make_recipe(
    job: JobConfig,
    model_identity: Mapping[str, str],
    lora_identity: Mapping[str, Mapping[str, str]] | None = None,
) -> Recipe:
    """Gather the recipe of a loaded job.

    `[[retry]]` is left out: it only touches rows that failed, and may change for the next night.

    Args:
        job: As `load_job` returns it.
        model_identity: What tells this model from others: content hashes of a folder, or hub id
            and commit.
        lora_identity: The same of each LoRA adapter, by its name.
    """
    files = {f"{name}_file" for name in ("user", "system", "chat_template", "examples", "tools")}
    prompt = job.prompt.model_dump(
        exclude=files | {"images_folder", "image_domains"}, exclude_none=True
    )
    for name in ("examples", "tools"):
        if prompt[name]:
            prompt[name] = [_ordered(item) for item in prompt[name]]
        else:
            del prompt[name]
    if job.prompt.chat_template_file:
        prompt["chat_template"] = Path(job.prompt.chat_template_file).read_text(encoding="utf-8")
    model = job.model.model_dump(
        include={
            *("backend", "dtype", "quantization", "max_model_len", "trust_remote_code"),
            *("lora_column", "reasoning_parser", "tool_call_parser"),
        },
        exclude_none=True,
    )
    if job.model.is_pinned:
        # The very same model, whoever serves it: a row needs no second answer for that.
        model["backend"] = "vllm" if job.model.backend == "openai" else job.model.backend
    if lora_identity:
        model["lora"] = {name: dict(files) for name, files in lora_identity.items()}
    engine = {k: v for k, v in job.model.engine.items() if k not in SPEED_OPTIONS}
    return {
        **_task(job),
        "prompt": prompt,
        "model": {**model, **({"engine": engine} if engine else {}), "files": dict(model_identity)},
        **({"form": form} if (form := _form(job)) else {}),
    }


def _task(job: JobConfig) -> dict[str, Any]:
    """How answers are generated, or what is made of rows instead."""
    if job.task == "generate":
        return {"sampling": _sampling(job)}
    # Numbers of another type are other columns; plans keep those apart, see `frozen_job`.
    pooling = job.pooling.model_dump(exclude_none=True, exclude_defaults=True)
    return {"task": job.task, "pooling": pooling}


def _sampling(job: JobConfig) -> dict[str, Any]:
    sampling = job.sampling.model_dump(exclude_none=True)
    if sampling["n"] == 1:
        del sampling["n"]
    if not sampling["extra"]:
        del sampling["extra"]
    return sampling


def _form(job: JobConfig) -> dict[str, Any]:
    """The form that answers are held to; empty for free text."""
    names = {"json_schema", "schema_column", "choice", "regex", "grammar", "json_object"}
    form = job.output.model_dump(include=names, exclude_none=True, exclude_defaults=True)
    if "json_schema" in form:
        form["schema"] = _ordered(form.pop("json_schema"))
    return form


def _ordered(value: object) -> str:
    """As text, which keeps the order of keys.

    That of a schema's properties is the order in which the model answers, and of the columns.
    """
    return json.dumps(value, ensure_ascii=False)


def without_speed(recipe: Recipe) -> Recipe:
    """A recipe of any version of batchgen, without what now is known to move time about only."""
    model = dict(recipe["model"])
    engine = {k: v for k, v in model.pop("engine", {}).items() if k not in SPEED_OPTIONS}
    return {**recipe, "model": {**model, **({"engine": engine} if engine else {})}}


def fingerprint(recipe: Recipe) -> str:
    """128-bit hash of a recipe, 32 hex digits."""
    canonical = json.dumps(recipe, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def engine_digest(recipe: Recipe) -> str:
    """Hash what an engine is started for: the model, its settings and the task."""
    task = {"task": recipe["task"]} if "task" in recipe else {}
    return fingerprint({**recipe["model"], **task})


def diff(old: Recipe, new: Recipe) -> list[str]:
    """Return one line a changed key: `prompt.user: 'old' -> 'new'`."""
    before, after = dict(flat(old)), dict(flat(new))
    return [
        f"{_as_in_job(key)}: {' -> '.join(_side_by_side(before, after, key))}"
        for key in sorted(before.keys() | after.keys())
        if _shown(before, key) != _shown(after, key)
    ]


def _as_in_job(key: str) -> str:
    """Answers' form stands under `[output]` in the job file."""
    return f"output.{key.removeprefix('form.')}" if key.startswith("form.") else key


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a table and of those in it, by their whole names."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(table: Mapping[str, Any], key: str) -> str:
    """As repr, which tells 1 from true where == does not."""
    return repr(table[key]) if key in table else "not set"


def _side_by_side(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Both values; of long ones what is around the first difference."""
    old, new = _shown(before, key), _shown(after, key)
    if max(len(old), len(new)) <= _SHOWN_CHARS:
        return old, new
    was, now = before.get(key), after.get(key)
    if isinstance(was, str) and isinstance(now, str):
        # Before repr: the quotes around a text can be where two reprs differ first.
        first = _first_difference(was, now)
        return repr(_cut(was, first)), repr(_cut(now, first))
    first = _first_difference(old, new)
    return _cut(old, first), _cut(new, first)


def _first_difference(old: str, new: str) -> int:
    pairs = zip(old, new, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))


def _cut(text: str, at: int) -> str:
    """At most `_SHOWN_CHARS` of a text, `at` among them."""
    start = at - _CHARS_BEFORE if at > _SHOWN_CHARS // 2 else 0
    head = "..." if start else ""
    room = _SHOWN_CHARS - len(head)
    rest = text[start:]
    return head + (rest if len(rest) <= room else f"{rest[: room - 3]}...")


_SEED_BITS = 62  # vLLM takes an int64, and adds the sample's index for n > 1.


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of one plan."""

    sampling: SamplingConfig
    generation: int = 0
    """How many plans have tried the row's predecessors in vain, see `--retry-errors`."""

    def of(self, ordinal: Ordinal, params: Mapping[str, Any], attempt: int) -> int | None:
        """An attempt's own; None where sampling is greedy, since a seed then changes nothing."""
        if params.get("temperature", self.sampling.temperature) == 0:
            return None
        if attempt == 1 and "seed" in params:
            own: int = params["seed"]
            return own
        return row_seed(self.sampling.seed, ordinal, attempt, self.generation)


def row_seed(job_seed: int, ordinal: Ordinal, attempt: int = 1, generation: int = 0) -> int:
    """The seed of one attempt: the same however rows are spread over runs.

    vLLM draws the samples of a request with this seed plus the sample's index
    (vllm/v1/engine/parallel_sampling.py, 0.26 to 0.33).
    """
    text = f"{job_seed}:{ordinal.segment}:{ordinal.row}"
    if attempt > 1 or generation:
        text += f":{attempt}"
    if generation:
        text += f":{generation}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)
