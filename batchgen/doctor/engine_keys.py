"""Settings that vLLM refuses at its start, whatever the machine."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from batchgen.config.model import ModelConfig
from batchgen.doctor.findings import Finding, problem, warning
from batchgen.doctor.jsonfile import read_object
from batchgen.engine.keywords import known_keywords
from batchgen.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

DTYPES = frozenset({"auto", "half", "float16", "bfloat16", "float", "float32"})
"""What vLLM takes as `dtype`: vllm/config/model.py, ModelDType, 0.26 to 0.33."""


def check_keywords(
    engine: Mapping[str, Any], known: Collection[str] | None = None
) -> Iterator[Finding]:
    """Whether vLLM has what `[model.engine]` names.

    Args:
        engine: That table.
        known: vLLM's keywords; None: those of the installed one.
    """
    known = known if known is not None else known_keywords()
    if known is None:
        if engine:
            told = ", ".join(engine)
            yield warning("job", f"whether vLLM knows model.engine's {told} could not be looked up")
        return
    for name in engine:
        if name not in known:
            text = (
                f"model.engine.{name}: the installed vLLM has no such keyword{_hint(name, known)}"
            )
            yield problem("job", text, "mend it or leave it out")


def _hint(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    if not near:
        return ""
    place = "model" if near[0] in ModelConfig.model_fields else "model.engine"
    return f", did you mean '{place}.{near[0]}'?"


def check_settings(kwargs: Mapping[str, Any], max_model_len: int | None) -> Iterator[Finding]:
    """Values of `LLM(...)`'s keywords that vLLM refuses, alone or beside each other.

    Args:
        kwargs: Of `LLM(...)`, with our defaults.
        max_model_len: The least that it can be; None where that is not known.

    Source:
        vllm/config/scheduler.py, verify_max_model_len, 0.26 to 0.33.
    """
    dtype = kwargs.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        text = f"dtype {dtype!r}, expected auto, bfloat16, float16 (half), float32 (float)"
        yield problem("dtype", text, "set model.dtype to one of these, or leave it out")
    tokens, seqs = kwargs.get("max_num_batched_tokens"), kwargs.get("max_num_seqs")
    if not isinstance(tokens, int):
        return
    told = f"max_num_batched_tokens = {tokens}, which vLLM refuses below"
    advice = "raise model.engine.max_num_batched_tokens, or lower model"
    is_chunked = kwargs.get("enable_chunked_prefill") in (None, True)
    if not is_chunked and max_model_len is not None and tokens < max_model_len:
        text = f"{told} max_model_len = {max_model_len:,} where prefill is not chunked"
        yield problem("job", text, f"{advice}.max_model_len")
    elif isinstance(seqs, int) and tokens < seqs:
        yield problem("job", f"{told} max_num_seqs = {seqs:,}", f"{advice}.max_num_seqs")


def least_model_len(
    kwargs: Mapping[str, Any], folder: Path | None, of_config: int | None
) -> int | None:
    """The least that vLLM makes of `max_model_len`; None where that is not known.

    Args:
        kwargs: Of `LLM(...)`.
        folder: Of the model.
        of_config: What the job says, or else the model's config.json.

    Source:
        vllm/config/model.py, _get_and_verify_max_len, 0.26 to 0.33: RoPE scaling makes it more,
        but LongRoPE takes the length before it; and `disable_sliding_window` the window.
    """
    given = kwargs.get("max_model_len")
    if isinstance(given, int) and given > 0:
        return given
    if of_config is None or folder is None or kwargs.get("disable_sliding_window"):
        return None
    try:
        original = read_object(folder / "config.json").get("original_max_position_embeddings")
    except ConfigError:  # Told by `read_model`.
        return None
    return min(of_config, original) if isinstance(original, int) and original > 0 else of_config
