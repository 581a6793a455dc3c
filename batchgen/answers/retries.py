"""`Ladder`: what a row whose answer failed is asked next.

A further attempt goes to the end of the runner's queue like any row: nothing waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.core.errors import ConfigError
from batchgen.core.records import Retry, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.core.records import Prompt, Request, Result
    from batchgen.job.answers import RetryConfig, SamplingConfig
    from batchgen.job.seeds import Seeds

TELL_ERROR = "This answer was refused: {error}. Answer again, without this mistake."
"""The message that a retry with `tell_error` adds, after the failed answer."""
_NOT_PARAMS = {"on", "tell_error"}
_MAX_QUOTED_CHARS = 4000
"""Of a failed answer that is shown to the model again: one that ran wild would fill its context."""


class Ladder:
    """The job's `[[retry]]`, applied to one failed result at a time."""

    def __init__(self, rungs: Sequence[RetryConfig], seeds: Seeds, ids: Iterator[int]) -> None:
        """Bind to a job; `ids` are the run's request ids, shared with whoever makes requests."""
        self._rungs = rungs
        self._params = [rung.model_dump(exclude=_NOT_PARAMS, exclude_none=True) for rung in rungs]
        self._seeds = seeds
        self._ids = ids

    def next(self, request: Request, result: Result) -> Request | None:
        """The request to try instead, None if `result` stands."""
        if result.error is None or result.verdict is Verdict.ERROR:
            return None
        start = 0 if request.retry is None else request.retry.rung + 1
        for rung in range(start, len(self._rungs)):
            if result.verdict.value in self._rungs[rung].on:
                return self._climb(request, result, rung)
        return None

    def _climb(self, request: Request, result: Result, rung: int) -> Request:
        first = request if request.retry is None else request.retry.first
        params = {**(first.params or {}), **self._params[rung]}
        prompt = first.prompt
        if self._rungs[rung].tell_error:
            prompt = _with_error(prompt, result)
        attempt = request.attempt + 1
        return first._replace(
            request_id=next(self._ids),
            prompt=prompt,
            params=params or None,
            seed=self._seeds.of(first.ordinal, params, attempt),
            attempt=attempt,
            retry=Retry(first, result, rung),
        )


def final(request: Request, result: Result) -> Result:
    """The result that stands: a last attempt without any answer does not replace a failed one."""
    if request.retry is None or result.verdict is not Verdict.ERROR:
        return result
    return request.retry.failed._replace(attempts=request.attempt)


def _with_error(prompt: Prompt, result: Result) -> Prompt:
    assert not isinstance(prompt, str)  # noqa: S101 - refused with prompt.text
    completion, error = result.completion, result.error
    answer = (completion.text if completion is not None else None) or ""
    text = TELL_ERROR.format(error=error.error if error is not None else "")
    return [
        *prompt,
        {"role": "assistant", "content": answer[:_MAX_QUOTED_CHARS]},
        {"role": "user", "content": text},
    ]


def check_ladder(rungs: Sequence[RetryConfig], sampling: SamplingConfig, *, is_chat: bool) -> None:
    """Refuse attempts that cannot help.

    Raises:
        ConfigError: With every problem.
    """
    problems = []
    for at, rung in enumerate(rungs):
        params = rung.model_dump(exclude=_NOT_PARAMS, exclude_none=True)
        is_greedy = params.get("temperature", sampling.temperature) == 0
        changes = {key for key, value in params.items() if value != getattr(sampling, key)}
        if is_greedy and not changes and not rung.tell_error:
            problems.append(
                f"retry[{at}]: changes nothing at temperature 0, so the answer would be the same; "
                "set temperature, max_tokens or tell_error"
            )
        if rung.tell_error and not is_chat:
            problems.append(f"retry[{at}].tell_error: needs a chat, not prompt.text")
    if problems:
        where = "[[retry]]"
        raise ConfigError(where, problems)
