"""Settings that vLLM refuses at its start, whatever the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen.core.errors import ConfigError
from batchgen.core.suggest import nearest
from batchgen.engine.vllm.settings import known_keywords
from batchgen.job.model import ModelConfig
from batchgen.job.scheduler import above_batched_tokens
from batchgen.preview.findings import Finding, problem, warning
from batchgen.preview.jsonfile import read_object

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
    near = nearest(name, known)
    if near is None:
        return ""
    place = "model" if near in ModelConfig.model_fields else "model.engine"
    return f", did you mean '{place}.{near}'?"


def check_settings(kwargs: Mapping[str, Any], max_model_len: int | None) -> Iterator[Finding]:
    """Values of `LLM(...)`'s keywords that vLLM refuses, alone or beside each other.

    Args:
        kwargs: Of `LLM(...)`, with our defaults.
        max_model_len: The least that it can be; None where that is not known.
    """
    dtype = kwargs.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        text = f"dtype {dtype!r}, expected auto, bfloat16, float16 (half), float32 (float)"
        yield problem("dtype", text, "set model.dtype to one of these, or leave it out")
    tokens, seqs = kwargs.get("max_num_batched_tokens"), kwargs.get("max_num_seqs")
    if not isinstance(tokens, int):
        return
    seqs = seqs if isinstance(seqs, int) else None
    is_chunked = kwargs.get("enable_chunked_prefill") in (None, True)
    above = above_batched_tokens(tokens, seqs, max_model_len, is_chunked=is_chunked)
    if above is not None:
        limit = max_model_len if above == "max_model_len" else seqs
        where = " where prefill is not chunked" if above == "max_model_len" else ""
        text = f"which vLLM refuses below {above} = {limit:,}{where}"
        advice = f"raise model.engine.max_num_batched_tokens, or lower model.{above}"
        yield problem("job", f"max_num_batched_tokens = {tokens}, {text}", advice)


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
