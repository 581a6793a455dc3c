"""`[sampling]`, `[checks]` and `[[retry]]` of the job file: how answers come, and which count."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from batchgen.job.run_table import PositiveInt, Table
from batchgen.job.task import Share, Word  # noqa: TC001 - pydantic reads them

RetryVerdict = Literal["truncated", "invalid_json", "schema_violation", "refused"]


class SamplingFields(Table):
    """Those of vLLM's SamplingParams that an attempt or a row may have otherwise."""

    max_tokens: PositiveInt | None = None
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """0 is greedy. Default: that of the model's generation_config.json, else 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 or -1: all tokens."""
    min_p: Share | None = None
    """Least probability relative to the likeliest token."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Penalty for tokens already in the answer."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Penalty growing with each use."""
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Over 1 discourages tokens of prompt and answer."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """Shortest answer, in tokens."""
    stop: str | list[str] | None = None
    """Texts that end the answer."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    """Tokens that end the answer."""
    bad_words: list[Word] | None = None
    """Words never to be generated."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop text in the answer."""
    ignore_eos: bool | None = None
    """Go on after the end token, up to max_tokens: for benchmarks."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default: true."""

    @model_validator(mode="after")
    def _can_end(self) -> Self:
        least, most = self.min_tokens or 0, self.max_tokens
        if most is not None and least > most:
            msg = f"min_tokens = {least} is over max_tokens = {most}: no answer could be both"
            raise ValueError(msg)
        if "" in ([self.stop] if isinstance(self.stop, str) else self.stop or []):
            msg = "stop has an empty text, which ends every answer, expected at least 1 character"
            raise ValueError(msg)
        return self


class RowSampling(SamplingFields):
    """What a row's own `sampling.column` may hold."""

    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    """Instead of the row's own that is derived from the job's."""


class LineSampling(RowSampling):
    """What a line of OpenAI's batch files may ask."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Answers."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """So many likeliest tokens at each place."""


class SamplingConfig(SamplingFields):
    """vLLM's SamplingParams, by its names.

    What is not set here comes from the model's generation_config.json, as in `vllm serve`.
    """

    max_tokens: PositiveInt
    """Longest answer, in tokens. No default: it bounds the time that a row can take."""
    n: Annotated[int, Field(ge=1, le=1024)] = 1
    """Answers a row: columns become lists; with `output.choice` they vote."""
    logprobs: Annotated[int, Field(ge=0)] | Literal["labels"] | None = None
    """So many likeliest tokens at each place; with choices or enums, a probability for each.
    labels: with `output.choice`, of all tokens that a label can begin with instead, so that every
    label has its exact probability, however unlikely it is."""
    column: str | None = None
    """Column with a row's own values for keys of this table: an object, or JSON text."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of the job; each row's own is derived from it and the row's position."""
    extra: dict[str, Any] = Field(default={}, examples=[{"logit_bias": {"42": -5.0}}])
    """Any other field of vLLM's SamplingParams, such as logit_bias, passed as it is."""

    @model_validator(mode="after")
    def _has_keys_of_their_own(self) -> Self:
        for name in sorted(self.extra):
            if name in {*type(self).model_fields, *_OURS}:
                place = "[output]" if name in _OURS else f"sampling.{name}"
                raise ValueError(f"extra.{name} has a place of its own, see {place}")
        return self


_OURS = ("structured_outputs", "output_kind", "detokenize", "skip_clone")
"""Fields that batchgen sets."""


class ChecksConfig(Table):
    """What an answer has to be, beyond its form, to count as ok."""

    rules: list[str] = Field(default=[])
    """SQL expressions over carried and added columns; an answer for which one is not true is
    refused, such as `len(gen_text) < 400`."""
    allow_truncated: bool = False
    """Accept answers that end at max_tokens, where the form allows it."""
    min_ok_samples: Annotated[int, Field(ge=1)] = 1
    """With `sampling.n` > 1, a row is ok if so many of its samples are. Default: 1, since one good
    answer is an answer, and `gen_samples` says which are good."""


class RetryConfig(SamplingFields):
    """One more attempt for a row whose answer failed, with another seed and these changes.

    Not part of the recipe: change it freely, it only touches rows that fail.
    """

    on: list[RetryVerdict] = Field(
        default=["truncated", "invalid_json", "schema_violation", "refused"], min_length=1
    )
    """Only for these verdicts."""
    tell_error: bool = False
    """Show the model its failed answer, and say what is wrong with it."""
