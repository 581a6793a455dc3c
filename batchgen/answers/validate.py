"""Completions to results, and what a row whose answer failed is asked next.

`Judge` reads every answer against its format and the job's rules. `Retries` makes the next
attempt, which goes to the end of the runner's queue like any row: nothing waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.answers.output_format import Reading
from batchgen.core.data import column_of, gather_rows
from batchgen.core.errors import ConfigError
from batchgen.core.expressions import check_row_test, parse_row_test
from batchgen.core.records import Result, Retry, RowError, Verdict, is_continued

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.answers.output_format import AnswerColumns, OutputFormat
    from batchgen.core.expressions import RowTest
    from batchgen.core.records import Completion, Prompt, Request, Sample
    from batchgen.job.model import JobConfig
    from batchgen.job.recipe import Seeds
    from batchgen.job.sampling import RetryConfig, SamplingConfig

    Asked = Sequence[tuple[Request, Completion]]
    Readings = Sequence[Sequence[Reading]]

_CHECKS = "[checks]"
TELL_ERROR = "This answer was refused: {error}. Answer again, without this mistake."
"""The message that a retry with `tell_error` adds, after the failed answer."""
_NOT_PARAMS = {"on", "tell_error"}
_MAX_QUOTED_CHARS = 4000
"""Of a failed answer that is shown to the model again: one that ran wild would fill its context."""
_OK, _CUT = Reading(Verdict.OK), Reading(Verdict.TRUNCATED)
_FACTS: dict[str, tuple[pa.DataType, Callable[[Completion], Any]]] = {
    "finish_reason": (pa.string(), lambda completion: completion.finish_reason),
    "num_prompt_tokens": (pa.int32(), lambda completion: completion.num_prompt_tokens),
    "num_output_tokens": (pa.int32(), lambda completion: completion.num_output_tokens),
}
"""Columns beside the answer's own that rules may read."""


def rule_schema(carried: pa.Schema, columns: AnswerColumns, prefix: str) -> pa.Schema:
    """Everything that a rule may read."""
    columns = columns.of_one or columns
    facts = [pa.field(prefix + name, kind) for name, (kind, _) in _FACTS.items()]
    ours = [field.with_name(prefix + field.name) for field in columns.fields]
    return pa.schema([*carried, *ours, *facts])


def check_rules(rules: Sequence[str], columns: pa.Schema) -> None:
    """Refuse rules that cannot decide each row by itself.

    Raises:
        ConfigError: With every wrong rule.
    """
    problems = []
    for at, text in enumerate(rules):
        try:
            check_row_test(f"rules[{at}]", text, columns)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(_CHECKS, problems)


class Judge:
    """Judges the answers of one job. Holds no row."""

    def __init__(self, job: JobConfig, output_format: OutputFormat, columns: AnswerColumns) -> None:
        """Bind to a job, with what an answer has to be and what it becomes."""
        allow_cut = job.checks.allow_truncated or bool(job.sampling.ignore_eos)
        self._read_sample = _read_any if allow_cut and output_format.is_free else output_format.read
        self._columns, self._seen = columns, columns.of_one or columns
        self._min_ok = job.checks.min_ok_samples
        rules = enumerate(job.checks.rules)
        self._rules = [parse_row_test(f"rules[{at}]", text) for at, text in rules]
        self._prefix = job.output.prefix

    def judge(self, asked: Asked) -> list[Result]:
        """One result each, in order; `error` says why an answer does not count."""
        readings = [
            [self._read_sample(sample, request) for sample in completion.samples]
            for request, completion in asked
        ]
        if self._seen is not self._columns and self._rules:
            alone = [
                (request, completion._replace(samples=[one], num_output_tokens=one.num_tokens))
                for request, completion in asked
                for one in completion.samples
            ]
            flat = [[reading] for each in readings for reading in each]
            ruled = iter(self._results(alone, flat, self._seen))
            readings = [[_ruled(reading, next(ruled)) for reading in each] for each in readings]
        return self._results(asked, readings, self._columns)

    def _results(self, asked: Asked, readings: Readings, columns: AnswerColumns) -> list[Result]:
        """Put together what was read, by the rules if they are for these columns."""
        results = [
            self._result(*one, read, columns) for one, read in zip(asked, readings, strict=True)
        ]
        for rule in self._rules if columns is self._seen else ():
            self._apply(rule, results)
        return results

    def _result(
        self,
        request: Request,
        completion: Completion,
        readings: Sequence[Reading],
        columns: AnswerColumns,
    ) -> Result:
        error, verdict, values = completion.error, Verdict.ERROR, None
        if error is None:
            best = _best(readings, min(self._min_ok, len(readings)))
            verdict, error = best.verdict, best.error
            values = columns.values(completion.samples, readings)
        return Result(
            ordinal=request.ordinal,
            batch=request.batch,
            index=request.index,
            request_key=request.request_key,
            completion=completion,
            error=error,
            verdict=verdict,
            values=values,
            attempts=request.attempt,
            seed=request.seed,
        )

    def _apply(self, rule: RowTest, results: list[Result]) -> None:
        """Refuse those for which the rule is not true; in place."""
        places = [at for at, result in enumerate(results) if result.error is None]
        if not places:
            return
        tested = [results[at] for at in places]
        arrays = [self._array(name, tested) for name in rule.columns]
        passed, failures = rule.keep(arrays, len(tested))
        for place, is_kept in enumerate(passed.to_pylist()):
            if not is_kept:
                why = failures.get(place, refusal(rule))
                error = RowError(Verdict.REFUSED.value, why)
                refused = tested[place]._replace(error=error, verdict=Verdict.REFUSED)
                results[places[place]] = refused

    def _array(self, name: str, results: Sequence[Result]) -> pa.Array:
        ours = name.removeprefix(self._prefix) if name.startswith(self._prefix) else None
        for at, field in enumerate(self._seen.fields):
            if field.name == ours:
                return column_of([r.values[at] for r in results if r.values], field.type)
        if ours in _FACTS:
            kind, fact = _FACTS[ours]
            return pa.array([fact(r.completion) for r in results if r.completion], kind)
        places = [(result.batch.carried, result.index) for result in results]
        return gather_rows(places, [name])[0].combine_chunks()


def _ruled(reading: Reading, result: Result) -> Reading:
    return Reading(result.verdict, reading.value, result.error)


def refusal(rule: RowTest) -> str:
    """The error text of an answer for which a rule is not true."""
    return f"{rule.name} = {rule.text!r} is not true"


def _read_any(sample: Sample, _: Request | None) -> Reading:
    """Free text of which the beginning is good enough: there is nothing wrong with it."""
    return _CUT if sample.finish_reason == "length" else _OK


def _best(readings: Sequence[Reading], min_ok: int) -> Reading:
    """Of several samples: the first that is ok if enough are, else the first that is not."""
    good = [reading for reading in readings if reading.error is None]
    if len(good) >= min_ok:
        return next((one for one in good if one.verdict is Verdict.OK), good[0])
    at, bad = next((at, one) for at, one in enumerate(readings) if one.error is not None)
    if min_ok > 1 and bad.error is not None:
        found = f"{len(good)} of {len(readings)} samples are ok, expected {min_ok}"
        text = f"{found}; sample {at}: {bad.error.error}"
        return bad._replace(error=RowError(bad.error.error_type, text))
    return bad


class Retries:
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
    assert not isinstance(prompt, str | tuple)  # noqa: S101 - refused with a raw text
    completion, error = result.completion, result.error
    answer = (completion.text if completion is not None else None) or ""
    text = TELL_ERROR.format(error=error.error if error is not None else "")
    begun = list(prompt[-1:]) if is_continued(prompt) else []
    if begun and isinstance(said := begun[0]["content"], str):
        answer = said + answer
    return [
        *prompt[: len(prompt) - len(begun)],
        {"role": "assistant", "content": answer[:_MAX_QUOTED_CHARS]},
        {"role": "user", "content": text},
        *begun,
    ]


def check_retries(rungs: Sequence[RetryConfig], sampling: SamplingConfig, *, is_chat: bool) -> None:
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
            problems.append(f"retry[{at}].tell_error: needs a chat, not a raw text")
    if problems:
        raise ConfigError("[[retry]]", problems)
