"""A model's files: where they are, and how large its weights are.

Nothing is loaded. Where a model is not of the plain kind the answer is "not
known", with the reason, and never a figure that is wrong.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batchgen.core.errors import ConfigError, one_line
from batchgen.engine.vllm.shares import DTYPE_BYTES, Shape
from batchgen.preview.machine import Finding, gib, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from batchgen.job.model import ModelConfig

_TIMEOUT_S = 15.0
_SMALL = {"config.json", "tokenizer.json"}
"""Files that are fetched of a model that is not here: without them nothing is known of it."""
_FLOATS = {"F64", "F32", "F16", "BF16"}
"""Formats of a safetensors file that are loaded in the model's own."""
_NOT_LINEAR = ("embed", "lm_head", "wte", "norm", "router", "gate.weight")
_OTHER_WEIGHTS = ("*.gguf", "*.bin", "*.pt", "*.pth")


class Hub(Protocol):
    """What is asked of the Hugging Face hub."""

    def cached(self, name: str, revision: str | None) -> Path | None:
        """The folder in the cache, complete or not; None if there is none. Asks no network."""

    def look(self, name: str, revision: str | None) -> tuple[Path, int]:
        """Fetch the model's small files; return their folder, and the size of its weights.

        Raises:
            OSError: It is not there, is closed to us, or the hub cannot be reached.
        """

    def free_bytes(self) -> int | None:
        """Free space where the cache is."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model, as far as it is here."""

    finding: Finding
    folder: Path | None = None
    """Folder with at least its config.json; None where there is none."""
    commit: str | None = None
    """Commit of a hub model that is in the cache."""
    missing_bytes: int = 0
    """Size of the weights that a run would fetch first."""


def find_model(model: ModelConfig, hub: Hub) -> Found:
    """Find a model, without its weights if they are not here."""
    name, folder = model.name or "", Path(model.name or "")
    if folder.is_dir():
        return Found(ok("model", f"{name} is here"), folder)
    if folder.is_absolute() or name.count("/") > 1 or not name:
        advice = "name a model's folder, or a hub id such as Qwen/Qwen3-8B"
        return Found(problem("model", f"{name!r:.300} does not exist", advice))
    cached = hub.cached(name, model.revision)
    if cached is not None and (model.engine.get("load_format") == "dummy" or _has_weights(cached)):
        text = f"{name} is in the cache, commit {cached.name[:12]}"
        return Found(ok("model", text), cached, commit=cached.name)
    try:
        there, num_bytes = hub.look(name, model.revision)
    except OSError as error:
        text = f"{name} is not in the cache, and the hub does not give it: {one_line(error)}"
        return Found(problem("model", text, "check the name, the network and HF_TOKEN"))
    size, free = gib(num_bytes), hub.free_bytes()
    if free is not None and free < num_bytes:
        text = f"{name} is not in the cache: a run would fetch {size}, {gib(free)} are free there"
        finding = problem("model", text, "free space, or set HF_HOME to a larger disk")
    else:
        finding = ok("model", f"{name} is not in the cache: a run fetches {size} first")
    return Found(finding, there, missing_bytes=num_bytes)


def _has_weights(folder: Path) -> bool:
    try:
        files = weight_files(folder) or list(_others(folder))
    except ConfigError:  # A damaged index is reported once the weights are read.
        return True
    return bool(files) and all(path.is_file() for path in files)


def weight_bytes(files: Mapping[str, int]) -> int:
    """Size of a repository's files, name -> size, that a run would load.

    Files in folders are not loaded, pickles only where there is nothing else, and of two copies
    the one in Hugging Face's form.
    """
    for kind in (".safetensors", ".bin"):
        found = {n: size for n, size in files.items() if n.endswith(kind) and "/" not in n}
        kept = {n: size for n, size in found.items() if not n.startswith("consolidated")}
        if found:
            return sum((kept or found).values())
    return 0


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

    def look(self, name: str, revision: str | None) -> tuple[Path, int]:
        """See `Hub`."""
        try:
            from huggingface_hub import HfApi, hf_hub_download
        except ImportError as error:
            raise OSError("huggingface_hub is not installed") from error
        try:
            info = HfApi().model_info(
                name, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
            )
            files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            here = [
                hf_hub_download(name, file, revision=info.sha) for file in _SMALL & files.keys()
            ]
        except Exception as error:
            # Of its own, of requests, httpx or httpx2, as its version has it.
            raise OSError(one_line(error)) from error
        if not here:
            raise OSError(f"{name} has no config.json")
        return Path(here[0]).parent, weight_bytes(files)

    def free_bytes(self) -> int | None:
        """See `Hub`."""
        with suppress(ImportError, OSError):
            from huggingface_hub.constants import HF_HUB_CACHE

            folder = Path(HF_HUB_CACHE)
            there = next(path for path in (folder, *folder.parents) if path.exists())
            return shutil.disk_usage(there).free
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model's config.json.

    Raises:
        ConfigError: It is absent or no JSON object.
    """
    return _read_object(folder / "config.json")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise _damaged(path, f"cannot be read: it holds no JSON object but {found!r:.80}")
    return found


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError("model.name", [f"{path} {why}; fetch the model again"])


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a whole model, however many GPUs share it."""

    num_bytes: int
    source: str
    """How that is known, for people."""
    num_parameters: int | None = None
    """None for packed formats."""
    file_bytes: int = 0
    """What has to be read, on disk."""
    is_plain: bool = True
    """None of them is quantized, in the files or as they are loaded."""


def read_weights(folder: Path, shape: Shape, dtype: str, bits: float | None) -> Weights | None:
    """How large the weights are once they are loaded; None where nothing says it.

    Args:
        folder: With the model's files.
        shape: From its config.json.
        dtype: Format that the model runs in.
        bits: Size of a linear layer's weight, where vLLM quantizes; None: as the files have it.

    Raises:
        ConfigError: A file is damaged, or not there.
    """
    files = weight_files(folder)
    if missing := [path.name for path in files if not path.is_file()]:
        raise _damaged(folder, f"lacks {missing[0]:.80}, which its index names")
    if files and find_spec("safetensors"):  # It comes with vLLM.
        return _from_headers(files, shape, dtype, bits)
    # The hub's cache holds links, whose files may be gone.
    size = sum(path.stat().st_size for path in files or _others(folder) if path.is_file())
    return Weights(size, "by the size of its files", file_bytes=size) if size else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that vLLM reads: those of the index, else all but a second copy.

    Raises:
        ConfigError: The index is damaged.

    Source:
        vllm/model_executor/model_loader/weight_utils.py, filter_duplicate_safetensors_files,
        0.26 to 0.33.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        return [path for path in files if not path.name.startswith("consolidated")] or files
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise _damaged(index, f"has weight_map = {names!r:.80}, expected tensors and their files")
    return [folder / name for name in sorted(set(names.values()))]


def _others(folder: Path) -> Iterator[Path]:
    return (path for kind in _OTHER_WEIGHTS for path in folder.glob(kind))


def _from_headers(files: Sequence[Path], shape: Shape, dtype: str, bits: float | None) -> Weights:
    total, parameters, is_packed = 0.0, 0, bool(shape.quantization)
    for name, kind, sizes in (tensor for path in files for tensor in read_tensors(path)):
        if shape.is_tied and name.endswith("lm_head.weight"):
            continue  # vLLM does not load it either.
        num = math.prod(sizes)
        parameters += num
        is_linear = len(sizes) > 1 and not any(word in name for word in _NOT_LINEAR)
        own_bits = int((re.search(r"\d+", kind) or ["8"])[0])  # Such as BF16, F8_E4M3, BOOL.
        if kind not in _FLOATS or (is_packed and kind == "F32"):
            total += num * own_bits / 8  # Packed weights and their scales stay as they are.
        elif bits is not None and is_linear and not is_packed:
            total += num * bits / 8
        else:
            total += num * DTYPE_BYTES.get(dtype, 2)
    size = sum(path.stat().st_size for path in files)
    source = f"by the headers of {len(files)} file(s)"
    return Weights(round(total), source, None if is_packed else parameters, size)


def read_tensors(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Yield the tensors of a safetensors file: name, format such as BF16, and shape.

    Raises:
        ConfigError: The file is damaged: cut short, or not this format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(name)
                yield name, tensor.get_dtype(), tensor.get_shape()
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"is damaged or not a safetensors file: {one_line(error)}") from error
