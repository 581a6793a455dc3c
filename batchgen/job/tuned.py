"""`JOB.tuned.toml`, beside the job file: what `batchgen tune` found fastest, and when it is used.

    [key]                             of what it was measured on; all of it must fit
    [model], [model.engine], [run]    settings, at the places that they have in a job file
    [[trials]]                        what was measured, for people

What the job file or `--set` says itself wins. Only settings that move time and memory about can
stand in it (`PLACES`); none is part of the recipe, so that a tuned job is the same job.
"""

from __future__ import annotations

import errno
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from batchgen.core.runtime import command, read_text
from batchgen.job.model import JobConfig, Tuned


def above_batched_tokens(
    tokens: int, seqs: int | None, length: int | None, *, is_chunked: bool
) -> Literal["max_model_len", "max_num_seqs"] | None:
    """Which setting is above `max_num_batched_tokens` and must not be; None if all is well.

    Args:
        tokens: max_num_batched_tokens, a step's.
        seqs: max_num_seqs; None: vLLM fits its own to the rest.
        length: max_model_len; None: unknown.
        is_chunked: Whether long prompts are spread over steps.

    Source:
        vllm/config/scheduler.py, verify_max_model_len, 0.26 to 0.33. What nobody says is fitted
        to the rest: vllm/engine/arg_utils.py, _set_default_max_num_seqs_and_batched_tokens_args.
    """
    if not is_chunked and length is not None and tokens < length:
        return "max_model_len"
    return "max_num_seqs" if seqs is not None and tokens < seqs else None


PLACES: Mapping[str, str] = {
    "max_num_seqs": "model",
    "gpu_memory_utilization": "model",
    "max_num_batched_tokens": "model.engine",
    "enable_prefix_caching": "model.engine",
    "async_scheduling": "model.engine",
    "max_in_flight": "run",
}
"""Each setting that may be tuned -> its table in a job file."""
_ECHO = frozenset({"max_num_seqs", "max_in_flight"})
"""Settings of these that the echo engine has."""
_TOKENS = "max_num_batched_tokens"
_SWITCHES = frozenset({"enable_prefix_caching", "async_scheduling"})
_MOST = 1_000_000
"""Largest number of any setting: with a window far beyond what an engine runs at once, a run
holds its whole input in memory."""
_DEPENDS: Mapping[str, Any] = {
    "pipeline_parallel_size": 1,
    "max_model_len": None,
    "enable_chunked_prefill": None,
    "dtype": "auto",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "enable_lora": False,
}
"""Keys of a job that decide which settings are possible and fast -> their defaults."""
Settings = dict[str, Any]
"""Names of `PLACES` -> values."""


def tuned_path(job: Path) -> Path:
    """`label.toml` -> `label.tuned.toml`."""
    return job.with_name(f"{job.stem}.tuned.toml")


def key_of(job: JobConfig, folder: Path, device: str) -> dict[str, Any]:
    """What measured settings hold for.

    Args:
        job: As loaded.
        folder: Where the job file is: a model's folder is named from there, so that both may move.
        device: See `devices.device_name`.

    Returns:
        Strings and numbers; None for what is as it is by default, which the file leaves out.
    """
    name, share = job.model.name, job.run.gpus_per_replica
    if Path(name).is_absolute():
        name = os.path.relpath(name, folder.resolve())
    return {
        "backend": job.model.backend,
        "model": name,
        "revision": job.model.revision or "",
        "tensor_parallel_size": job.model.tensor_parallel_size or 1,
        "gpus_per_replica": str(share) if share is not None and share < 1 else None,
        "device": device,
        **{name: _key_value(value_of(job, name), usual) for name, usual in _DEPENDS.items()},
        "num_loras": len(job.model.lora) or None,
    }


def _key_value(value: object, usual: object) -> str | int | None:
    if value is None or value == usual:
        return None
    if isinstance(value, str | int):
        return value
    return json.dumps(value, sort_keys=True, default=str)


def value_of(job: JobConfig, name: str) -> Any:  # noqa: ANN401 - as the job file has it
    """What the job itself says of a setting; None if nothing."""
    if name in job.model.engine:
        return job.model.engine[name]
    return getattr(job.run if PLACES.get(name) == "run" else job.model, name, None)


def with_settings(job: JobConfig, settings: Mapping[str, Any]) -> JobConfig:
    """Return the job with other settings of `PLACES`, or of `[model.engine]`; its own lose."""
    engine, model, run = dict(job.model.engine), {}, {}
    for name, value in settings.items():
        place = PLACES.get(name, "model.engine")
        if place == "run":
            run[name] = value
        elif place == "model" and name not in engine:
            model[name] = value
        else:
            engine[name] = value
    return job.changed(model={**model, "engine": engine}, run=run)


def use_tuned(job: JobConfig, job_path: Path, device: Callable[[], str]) -> JobConfig:
    """The job with what its tuned file adds, if there is one and it fits; else as it is.

    Never raises for what is wrong with the file: `job.tuned.note` says why it is not used. A
    setting that the engine would refuse beside the others is left out.

    Args:
        job: As loaded from `job_path`.
        job_path: The job file.
        device: Names the device here, see `engine.devices.device_name`; called only where there is
            a tuned file.
    """
    path = tuned_path(job_path)
    try:
        tables = tomllib.loads(read_text(path))
        given = _settings(tables)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if getattr(error, "errno", None) in {errno.ENOENT, errno.ENAMETOOLONG}:
            return job
        return job.tuned_by(Tuned(str(path), note=f"{path}: not used, cannot be read: {error}"))
    here = device()
    if not job.model.is_vllm:
        given = {name: value for name, value in given.items() if name in _ECHO}
    bad = [f"{name} = {value!r:.100}" for name, value in given.items() if _is_bad(name, value)]
    problem = _misfit(tables.get("key"), key_of(job, job_path.parent, here))
    if problem is None and bad:
        problem = f"{', '.join(bad)} cannot be"
    if problem is not None:
        note = f"{path}: not used, {problem}; run `{command('tune')}` again"
        return job.tuned_by(Tuned(str(path), note=note))
    used = {name: value for name, value in given.items() if value_of(job, name) is None}
    partly = None
    if (refused := _refused(job, used, is_cpu=here == "cpu")) is not None:
        name, why = refused
        value = used.pop(name)
        partly = f"{path}: {name} = {value} is left out, {why}; run `{command('tune')}` again"
    return with_settings(job, used).tuned_by(Tuned(str(path), used, partly))


def _misfit(found: object, wanted: Mapping[str, Any]) -> str | None:
    """What it was made for, where that is not what is here."""
    if not isinstance(found, dict):
        return "it has no [key]"

    def shown(value: object) -> str:
        return "by default" if value is None else f"{value!r:.100}"

    wrong = [
        f"{name} {shown(found.get(name))}, here {shown(value)}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    return f"it was made for {', '.join(wrong)}" if wrong else None


def _settings(tables: Mapping[str, Any]) -> Settings:
    """The settings of a parsed tuned file; what may not be tuned is passed over."""
    model = tables.get("model", {})
    places = {"model": model, "model.engine": model.get("engine", {}), "run": tables.get("run", {})}
    return {name: places[place][name] for name, place in PLACES.items() if name in places[place]}


def _is_bad(name: str, value: object) -> bool:
    """Whether no engine takes a setting's value."""
    if name in _SWITCHES:
        return not isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    if name == "gpu_memory_utilization":
        return not 0 < value <= 1
    return not isinstance(value, int) or not 1 <= value <= _MOST


def _refused(job: JobConfig, used: Settings, *, is_cpu: bool) -> tuple[str, str] | None:
    """The one of `used` that vLLM would refuse beside the others and the job's own, and why."""
    merged = with_settings(job, used)
    found = {name: value_of(merged, name) for name in (_TOKENS, "max_num_seqs", "max_model_len")}
    tokens, seqs, length = (value if isinstance(value, int) else None for value in found.values())
    if tokens is None:
        return None
    # See `engine.settings.llm_kwargs`.
    is_chunked = bool(merged.model.engine.get("enable_chunked_prefill", not is_cpu))
    above = above_batched_tokens(tokens, seqs, length, is_chunked=is_chunked)
    if above is None:
        return None
    if _TOKENS in used:
        where = " and prefill is not chunked" if above == "max_model_len" else ""
        return _TOKENS, f"it is below {above} = {found[above]}{where}"
    return (above, f"it is above {_TOKENS} = {tokens}") if above in used else None
