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
import math
import os
import stat
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import OutputError
from batchgen.engine.devices import device_name
from batchgen.job.model import Tuned
from batchgen.job.scheduler import above_batched_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from batchgen.job.model import JobConfig

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
"""All that the echo engine has of these."""
_TOKENS = "max_num_batched_tokens"
_SHARES = frozenset({"gpu_memory_utilization"})
_SWITCHES = frozenset({"enable_prefix_caching", "async_scheduling"})
_MOST = 1_000_000
"""Of any number: with a window far beyond what an engine runs at once, a run holds its whole input
in memory."""
_DEPENDS: Mapping[str, Any] = {
    "pipeline_parallel_size": 1,
    "max_model_len": None,
    "enable_chunked_prefill": None,
    "dtype": "auto",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "enable_lora": False,
}
"""What a job may say that decides which settings are possible and fast -> what it is by default."""
Settings = dict[str, Any]
"""Names of `PLACES` -> values."""


def tuned_path(job: Path) -> Path:
    """`label.toml` -> `label.tuned.toml`."""
    return job.with_name(f"{job.stem}.tuned.toml")


def key_of(job: JobConfig, folder: Path, device: str) -> dict[str, Any]:
    """What measured settings hold for.

    Args:
        job: As loaded.
        folder: Of the job file: a model's folder is named from there, so that both may move.
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
    """The same job with other settings of `PLACES`, or of `[model.engine]`; its own lose."""
    engine, model, run = dict(job.model.engine), {}, {}
    for name, value in settings.items():
        place = PLACES.get(name, "model.engine")
        if place == "run":
            run[name] = value
        elif place == "model" and name not in engine:
            model[name] = value
        else:
            engine[name] = value
    return job.model_copy(
        update={
            "model": job.model.model_copy(update={**model, "engine": engine}),
            "run": job.run.model_copy(update=run),
        }
    )


def use_tuned(job: JobConfig, job_path: Path, device: Callable[[], str] = device_name) -> JobConfig:
    """The job with what its tuned file adds, if there is one and it fits; else as it is.

    Never raises for what is wrong with the file: `job.tuned.note` says why it is not used. A
    setting that the engine would refuse beside the others is left out.

    Args:
        job: As loaded from `job_path`.
        job_path: The job file.
        device: Asked only where there is a tuned file.
    """
    path = tuned_path(job_path)
    try:
        tables = tomllib.loads(_read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        if getattr(error, "errno", None) in {errno.ENOENT, errno.ENAMETOOLONG}:
            return job
        return job.tuned_by(Tuned(str(path), note=f"{path}: not used, cannot be read: {error}"))
    here, given = device(), _settings(tables)
    if job.model.backend == "echo":
        given = {name: value for name, value in given.items() if name in _ECHO}
    problem = _misfit(tables.get("key"), key_of(job, job_path.parent, here)) or _wrong(given)
    if problem is not None:
        note = f"{path}: not used, {problem}; run `batchgen tune` again"
        return job.tuned_by(Tuned(str(path), note=note))
    used = {name: value for name, value in given.items() if value_of(job, name) is None}
    partly = None
    if (refused := _refused(job, used, is_cpu=here == "cpu")) is not None:
        name, why = refused
        value = used.pop(name)
        partly = f"{path}: {name} = {value} is left out, {why}; run `batchgen tune` again"
    return with_settings(job, used).tuned_by(Tuned(str(path), used, partly))


def _read_text(path: Path) -> str:
    """Read a file, and only a file: a pipe of that name would be waited for without end."""
    if not stat.S_ISREG(path.stat().st_mode):
        msg = "it is no regular file"
        raise ValueError(msg)
    return path.read_text(encoding="utf-8")


def _misfit(found: object, wanted: Mapping[str, Any]) -> str | None:
    """What it was made for, where that is not what is here."""
    if not isinstance(found, dict):
        return "it has no [key]"
    names = [name for name, value in wanted.items() if found.get(name) != value]
    if not names:
        return None
    told = (f"{name} {_shown(found.get(name))}, here {_shown(wanted[name])}" for name in names)
    return f"it was made for {', '.join(told)}"


def _shown(value: object) -> str:
    if value is None:
        return "by default"
    try:
        text = repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits.
        return "a number without end"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _settings(tables: Mapping[str, Any]) -> Settings:
    """The settings of a parsed tuned file; what may not be tuned is passed over."""
    found = {}
    for name, place in PLACES.items():
        table: Any = tables
        for part in place.split("."):
            table = table.get(part) if isinstance(table, dict) else None
        if isinstance(table, dict) and name in table:
            found[name] = table[name]
    return found


def _wrong(given: Settings) -> str | None:
    """Values that no engine takes."""
    wrong = [f"{name} = {_shown(value)}" for name, value in given.items() if _is_bad(name, value)]
    return f"{', '.join(wrong)} cannot be" if wrong else None


def _is_bad(name: str, value: object) -> bool:
    if name in _SWITCHES:
        return not isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    if name in _SHARES:
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


def tuned_text(
    head: Sequence[str],
    key: Mapping[str, Any],
    settings: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
) -> str:
    """The file's text.

    Args:
        head: Comment lines.
        key: See `key_of`; more of it is for people.
        settings: Names of `PLACES`.
        trials: Plain values; None is left out.
    """
    lines = [*(_comment(line) for line in head), "", "[key]", *_assignments(key)]
    for place in dict.fromkeys(PLACES.values()):
        here = {name: value for name, value in settings.items() if PLACES[name] == place}
        lines += ["", f"[{place}]", *_assignments(here)] if here else []
    for trial in trials:
        lines += ["", "[[trials]]", *_assignments(trial)]
    return "\n".join(lines) + "\n"


def _comment(line: str) -> str:
    return f"# {''.join(char if char.isprintable() else ' ' for char in line)}".rstrip()


def _assignments(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_literal(value)}" for name, value in table.items() if value is not None]


def _literal(value: object) -> str:
    """A text, number or truth value of JSON's, which is TOML's as well, but for a few things."""
    if isinstance(value, float):
        return json.dumps(round(value, 4)) if math.isfinite(value) else str(value)
    # TOML has no escapes of half a character, nor DEL as it is.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text.encode("utf-8", "replace").decode()


def write_tuned(path: Path, text: str) -> None:
    """Write or replace the file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    temp = _temp(path)
    try:
        with temp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except OSError as error:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        msg = f"{path}: cannot be written ({error.strerror}); this is what it was to hold:\n{text}"
        raise OutputError(msg) from error


def _temp(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_writable(path: Path) -> None:
    """See beforehand, as far as can be seen, whether `write_tuned` will succeed.

    Raises:
        OutputError: It will not.
    """
    folder, length = path.parent, len(_temp(path).name.encode())
    has_room = os.access(folder, os.W_OK) and length <= os.pathconf(folder, "PC_NAME_MAX")
    if not has_room or path.is_dir():
        msg = f"{path}: cannot be written, and tuning is for that; expected a folder to write in"
        raise OutputError(msg)
