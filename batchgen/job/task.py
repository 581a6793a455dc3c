"""The tasks of a job, and what goes with each.

`task` says what the model makes of a row. All but `generate` have `[pooling]` instead of
`[sampling]`, and give numbers, which become columns in `batchgen.answers.numbers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from batchgen.core.runtime import open_file
from batchgen.job.run_table import PositiveInt, Table

Share = Annotated[float, Field(ge=0, le=1)]
Word = Annotated[str, Field(min_length=1)]
MAX_LINE = 16 << 20
"""Bytes of a line of the input that are looked at."""
Task = Literal["generate", "embed", "classify", "score", "loglikelihood"]
NO_SAMPLING: Mapping[str, Any] = {"max_tokens": 1, "temperature": 0.0}
"""`[sampling]` where nothing is generated: equal requests have equal answers."""


class PoolingConfig(Table):
    """What a task other than to generate makes of a row, instead of `[sampling]`.

    `use_activation` and `dimensions` are vLLM's PoolingParams.
    """

    prompt_name: Word | None = None
    """embed: what goes before each text, by its name in the model's
    config_sentence_transformers.json, such as query."""
    prefix: str | None = None
    """embed: the same in your own words, such as "query: "."""
    dimensions: PositiveInt | None = None
    """embed: so many of the first numbers, normalised again; for models that are trained for it
    (matryoshka)."""
    use_activation: bool | None = None
    """false: raw numbers, that is vectors of any length, logits instead of probabilities.
    Default: the model's."""
    too_long: Literal["refuse", "truncate", "chunk"] = "refuse"
    """A text beyond max_model_len: is an error row; or is cut, with verdict `truncated`; or is read
    in pieces: embed has their mean, weighted by their tokens; loglikelihood all of their tokens."""
    dtype: Literal["float32", "float16"] = "float32"
    """embed: type of the numbers in the output."""
    threshold: Share = 0.5
    """classify: labels that hold or not by themselves do so from this probability on."""
    token_logprobs: bool = False
    """loglikelihood: a column with each token and its log probability."""

    @model_validator(mode="after")
    def _one_prefix(self) -> Self:
        if self.prefix is not None and self.prompt_name is not None:
            raise ValueError("both prefix and prompt_name are given, expected one")
        return self


class _Fit(NamedTuple):
    """What goes with a task."""

    prompts: tuple[str, ...]
    """Keys of `[prompt]`, any one of them."""
    pooling: tuple[str, ...] = ()
    """Keys of `[pooling]`."""


_EVERY = ("too_long", "use_activation")
_FITS: Mapping[str, _Fit] = {
    "generate": _Fit(("user", "messages", "text", "template")),
    "embed": _Fit(("template", "text"), (*_EVERY, "prompt_name", "prefix", "dimensions", "dtype")),
    "classify": _Fit(("template", "text"), (*_EVERY, "threshold")),
    "score": _Fit(("query",), _EVERY),
    "loglikelihood": _Fit(("template", "text", "continuation"), ("too_long", "token_logprobs")),
}
_OF_ANSWERS = (
    *("json_schema", "schema_column", "choice", "regex", "grammar", "json_object"),
    *("flatten", "with_seed"),
)
"""Keys of `[output]` that are for what is generated."""


def unfit(task: str, prompt: str, pooling: PoolingConfig, output: Mapping[str, Any]) -> str | None:
    """Say what of a job does not go with its task; None if all does.

    Args:
        task: The job's.
        prompt: The key of `[prompt]` that says what rows become.
        pooling: The table.
        output: The keys that are given of `[output]`.
    """
    fit = _FITS[task]
    if prompt not in fit.prompts:
        return f"prompt.{prompt} does not go with task {task!r}, expected prompt.{fit.prompts[0]}"
    if other := sorted(pooling.model_fields_set.difference(fit.pooling)):
        return f"pooling.{other[0]} does not go with task {task!r}"
    if pooling.too_long == "chunk" and (
        task not in ("embed", "loglikelihood") or prompt == "continuation"
    ):
        what = "a continuation" if prompt == "continuation" else repr(task)
        return f"pooling.too_long = 'chunk' is for embed and for likelihoods of texts, not {what}"
    if task != "generate" and (given := [key for key in _OF_ANSWERS if key in output]):
        key = given[0].removeprefix("json_") if given[0] == "json_schema" else given[0]
        return f"output.{key} is for answers that are generated, not for {task!r}"
    return None


_OF_OPENAI: Mapping[str, Mapping[str, Any]] = {
    "input": {"columns": ["custom_id", "url", "model", "tool_choice"]},
    "prompt": {"messages": "messages"},
    "sampling": {"column": "sampling", "max_tokens": 2**31 - 1},
    "checks": {"allow_truncated": True},
    "gate": {"max_error_rate": 1.0},
}
"""What holds for a job whose input is OpenAI's: its lines have the columns of `source.openai`, an
answer may be cut off and ends at the model's context, and wrong lines are no trouble of the job."""


_OF_POOLING: Mapping[str, Mapping[str, Any]] = {
    "embed": {"text": "text"},
    "score": {"query": "{{ query }}", "passage": "{{ passage }}"},
}
"""`[prompt]` of such a job with another task."""


_NONE = (OSError, ValueError, TypeError, RecursionError)


def is_batch_file(tables: Mapping[str, Any], base: Path) -> bool:
    """Whether a job says nothing of a prompt and a format, and its input begins with a request."""
    source = tables.get("input")
    if "prompt" in tables or not isinstance(source, dict) or source.get("format") is not None:
        return False
    with suppress(*_NONE), open_file(base / source["path"]) as file:
        texts = (text.decode("utf-8-sig") for text in iter(lambda: file.readline(MAX_LINE), b""))
        line = next((text for text in texts if text.strip()), "")
        return {"custom_id", "method", "url", "body"} <= {*json.loads(line)}
    return False


def by_line(tables: Any) -> Any:  # noqa: ANN401 - before it is checked
    """Return a job's tables with what holds by itself where the input is OpenAI's."""
    source = tables.get("input") if isinstance(tables, dict) else None
    if not isinstance(source, dict) or source.get("format") != "openai":
        return tables
    task, usual = tables.get("task", "generate"), _OF_OPENAI
    if task in _OF_POOLING:
        usual = {"input": usual["input"], "gate": usual["gate"], "prompt": _OF_POOLING[task]}
    model = tables.get("model")
    if isinstance(model, dict) and model.get("lora"):
        usual = {**usual, "model": {"lora_column": "model"}}
    own = {name: tables.get(name, {}) for name in usual}
    if not all(isinstance(table, dict) for table in own.values()):
        return tables
    return {**tables, **{name: {**usual[name], **own[name]} for name in own}}
