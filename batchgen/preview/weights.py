"""How many bytes a model's weights take on the GPUs: from the headers of its files, or counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from reprlib import repr as short
from typing import TYPE_CHECKING, TypeGuard

from batchgen.preview.jsonfile import damaged, parse_object, read_object
from batchgen.preview.shape import DTYPE_BYTES, MAX_NUMBER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from batchgen.preview.shape import Shape

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit: safetensors, MAX_HEADER_SIZE."""
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FP8 = {"F8_E4M3": 1.0, "F8_E5M2": 1.0, "F8_E8M0": 1.0, "F4": 0.5, "F6_E2M3": 0.75, "F6_E3M2": 0.75}
_ALL = {**_BYTES, **_FLOATS, **_FP8}
MAX_DIMENSIONS = 16
_NOT_LINEAR = ("embed", "lm_head", "wte", "norm", "router", "gate.weight")


@dataclass(frozen=True, slots=True)
class Weights:
    """Of a whole model, however many GPUs share it."""

    num_bytes: int
    source: str
    """How that is known, for people."""
    num_parameters: int | None = None
    """None for packed formats."""
    file_bytes: int = 0
    """What has to be read, on disk."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A line of a header."""

    name: str
    dtype: str
    shape: Sequence[int]


def read_weights(
    folder: Path, shape: Shape, dtype: str, bits: float | None, *, is_dummy: bool
) -> Weights | None:
    """How large the weights are once they are loaded.

    Args:
        folder: Of the model.
        shape: Of its config.json.
        dtype: That the model runs in.
        bits: Of a linear layer's weight, where vLLM quantizes or a dummy stands for a quantized
            checkpoint; None: as the files have it.
        is_dummy: `load_format = "dummy"`: no files are read.

    Returns:
        None where nothing tells it.

    Raises:
        ConfigError: A file is damaged, or not there.
    """
    if is_dummy:
        return counted(shape, dtype, bits)
    if missing := missing_files(folder):
        raise damaged(folder, f"lacks {missing[0]:.80}, which its index names")
    if files := safetensors_files(folder):
        return _from_headers(files, shape, dtype, bits)
    kinds = ("*.gguf", "*.bin", "*.pt", "*.pth")
    # The hub's cache holds links, whose files may be gone.
    files = [path for kind in kinds for path in folder.glob(kind) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return Weights(size, "by the size of its files", file_bytes=size) if files else None


def counted(shape: Shape, dtype: str, bits: float | None) -> Weights | None:
    """From config.json alone; None for a model that is not of the plain kind."""
    found = shape.parameters()
    if found is None:
        return None
    linear, embedding = found
    size = DTYPE_BYTES.get(dtype, 2)
    per_weight = size if bits is None else bits / 8
    num_bytes = round(linear * per_weight + embedding * size)
    return Weights(num_bytes, "counted from its config.json", linear + embedding)


def safetensors_files(folder: Path) -> list[Path]:
    """The files that vLLM reads: those of the index, else all but a second copy.

    Raises:
        ConfigError: The index is damaged.

    Source:
        vllm/model_executor/model_loader/weight_utils.py, filter_duplicate_safetensors_files,
        0.26 to 0.33.
    """
    files = sorted(folder.glob("*.safetensors"))
    named = _indexed(folder)
    if kept := [path for path in files if path.name in named]:
        return kept
    return [path for path in files if not path.name.startswith("consolidated")] or files


def missing_files(folder: Path) -> list[str]:
    """Files that the index names and that are not there.

    Raises:
        ConfigError: The index is damaged.
    """
    return sorted(name for name in _indexed(folder) if not _is_file(folder / name))


def _indexed(folder: Path) -> set[str]:
    """The files that the index names; none where there is no index."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return set()
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict):
        raise damaged(path, f"has weight_map = {short(names)}, expected an object")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name:
            raise damaged(path, f"has {short(name)} for {short(tensor)}, expected a file's name")
    return set(names.values())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # A name that is too long.
        return False


def _from_headers(files: Sequence[Path], shape: Shape, dtype: str, bits: float | None) -> Weights:
    total, parameters = 0.0, 0
    is_packed = bool(shape.quantization)
    for tensor in (tensor for path in files for tensor in read_header(path)):
        if shape.is_tied and tensor.name.endswith("lm_head.weight"):
            continue  # vLLM does not load it either.
        parameters += math.prod(tensor.shape)
        total += _size(tensor, DTYPE_BYTES.get(dtype, 2), bits, is_packed=is_packed)
    size = sum(path.stat().st_size for path in files)
    source = f"by the headers of {len(files)} file(s)"
    return Weights(round(total), source, None if is_packed else parameters, size)


def _size(tensor: Tensor, size: int, bits: float | None, *, is_packed: bool) -> float:
    num = math.prod(tensor.shape)
    if tensor.dtype not in _FLOATS:
        return num * _FP8.get(tensor.dtype, _BYTES.get(tensor.dtype, 1))
    if is_packed and tensor.dtype == "F32":
        return num * 4  # Scales stay as they are.
    is_linear = len(tensor.shape) > 1 and not any(word in tensor.name for word in _NOT_LINEAR)
    if bits is not None and is_linear and not is_packed:
        return num * bits / 8
    return num * size


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file; reads its header alone.

    Raises:
        ConfigError: The file is damaged: cut short, or not this format.

    Source:
        safetensors 0.8, safetensors/src/tensor.rs, Metadata::validate.
    """
    try:
        return _tensors(path)
    except (OSError, ValueError) as error:
        raise damaged(path, f"is damaged or not a safetensors file: {error}") from error


def _tensors(path: Path) -> list[Tensor]:
    if not path.is_file():
        msg = "it is no file"  # A pipe would be waited for, for ever.
        raise ValueError(msg)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            msg = f"its header has {length:,} bytes, expected {MAX_HEADER_BYTES:,} at most"
            raise ValueError(msg)
        header = parse_object(file.read(length))
    header.pop("__metadata__", None)
    tensors = [_tensor(name, line) for name, line in header.items()]
    end = max((line["data_offsets"][1] for line in header.values()), default=0)
    if (size := path.stat().st_size) < 8 + length + end:
        msg = f"it has {size:,} bytes, expected {8 + length + end:,}"
        raise ValueError(msg)
    return tensors


def _tensor(name: str, line: object) -> Tensor:
    """Check a line of a header, so that what counts with it need not.

    Raises:
        ValueError: It is none; the text says of which tensor.
    """
    fields = line if isinstance(line, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        msg = f"tensor {short(name)} has dtype {short(dtype)} and shape {short(shape)}"
        msg = f"{msg}, expected a text and a list of whole numbers"
        raise ValueError(msg)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        msg = f"tensor {short(name)} has data_offsets {short(offsets)}, expected begin and end"
        raise ValueError(msg)
    taken, num = offsets[1] - offsets[0], math.prod(shape)
    # Of a format that came later no more than a bit for each number is expected.
    if taken * 8 < num if dtype not in _ALL else taken != num * _ALL[dtype]:
        msg = f"tensor {short(name)} has {taken:,} bytes, not those of"
        msg = f"{msg} {short(dtype)} and {short(shape)}"
        raise ValueError(msg)
    return Tensor(name, dtype, shape)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= MAX_NUMBER for item in value
    )
