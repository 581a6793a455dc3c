"""Where a job's model is, told without fetching its weights."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batchgen.core.errors import ConfigError
from batchgen.preview.findings import Finding, gib, ok, problem
from batchgen.preview.weights import missing_files, safetensors_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.job.model import ModelConfig

TIMEOUT_S = 15.0
_SMALL = {"config.json", "tokenizer.json"}
"""What is fetched of a model that is not here: without them nothing can be told of it."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A model on the hub whose weights are not here."""

    folder: Path
    """With its config.json and tokenizer.json."""
    weight_bytes: int
    """To fetch."""


class Hub(Protocol):
    """What is asked of the Hugging Face hub."""

    def cached(self, name: str, revision: str | None) -> Path | None:
        """The folder in the cache, complete or not; None if there is none. Asks no network."""

    def look(self, name: str, revision: str | None) -> Remote:
        """Fetch the model's small files and the sizes of the others.

        Raises:
            OSError: It is not there, is closed to us, or the hub cannot be reached.
        """

    def free_bytes(self) -> int | None:
        """Free space where the cache is."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model, as far as it is here."""

    findings: Sequence[Finding]
    folder: Path | None = None
    """With at least its config.json."""
    commit: str | None = None
    """Of a hub model that is in the cache."""
    missing_bytes: int = 0
    """Weights that a run would fetch first."""


def find_model(model: ModelConfig, hub: Hub) -> Found:
    """Find a model, without its weights if they are not here."""
    name = model.name or ""
    folder = Path(name)
    is_dummy = model.engine.get("load_format") == "dummy"
    if _is_dir(folder):
        return Found([ok("model", f"{name} is here")], folder)
    if folder.is_absolute() or name.count("/") > 1 or not name:
        advice = "name a model's folder, or a hub id such as Qwen/Qwen3-8B"
        return Found([problem("model", f"{name!r:.300} does not exist", advice)])
    cached = hub.cached(name, model.revision)
    if cached is not None and (is_dummy or _has_weights(cached)):
        text = f"{name} is in the cache, commit {cached.name[:12]}"
        return Found([ok("model", text)], cached, commit=cached.name)
    try:
        remote = hub.look(name, model.revision)
    except OSError as error:
        text = f"{name} is not in the cache, and the hub does not give it: {_one_line(error)}"
        return Found([problem("model", text, "check the name, the network and HF_TOKEN")])
    return replace(_remote(name, remote, hub.free_bytes()), folder=remote.folder)


def _remote(name: str, remote: Remote, free: int | None) -> Found:
    size = gib(remote.weight_bytes)
    if free is not None and free < remote.weight_bytes:
        text = f"{name} is not in the cache: a run would fetch {size}, {gib(free)} are free there"
        finding = problem("model", text, "free space, or set HF_HOME to a larger disk")
    else:
        finding = ok("model", f"{name} is not in the cache: a run fetches {size} first")
    return Found([finding], missing_bytes=remote.weight_bytes)


def _is_dir(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # A name that is too long, or a folder that is closed to us.
        return False


def _has_weights(folder: Path) -> bool:
    try:
        files = safetensors_files(folder) or [*folder.glob("*.bin"), *folder.glob("*.gguf")]
        return bool(files) and not missing_files(folder)
    except ConfigError:  # A damaged index is told once the weights are read.
        return True


def weight_bytes(files: Mapping[str, int]) -> int:
    """Of a repository's files, name -> size, those that a run would load.

    Files in folders are not loaded, pickles only where there is nothing else, and of two copies
    the one in Hugging Face's form.
    """
    for kind in (".safetensors", ".bin"):
        found = {n: size for n, size in files.items() if n.endswith(kind) and "/" not in n}
        kept = {n: size for n, size in found.items() if not n.startswith("consolidated")}
        if found:
            return sum((kept or found).values())
    return 0


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class HuggingFace:
    """The hub itself, through huggingface_hub. Needs no torch."""

    def cached(self, name: str, revision: str | None) -> Path | None:
        """See `Hub`."""
        with suppress(ImportError):
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

            with suppress(LocalEntryNotFoundError, HFValidationError, OSError):
                return Path(snapshot_download(name, revision=revision, local_files_only=True))
        return None

    def look(self, name: str, revision: str | None) -> Remote:
        """See `Hub`."""
        try:
            from huggingface_hub import HfApi, hf_hub_download
        except ImportError as error:
            msg = "huggingface_hub is not installed"
            raise OSError(msg) from error
        try:
            info = HfApi().model_info(
                name, revision=revision, files_metadata=True, timeout=TIMEOUT_S
            )
            files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            here = [
                hf_hub_download(name, file, revision=info.sha) for file in _SMALL & files.keys()
            ]
        except Exception as error:
            # Of its own, of requests, httpx or httpx2, as its version has it.
            raise OSError(_one_line(error)) from error
        if not here:
            msg = f"{name} has no config.json"
            raise OSError(msg)
        return Remote(Path(here[0]).parent, weight_bytes(files))

    def free_bytes(self) -> int | None:
        """See `Hub`."""
        with suppress(ImportError, OSError):
            from huggingface_hub.constants import HF_HUB_CACHE

            folder = Path(HF_HUB_CACHE)
            there = next(path for path in (folder, *folder.parents) if path.exists())
            return shutil.disk_usage(there).free
        return None
