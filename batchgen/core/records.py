"""The frozen values that cross stages: Row batch -> Request -> Completion -> Result; sets of rows.

This module is the whole contract between the stages of layer 3, which never import each other.
Nothing here does work. A row is known by its `Ordinal` from the moment it is read to the moment
its result is published; ids, texts and keys are data that ride along.

What is made for every row is a named tuple: a frozen dataclass takes four times as long to make.

Progress is kept as `Ranges`, sorted, disjoint, half-open intervals of row numbers, and never as a
count or a prefix: rows finish out of order, and a resume that counts loses rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa


Messages = Sequence[Mapping[str, Any]]
"""A chat: `{"role": ..., "content": ...}` in order, as chat templates take it."""

Pair = tuple[str, ...]
"""Two texts that are judged together: a query and a passage, a prompt and its continuation; or a
query and several passages, each of which gets a score."""


class Passages(list[str]):
    """Several passages of a row, in the place of one; nothing that can be read from an input."""


Prompt = str | Messages | Pair
"""A raw text, tokenized as it is; a chat, which goes through the model's chat template and is never
a tuple; or, for the tasks that take it, a pair."""


TOOLS = ("tools", "tool_choice")
"""What a request's `params` may hold beside sampling: tools for the chat template, as OpenAI's API
describes them, and whether calls of them are found in the answer: auto or none."""


def is_continued(prompt: Prompt) -> bool:
    """Tell whether a chat ends within the assistant's turn, with which the model is to go on."""
    last = prompt[-1] if prompt and not isinstance(prompt, str | tuple) else {}
    is_said = last.get("role") == "assistant" and not last.get("tool_calls")
    return is_said and bool(last.get("content"))


class Ordinal(NamedTuple):
    """A row's identity in its plan: which segment, and which physical row of it, from 0."""

    segment: int
    row: int


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no answer. `error_type` is a stable lower-case word, `error` one line."""

    error_type: str
    error: str

    def __post_init__(self) -> None:
        """Make it text that can be written, whatever the names of files in it are made of."""
        object.__setattr__(self, "error", writable_text(self.error))


def writable_text(text: str) -> str:
    r"""Return a text without halves of characters, such as names that are not UTF-8 have.

    They are escaped: `caf\udce9`.
    """
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Some rows of one segment, in the order read.

    `rows`, `values` and `carried` have one entry a row, at the same index. `values[i]` is None
    exactly where `errors` has `i`.
    """

    segment: int
    rows: Sequence[int]
    """Physical row numbers within the segment, ascending."""
    values: Sequence[Mapping[str, Any] | None]
    """Column values that templates see."""
    carried: pa.RecordBatch
    """The columns that go to the output unchanged, `len(rows)` long, in the planned schema."""
    errors: Mapping[int, RowError]
    """Index in this batch -> why that row could not be read."""
    skipped: Ranges
    """Physical row numbers that end without a result: blank lines, rows that `where` leaves out."""


class Request(NamedTuple):
    """A row as it goes to the engine; one for each attempt."""

    request_id: int
    """Unique within one run; counts up from 0. Not the row's identity."""
    ordinal: Ordinal
    prompt: Prompt
    request_key: str
    """128-bit hash of content and recipe, 32 hex digits; the same for every attempt."""
    seed: int | None
    """For sampling, 0 <= seed < 2**62; None when sampling is greedy."""
    batch: RowBatch
    index: int  # type: ignore[assignment]  # Hides tuple.index, of no use here.
    """Where the row's carried columns are: `batch.carried[index]`."""
    params: Mapping[str, Any] | None = None
    """vLLM's SamplingParams fields that this request has otherwise than the job; and `TOOLS`."""
    lora: str | None = None
    """Name of the adapter in `EngineSpec.loras`; None for the model itself."""
    attempt: int = 1
    retry: Retry | None = None
    """None for the first attempt."""


class Retry(NamedTuple):
    """What came before a further attempt."""

    first: Request
    failed: Result
    """Of the attempt before this one; it stands if this one brings no answer at all."""
    rung: int
    """The index in the job's `[[retry]]`."""


class TokenLogprobs(NamedTuple):
    """One generated token and what else was likely there."""

    token: str | None
    """Its text; None for a special token, which ends an answer and is no text of it."""
    logprob: float
    """Natural logarithm of its probability, after the grammar's mask."""
    top: Sequence[tuple[str | None, float]]
    """The likeliest tokens with theirs, likeliest first; `SamplingParams.logprobs` of them."""


class Sample(NamedTuple):
    """One answer of the `n` that a request has."""

    text: str
    """Without the reasoning and the tool calls, where the model's are parsed."""
    finish_reason: str | None
    """vLLM's word, an open set: stop, length, repetition."""
    logprobs: Sequence[TokenLogprobs] | None = None
    """Where asked for, one a token of the whole output."""
    reasoning: str | None = None
    tool_calls: Sequence[tuple[str, str]] | None = None
    """Name and arguments (JSON text) of each call; None where none are parsed."""
    numbers: bytes | None = None
    """What a task other than to generate gives instead of a text, as float32 of this machine: an
    embedding; a probability for each label; a score; the log probabilities of a text's tokens, then
    their ranks, 1 for the likeliest. `finish_reason` is "length" if the text was cut to fit."""
    num_chunks: int = 1
    """Pieces of the text that `numbers` are of: an embedding is their mean."""
    num_tokens: int | None = None
    """Tokens generated, that which ends the answer among them; None: nobody said."""


class Completion(NamedTuple):
    """What the engine says of one request: answers, or why there are none."""

    request_id: int
    samples: Sequence[Sample]
    """`n` of them; none if `error`."""
    num_prompt_tokens: int | None
    num_cached_tokens: int | None
    """Prompt tokens that the prefix cache served."""
    num_output_tokens: int | None
    """Of all samples."""
    latency_s: float | None
    """From admission into the engine to the last token."""
    error: RowError | None = None

    @property
    def text(self) -> str | None:
        """Of the first sample."""
        return self.samples[0].text if self.samples else None

    @property
    def finish_reason(self) -> str | None:
        """Of the first sample."""
        return self.samples[0].finish_reason if self.samples else None


class Verdict(StrEnum):
    """What became of an answer."""

    OK = "ok"
    TRUNCATED = "truncated"
    """It ended at max_tokens or max_model_len."""
    INVALID_JSON = "invalid_json"
    SCHEMA_VIOLATION = "schema_violation"
    """Not of the form that the job asks for: schema, choice, regex."""
    REFUSED = "refused"
    """A rule of the job's `[checks]` refused it."""
    ERROR = "error"
    """There is no answer: `error_type` says why."""


class Result(NamedTuple):
    """How a row ends: exactly one a row, `ok` (error is None) or an error."""

    ordinal: Ordinal
    batch: RowBatch
    index: int  # type: ignore[assignment]  # As in Request.
    request_key: str | None
    completion: Completion | None
    error: RowError | None
    verdict: Verdict = Verdict.ERROR
    values: Sequence[Any] | None = None
    """One value for each of `answers.output_format.AnswerColumns.fields`; None: all null."""
    attempts: int = 0
    """How often the engine was asked."""
    seed: int | None = None
    """Of the attempt that counts."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a started engine says of itself; recorded with the results."""

    name: str
    version: str
    device: str
    """Such as `NVIDIA H100 80GB HBM3`, or `cpu`; `none` where there is nothing to tune for."""
    max_model_len: int | None
    """Tokens of a prompt and its answer together; None: no limit."""
    max_num_seqs: int
    """Requests that it runs at once."""
    startup_s: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keywords that batchgen chose for it, since the job says nothing of them."""
    served: Mapping[str, Any] = field(default_factory=dict)
    """By what a server's model is known again, to be kept beside the plan: its name, root and
    version, and its answer to a fixed question."""

    @property
    def num_engines(self) -> int:
        """Engines that work as this one, each of which runs `max_num_seqs` at once."""
        num: int = self.settings.get("engines_per_gpu", 1)
        return num


class TaskFacts(NamedTuple):
    """What an engine makes of each row, for a task other than to generate."""

    size: int
    """How many numbers a row gets; of a likelihood, each of its tokens."""
    labels: Sequence[str] = ()
    """Of a classifier, one a number."""
    is_multi_label: bool = False
    """Whether each label holds or not by itself; else exactly one does."""
    prefix: str = ""
    """Goes before each text: the model's own, by the name that the job gives."""


class WorkLeft(NamedTuple):
    """What an engine is started for: it should not start heavier than that."""

    num_rows: int
    """At most so many have to be computed."""
    output_tokens: int
    """An answer's, at most."""
    prompt_tokens: int | None = None
    """A row's, at most; None: nobody knows."""
    rows_per_s: float | None = None
    """In the last run; None: there was none."""
    is_compiled: bool = False
    """The last run had the model compiled, so that vLLM's cache holds it."""
    has_gpu_alone: bool = False
    """No other engine will be started on its GPU, though some were to share it."""

    def share(self, num: int) -> WorkLeft:
        """Return what each of `num` engines has of it, at its share of the speed."""
        speed = self.rows_per_s and self.rows_per_s / num
        return self._replace(num_rows=-(-self.num_rows // num), rows_per_s=speed)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at a working engine. Counters grow from 0 since its start; None where unknown."""

    num_running: int | None = None
    num_waiting: int | None = None
    kv_cache_usage: float | None = None
    """Share of the KV cache in use, 0 to 1."""
    num_preemptions: int | None = None
    num_steps: int | None = None
    """Steps that did work: stands still when the engine hangs."""
    num_prompt_tokens: int | None = None
    """Of the requests whose prompt has been worked off, prefix cache or not; each counts once."""
    num_generated_tokens: int | None = None
    """Those of unfinished requests too."""
    max_num_batched_tokens: int | None = None
    """Tokens that one step takes at most."""
    gpu_busy: float | None = field(default=None, compare=False)
    """Share of time in which its GPUs worked, 0 to 1, for whomever: it changes though all else of a
    hanging engine stands still, and does not count as a change."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that a process needs to start an engine; plain values, so that it travels."""

    backend: str
    """`vllm`, `openai`, `auto` (a warm server, or vLLM here), `echo` or the import path of an
    engine, `package.module:Class`."""
    model: str
    """Folder of the model; for vLLM always local, resolved before."""
    model_kwargs: Mapping[str, Any]
    """vLLM's `LLM(...)` keywords from `[model]` and `[model.engine]`; unset ones absent."""
    sampling_params: Mapping[str, Any]
    """vLLM's `SamplingParams` fields from `[sampling]` and the job's form, without `seed`; unset
    ones absent. `structured_outputs` is a mapping of StructuredOutputsParams fields."""
    chat_template: str | None = None
    """Jinja text that replaces the model's own chat template."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    """Tools for the chat template, as OpenAI's API describes them."""
    loras: Mapping[str, str] = field(default_factory=dict)
    """Name of each LoRA adapter that a request may name -> its folder."""
    reasoning_parser: str | None = None
    """vLLM's reasoning parser: what it finds goes to `Sample.reasoning`."""
    tool_call_parser: str | None = None
    """vLLM's tool parser: what it finds goes to `Sample.tool_calls`."""
    log_path: str | None = None
    """Where the engine's own log lines go."""
    max_in_flight: int | None = None
    """Requests inside the engine at once; None means twice its `max_num_seqs`."""
    defaults: str = "vllm"
    """Who chooses what the job leaves open: vllm, or batchgen, see `run.engine_defaults`."""
    work: WorkLeft | None = None
    """What is left to do; None: much, or nobody knows."""
    num_sharing: int = 1
    """Engines on its GPU, itself among them: it takes so large a part of the memory."""
    endpoint: Mapping[str, Any] = field(default_factory=dict)
    """Where a server of the model is and how it may be used, as keywords of
    `endpoints.options.Options`; empty for an engine in the process."""
    task: str = "generate"
    """The job's `task`."""
    pooling: Mapping[str, Any] = field(default_factory=dict)
    """The job's `[pooling]`; unset keys absent. Prompts begin with its `prefix` already."""

    @property
    def is_vllm(self) -> bool:
        """Whether `model_kwargs` are vLLM's, and devices are used."""
        return self.backend in ("vllm", "auto")

    @property
    def is_pooling(self) -> bool:
        """Whether the model pools what it makes of a text, and writes nothing."""
        return self.task not in ("generate", "loglikelihood")


class Ranges:
    """An immutable set of non-negative integers.

    Invariant: `spans` is ascending, spans neither overlap nor touch, each has start < stop.
    """

    __slots__ = ("spans",)

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        """Take spans in any order; overlaps and touching neighbours are merged."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(spans):
            if start >= stop:
                continue
            if merged and start <= merged[-1][1]:
                if stop > merged[-1][1]:
                    merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self.spans: tuple[tuple[int, int], ...] = tuple(merged)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Ranges:
        """The set of these numbers."""
        ordered = sorted(set(numbers))
        if not ordered:
            return cls()
        starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
        stops = [*(a + 1 for a, b in pairwise(ordered) if b != a + 1), ordered[-1] + 1]
        return cls(zip(starts, stops, strict=True))

    @classmethod
    def until(cls, stop: int) -> Ranges:
        """Every number from 0 up to, not including, `stop`."""
        return cls([(0, stop)])

    def __len__(self) -> int:
        """How many numbers, not how many spans."""
        return sum(stop - start for start, stop in self.spans)

    def __bool__(self) -> bool:
        return bool(self.spans)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self.spans, (number, float("inf"))) - 1
        return at >= 0 and number < self.spans[at][1]

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.spans:
            yield from range(start, stop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self.spans == other.spans

    def __hash__(self) -> int:
        return hash(self.spans)

    def __repr__(self) -> str:
        return f"Ranges({list(self.spans)})"

    def __or__(self, other: Ranges) -> Ranges:
        return Ranges(self.spans + other.spans)

    def __and__(self, other: Ranges) -> Ranges:
        few, many = sorted((self, other), key=lambda one: len(one.spans))
        return Ranges(span for start, stop in few.spans for span in many.within(start, stop))

    def __sub__(self, other: Ranges) -> Ranges:
        left = []
        cuts = iter(other.spans)
        cut = next(cuts, None)
        for start, stop in self.spans:
            at = start
            while cut is not None and cut[0] < stop:
                if cut[1] > at:
                    left.append((at, cut[0]))
                    at = max(at, cut[1])
                if cut[1] > stop:
                    break
                cut = next(cuts, None)
            left.append((at, stop))
        return Ranges(left)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the spans, cut to `start` up to, not including, `stop`."""
        at = max(bisect_right(self.spans, (start, float("inf"))) - 1, 0)
        while at < len(self.spans) and self.spans[at][0] < stop:
            first, end = self.spans[at]
            if max(first, start) < min(end, stop):
                yield max(first, start), min(end, stop)
            at += 1

    def to_json(self) -> list[int]:
        """Return a flat list: start, stop, start, stop, ..."""
        return [number for span in self.spans for number in span]

    @classmethod
    def from_json(cls, flat: Any) -> Ranges:  # noqa: ANN401 - foreign JSON, checked here
        """Read what `to_json` wrote.

        Raises:
            ValueError: The value is not a flat list of ascending integers of even length.
        """
        good = isinstance(flat, list) and len(flat) % 2 == 0 and all(type(n) is int for n in flat)
        if not good or any(a >= b for a, b in pairwise(flat)) or (flat and flat[0] < 0):
            raise ValueError(f"not a list of ranges: {flat!r:.80}")
        return cls(zip(flat[::2], flat[1::2], strict=True))


NO_ROWS = Ranges()


class RowSet(dict[int, Ranges]):
    """Rows of a plan: segment -> rows, those segments only that have some.

    To look up another segment gives no rows. Treated as a value: never changed once it is made.
    """

    __slots__ = ()

    def __init__(self, rows: Mapping[int, Ranges] | Iterable[tuple[int, Ranges]] = ()) -> None:
        """Take rows by segment; segments without rows are left out."""
        super().__init__((segment, found) for segment, found in dict(rows).items() if found)

    @classmethod
    def of_spans(cls, spans: Iterable[tuple[int, int, int]]) -> RowSet:
        """Gather spans in any order: segment, first row, row after the last."""
        found: dict[int, list[tuple[int, int]]] = {}
        for segment, start, stop in spans:
            found.setdefault(segment, []).append((start, stop))
        return cls((segment, Ranges(those)) for segment, those in sorted(found.items()))

    @classmethod
    def of(cls, ordinals: Iterable[tuple[int, int]]) -> RowSet:
        """Gather rows in any order: segment, row."""
        found: dict[int, list[int]] = {}
        for segment, row in ordinals:
            found.setdefault(segment, []).append(row)
        return cls((segment, Ranges.of(rows)) for segment, rows in sorted(found.items()))

    @property
    def num_rows(self) -> int:
        """Number of rows in all segments."""
        return sum(map(len, self.values()))

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield segment, first row, row after the last, segment by segment."""
        for segment, rows in self.items():
            for start, stop in rows.spans:
                yield segment, start, stop

    def __missing__(self, segment: int) -> Ranges:
        return NO_ROWS

    def __sub__(self, other: Mapping[int, Ranges]) -> RowSet:
        return RowSet((at, rows - other.get(at, NO_ROWS)) for at, rows in self.items())

    def __and__(self, other: Mapping[int, Ranges]) -> RowSet:
        return RowSet((at, rows & other.get(at, NO_ROWS)) for at, rows in self.items())

    def __or__(self, other: Mapping[int, Ranges]) -> RowSet:  # type: ignore[override]
        """Return the rows in either; of sets, and not as dicts are joined."""
        return RowSet.of_spans((*self.spans(), *RowSet(other).spans()))

    def __ior__(self, other: Mapping[int, Ranges]) -> RowSet:  # type: ignore[override]
        return self | other  # Not dict's, which would change it.
