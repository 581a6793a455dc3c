"""Which model a job has: its files on this machine, and what of it goes into the recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.core.errors import ConfigError
from batchgen.engine.base import BACKENDS, engine_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.job.model import ModelConfig

_WHOLE_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 256, 64 * 2**10
_SAFE_WEIGHTS = ("*.safetensors", "*.gguf")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What vLLM reads of a hub repository, pickled weights left out.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine."""

    path: str
    identity: Mapping[str, str]
    """Goes into the recipe: `name -> hash` of a folder's files, or hub id and commit."""


def resolve_model(name: str, revision: str | None, *, allow_pickle: bool = False) -> ModelFiles:
    """Find a model, downloading it if it is a hub id that is not in the cache.

    Args:
        name: A folder, or a hub id such as `Qwen/Qwen3-8B`.
        revision: Branch, tag or commit; only for hub ids.
        allow_pickle: Whether weights may be pickles, which run any code when they are loaded.

    Raises:
        ConfigError: No such folder or hub id, or the folder holds no model, or only pickles.
    """
    folder = Path(name)
    if folder.is_dir():
        identity = _identity(folder)
        _refuse_pickles(folder, allow_pickle=allow_pickle)
        return ModelFiles(str(folder), identity)
    if folder.is_absolute() or name.count("/") > 1:
        where = "model.name"
        server = "; for a server: model.backend = 'openai' and model.base_url"
        text = f"{name!r} does not exist, expected a model's folder or hub id"
        raise ConfigError(where, [text + (server if "://" in name else "")])
    found = _from_hub(name, revision, allow_pickle=allow_pickle)
    _refuse_pickles(Path(found.path), allow_pickle=allow_pickle, is_complete=False)
    return found


def resolve_lora(name: str, path: str) -> Mapping[str, str]:
    """Hash a LoRA adapter's files, which are part of the recipe.

    Raises:
        ConfigError: The folder holds no adapter, or only a pickled one.
    """
    where = f"model.lora.{name}"
    folder = Path(path)
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not weights.is_file():
        expected = "expected a folder with adapter_config.json and adapter_model.safetensors"
        raise ConfigError(where, [f"{path!r} holds no LoRA adapter, {expected}"])
    return {file.name: _content_hash(file) for file in (folder / "adapter_config.json", weights)}


def _refuse_pickles(folder: Path, *, allow_pickle: bool, is_complete: bool = True) -> None:
    """Refuse a model whose weights can only be unpickled.

    Args:
        folder: With all of the model's files, or without its pickles.
        allow_pickle: Whether to refuse nothing.
        is_complete: False for what came from the hub, where pickles were left out.
    """
    if allow_pickle or any(path for kind in _SAFE_WEIGHTS for path in folder.glob(kind)):
        return
    pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
    if pickles or not is_complete:
        found = f"only {', '.join(pickles[:3])}" if pickles else "no safetensors"
        where = "model.name"
        problem = (
            f"{str(folder)!r} holds {found}; pickled weights can run any code: convert them to "
            "safetensors, or set model.allow_pickle = true if you trust where they come from"
        )
        raise ConfigError(where, [problem])


def _identity(folder: Path) -> dict[str, str]:
    """Hash what the engine reads: files up to 64 MiB whole, larger ones by size and samples.

    The samples lie evenly over the file: a model trained further, or with an adapter merged in,
    differs in them, and a model of hundreds of GB costs seconds. A change of few weights between
    two samples is not seen; a hub model's commit sees it.
    """
    if not (folder / "config.json").is_file():
        where = "model.name"
        raise ConfigError(where, [f"{str(folder)!r} has no config.json, expected a model's folder"])
    weights = {path for pattern in (*_SAFE_WEIGHTS, *_PICKLES) for path in folder.glob(pattern)}
    small = {
        path for suffix in ("json", "jinja", "txt", "model") for path in folder.glob(f"*.{suffix}")
    }
    files = sorted(weights | small)
    return {path.name: _content_hash(path) for path in files if path.is_file()}


def _content_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _from_hub(name: str, revision: str | None, *, allow_pickle: bool) -> ModelFiles:
    import huggingface_hub
    from huggingface_hub import errors

    where = "model.name"
    patterns = [*_HUB_FILES, *(_PICKLES if allow_pickle else ())]
    try:
        path = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except errors.HFValidationError as error:
        raise ConfigError(where, [f"{name!r} is neither a folder nor a hub id"]) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        why = str(error).splitlines()[0]
        problem = (
            f"{name!r} at revision {revision or 'main'!r} cannot be fetched and is not in the "
            f"cache ({why}); check the name, the network and HF_TOKEN"
        )
        raise ConfigError(where, [problem]) from error
    # The cache keeps each commit in a folder of its name.
    return ModelFiles(path, {"hub": name, "commit": Path(path).name})


def other_model(model: ModelConfig) -> ModelFiles:
    """What an engine other than vLLM answers with; only one of the user's own has a name for it.

    Of a server's model the job says exactly which it is, by a folder here or a hub's commit, or it
    is known by the server's name for it alone.

    Raises:
        ConfigError: There is no such engine, or no model in the folder.
    """
    engine_class(model.backend)
    if model.backend == "openai":
        if model.name.startswith("/"):
            return ModelFiles("", _identity(Path(model.name)))
        if model.is_pinned:
            return ModelFiles("", {"hub": model.name, "commit": model.revision or ""})
        return ModelFiles("", {"served": model.name})
    is_own = model.backend not in BACKENDS and model.name
    return ModelFiles("", {"name": model.name} if is_own else {})
