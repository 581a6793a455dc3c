"""`AdmissionOrder`: long answers first, then by the prompts' text.

Long first, because a long answer that begins last is decoded alone, at the speed of one, when all
others have ended. By text, because requests with a common beginning that follow each other find it
in the prefix cache; sorting whole prompts serves every depth of sharing at once. Both only where a
look at the first rows shows that they pay; where not, rows go as they come. How long an answer
will be is told from its `max_tokens` and from earlier answers (`Lengths`).

It is a look-ahead of bounded memory: the engine starts with the best of what is there, not when all
is read.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import orjson
import pyarrow as pa

from batchgen.core.data import gather_rows
from batchgen.core.records import Prompt, Ranges, Request, RowBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    Mode = Literal["auto", "prefix"]

MIN_SEEN = 8
"""Fewer answers to prompts of one size say nothing about the next."""
BYTES_A_TOKEN = 4
"""Of English text, roughly; a wrong guess shifts all sizes alike."""

SAMPLE_ROWS = 2048
MIN_SHARED = 128
"""Bytes that a prompt must share, on average, with its neighbour in sorted order, beyond what all
share: about two blocks of the prefix cache, 16 tokens each."""
MIN_OCTAVES = 2
"""Answers whose expected lengths differ by less are all alike."""
KEY_BYTES = 4096
SAMPLE_BYTES = 16 << 10
"""Of each text of the sample."""
TAKE_ROWS = 1024
TAKE_BYTES = 16 << 20
"""What is taken lies in memory a second time until the engine has it."""
CHUNK_ROWS = 64
CHUNK_BYTES = 256 << 10
"""Rows that share the memory of their columns."""
MAX_RUNS = 32
"""Of more, one is made: each may hold a chunk for the sake of its last row."""


class Lengths(NamedTuple):
    """What is known of the lengths of a job's answers."""

    max_tokens: int | None = None
    """The job's; None: as far as the model goes."""
    is_exact: bool = False
    """Every answer is as long as it may be (`ignore_eos`)."""
    means: Mapping[int, float] = {}
    """Octave of a prompt's size in tokens -> mean output tokens of earlier answers."""

    def expect(self, prompt: Prompt, params: Mapping[str, Any] | None) -> int | None:
        """Output tokens to expect of one request; None where nothing is known."""
        asked = params or {}
        bound: int | None = asked.get("max_tokens", self.max_tokens)
        if asked.get("ignore_eos", self.is_exact):
            return bound
        mean = self.means.get(octave(size_of(prompt) // BYTES_A_TOKEN))
        if mean is None:
            return bound
        return int(mean) if bound is None else min(int(mean), bound)


def octave(number: int) -> int:
    """0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, and so on."""
    return number.bit_length()


def size_of(prompt: Prompt) -> int:
    """Characters of a prompt's texts; its images are none."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, tuple):
        return sum(map(len, prompt))
    contents = [message.get("content") for message in prompt]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return sum(len(text) for text in contents + texts if isinstance(text, str))


def held_size(prompt: object) -> int:
    """Characters of all that a prompt holds: images in it and calls of tools, too."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, dict):
        return sum(map(held_size, prompt.values()))
    return sum(map(held_size, prompt)) if isinstance(prompt, list | tuple) else 0


def mean_lengths(seen: Iterable[tuple[int | None, int | None]]) -> dict[int, float]:
    """Summarize earlier answers for `Lengths.means`.

    Args:
        seen: Prompt tokens and output tokens of each answer; None where there is none.
    """
    sums: dict[int, list[int]] = {}
    for num_prompt, num_output in seen:
        if num_prompt is not None and num_output is not None:
            entry = sums.setdefault(octave(num_prompt), [0, 0])
            entry[0] += 1
            entry[1] += num_output
    return {key: total / num for key, (num, total) in sums.items() if num >= MIN_SEEN}


class Reach(NamedTuple):
    """How much is held in memory, and how much of it is sorted at a time."""

    held_rows: int = 32_768
    held_bytes: int = 64 << 20
    run_rows: int = 4096
    run_bytes: int = 16 << 20


class Seen(NamedTuple):
    """What is kept of a request to find out what is worth sorting by."""

    text: bytes
    num_expected: int


class Sorting(NamedTuple):
    """What requests are sorted by; nothing: they go as they come."""

    by_text: bool = False
    by_length: bool = False
    skip: int = 0
    """Bytes that all prompts share."""


class AdmissionOrder:
    """Takes requests as they are read, gives them in the order of admission.

    One thread at a time.
    """

    def __init__(self, mode: Mode, lengths: Lengths | None, reach: Reach | None = None) -> None:
        """Bind.

        Args:
            mode: `auto`: by what pays; `prefix`: by text in any case.
            lengths: What to expect of answers; None: nothing, so that the long are not first.
            reach: Bounds of what is held in memory.
        """
        self._mode = mode
        self._lengths = lengths
        self._reach = reach or Reach()
        self._sample: list[Seen] = []
        self._sorting: Sorting | None = None
        self._new: list[Request] = []
        self._new_bytes = 0
        self._pinned_bytes = 0  # Of the batches that `_new` was read in.
        self._runs = SortedRuns()

    @property
    def num_held(self) -> int:
        """Requests put and not yet taken."""
        return len(self._new) + self._runs.num_rows

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to sort by, and nothing held: requests need not come here."""
        return self._sorting == Sorting() and not self.num_held

    @property
    def is_full(self) -> bool:
        """Whether requests must be taken before more are put."""
        if self._sorting is None:
            return False
        if self._sorting == Sorting():
            return bool(self._new)
        num_bytes = self._new_bytes + self._runs.num_bytes
        return self.num_held >= self._reach.held_rows or num_bytes >= self._reach.held_bytes

    def put(self, requests: Sequence[Request]) -> None:
        """Hand over requests of one batch, in the order read."""
        if not requests:
            return
        self._new += requests
        self._new_bytes += held_bytes(requests)
        self._pinned_bytes += requests[0].batch.carried.nbytes
        if self._pinned_bytes >= self._reach.held_bytes:
            # A few rows of many batches: copies of these rows are less than all batches.
            self._new, self._pinned_bytes = loose(self._new), 0
        if self._sorting is None:
            self._look(requests)
        if self._sorting is None or self._sorting == Sorting():
            return
        reach = self._reach
        if len(self._new) >= reach.run_rows or self._new_bytes >= reach.run_bytes:
            self._seal(self._sorting)

    def take(self) -> list[Request]:
        """Return the next requests, up to a thousand or 16 MiB or so; none only if none is held."""
        # Before the whole sample is seen, which may be all there is, by what there is of it.
        sorting = self._sorting or find_sorting(self._sample, self._mode)
        if sorting == Sorting() and self._new:
            taken, self._new = self._new, []
            self._new_bytes = self._pinned_bytes = 0
            return taken
        if self._new:
            self._seal(sorting)
        return self._runs.pop(TAKE_ROWS, TAKE_BYTES)

    def close(self) -> None:
        """Drop what is held. Idempotent."""
        self._new.clear()
        self._sample.clear()
        self._runs.close()

    def _look(self, requests: Sequence[Request]) -> None:
        for request in requests[: SAMPLE_ROWS - len(self._sample)]:
            num = _expected(request, self._lengths)
            self._sample.append(Seen(text_of(request)[:SAMPLE_BYTES], num))
        if len(self._sample) == SAMPLE_ROWS or self._new_bytes >= self._reach.held_bytes:
            self._sorting = find_sorting(self._sample, self._mode)
            self._sample.clear()

    def _seal(self, sorting: Sorting) -> None:
        rows, share = self._new, self._new_bytes // len(self._new)
        self._new, self._new_bytes, self._pinned_bytes = [], 0, 0
        self._runs.add([_keyed(request, sorting, self._lengths, share) for request in rows])


def find_sorting(sample: Sequence[Seen], mode: Mode) -> Sorting:
    """Find out what is worth sorting by, from the first requests of a job."""
    octaves = {octave(seen.num_expected) for seen in sample}
    by_length = bool(octaves) and max(octaves) - min(octaves) >= MIN_OCTAVES
    texts = sorted(seen.text for seen in sample)
    skip = common_prefix(texts[0], texts[-1]) if len(texts) > 1 else 0
    shares = [common_prefix(a, b) - skip for a, b in pairwise(texts)]
    shared = sum(shares) / max(1, len(texts))
    by_text = mode == "prefix" or shared >= MIN_SHARED
    return Sorting(by_text, by_length, skip) if by_text or by_length else Sorting()


def text_of(request: Request) -> bytes:
    """A prompt as bytes that sort like its text."""
    prompt = request.prompt
    return prompt.encode() if isinstance(prompt, str) else orjson.dumps(prompt)


def common_prefix(a: bytes, b: bytes) -> int:
    """How many bytes two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _expected(request: Request, lengths: Lengths | None) -> int:
    return lengths.expect(request.prompt, request.params) or 0 if lengths is not None else 0


def _keyed(request: Request, sorting: Sorting, lengths: Lengths | None, num_bytes: int) -> Keyed:
    rank, key = 0, b""
    if sorting.by_length:
        # Within an octave any order will do.
        rank = -octave(_expected(request, lengths))
    if sorting.by_text:
        key = text_of(request)[sorting.skip : sorting.skip + KEY_BYTES]
    return Keyed(rank, key, request.request_id, num_bytes, request)


def held_bytes(requests: Sequence[Request]) -> int:
    """About how much memory they take: twice their prompts, for the key, and their columns."""
    prompts = sum(held_size(request.prompt) for request in requests)
    return 2 * prompts + carried_bytes(requests)


def carried_bytes(requests: Sequence[Request]) -> int:
    """Memory of their columns, as shares of the batches that these are in."""
    total, last, share = 0.0, None, 0.0
    for request in requests:
        batch = request.batch.carried
        if batch is not last:
            last, share = batch, batch.nbytes / max(1, batch.num_rows)
        total += share
    return int(total)


class Keyed(NamedTuple):
    """A request with what it is sorted by; compared in the order of the fields."""

    rank: int
    text: bytes
    request_id: int
    num_bytes: int
    request: Request


class SortedRuns:
    """Requests in order. One thread at a time."""

    def __init__(self) -> None:
        """Start empty."""
        self._heads: list[tuple[Keyed, Iterator[Keyed]]] = []
        """The first row of each run, and what follows it."""
        self.num_rows = 0
        self.num_bytes = 0

    def add(self, rows: Sequence[Keyed]) -> None:
        """Add a run; any order."""
        if not rows:
            return
        self.num_rows += len(rows)
        self.num_bytes += sum(row.num_bytes for row in rows)
        self._open(sorted(rows))
        if len(self._heads) > MAX_RUNS:
            heads, self._heads = self._heads, []
            self._open(heapq.merge(*(itertools.chain([head], run) for head, run in heads)))

    def pop(self, num: int, max_bytes: float = math.inf) -> list[Request]:
        """Take the first `num` in order, or all that are left; fewer once they pass `max_bytes`."""
        taken: list[Request] = []
        num_bytes = 0
        while self._heads and len(taken) < num and num_bytes < max_bytes:
            first, run = self._heads[0]
            taken.append(first.request)
            num_bytes += first.num_bytes
            if (following := next(run, None)) is None:
                heapq.heappop(self._heads)
            else:
                heapq.heapreplace(self._heads, (following, run))
        self.num_rows -= len(taken)
        self.num_bytes -= num_bytes
        return taken

    def close(self) -> None:
        """Drop everything. Idempotent."""
        self._heads.clear()
        self.num_rows = self.num_bytes = 0

    def _open(self, ordered: Iterable[Keyed]) -> None:
        run = _in_chunks(deque(chunks_of(ordered)))
        heapq.heappush(self._heads, (next(run), run))


def _in_chunks(held: deque[list[Keyed]]) -> Iterator[Keyed]:
    """Yield rows, letting go of each chunk once it is begun."""
    while held:
        yield from held.popleft()


def chunks_of(rows: Iterable[Keyed]) -> Iterator[list[Keyed]]:
    """Rows in order, some at a time, with columns of their own."""
    chunk: list[Keyed] = []
    num_bytes = 0
    for row in rows:
        chunk.append(row)
        num_bytes += row.num_bytes
        if len(chunk) == CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
            yield _loose(chunk)
            chunk, num_bytes = [], 0
    if chunk:
        yield _loose(chunk)


def _loose(rows: Sequence[Keyed]) -> list[Keyed]:
    requests = loose([row.request for row in rows])
    return [row._replace(request=request) for row, request in zip(rows, requests, strict=True)]


def loose(requests: Sequence[Request]) -> list[Request]:
    """The same requests with columns of their own, shared by nobody else."""
    carried = requests[0].batch.carried
    if carried.num_columns:
        places = [(request.batch.carried, request.index) for request in requests]
        columns = gather_rows(places, carried.schema.names)
        table = pa.Table.from_arrays(columns, schema=carried.schema)
        (carried,) = table.combine_chunks().to_batches()
    batch = RowBatch(0, (), (), carried, {}, Ranges())
    return [request._replace(batch=batch, index=at) for at, request in enumerate(requests)]
