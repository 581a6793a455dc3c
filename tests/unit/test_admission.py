"""The order of admission: what is worth sorting by, sorted runs."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchgen.core.records import Ordinal, Ranges, Request, RowBatch
from batchgen.engine import order as orders
from batchgen.engine.order import (
    CHUNK_ROWS,
    MAX_RUNS,
    AdmissionOrder,
    Keyed,
    Lengths,
    Reach,
    Seen,
    SortedRuns,
    Sorting,
    find_sorting,
    mean_lengths,
    octave,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchgen.core.records import Prompt

NOTHING = Lengths()


def requests(prompts: Iterable[Prompt], start: int = 0, **fields: Any) -> list[Request]:
    """One batch of requests whose carried column `n` is their number."""
    made = list(prompts)
    numbers = list(range(start, start + len(made)))
    carried = pa.record_batch({"n": numbers, "": [f"row {n}" for n in numbers]})
    batch = RowBatch(0, numbers, (), carried, {}, Ranges())
    return [
        Request(n, Ordinal(0, n), prompt, f"{n:032x}", n, batch, at, **fields)
        for at, (n, prompt) in enumerate(zip(numbers, made, strict=True))
    ]


def found(given: Sequence[Request], lengths: Lengths = NOTHING) -> Sorting:
    """What these requests would be sorted by."""
    expected = [lengths.expect(request.prompt, request.params) or 0 for request in given]
    texts = [orders.text_of(request) for request in given]
    return find_sorting([Seen(*seen) for seen in zip(texts, expected, strict=True)], "auto")


def all_of(order: AdmissionOrder) -> list[Request]:
    taken: list[Request] = []
    while more := order.take():
        taken += more
    return taken


def check_whole(taken: Sequence[Request], given: Sequence[Request]) -> None:
    """Every request once, with its own columns and everything else that it had."""
    by_id = {request.request_id: request for request in taken}
    assert len(by_id) == len(taken) == len(given)
    for before in given:
        after = by_id[before.request_id]
        for name in ("ordinal", "prompt", "request_key", "seed", "params", "lora", "attempt"):
            assert getattr(after, name) == getattr(before, name)
        row = after.batch.carried.slice(after.index, 1).to_pylist()[0]
        assert row == before.batch.carried.slice(before.index, 1).to_pylist()[0]


def grouped(num_groups: int, num_rows: int, shared: int = 600) -> list[Prompt]:
    """Prompts with a common beginning, whose groups have one each, interleaved."""
    heads = [f"{group} " * (shared // 2) for group in range(num_groups)]
    return [f"All alike. {heads[n % num_groups]} row {n}" for n in range(num_rows)]


def chats(texts: Iterable[str]) -> list[Prompt]:
    head = {"role": "system", "content": "Be brief."}
    return [[head, {"role": "user", "content": text}] for text in texts]


def test_unlike_prompts_with_one_bound_are_not_sorted():
    prompts = chats(f"{random.Random(n).random()} question" for n in range(500))
    assert found(requests(prompts), Lengths(256)) == Sorting()


def test_prompts_that_share_more_than_all_do_are_sorted_by_what_follows():
    for prompts in (grouped(10, 500), chats(map(str, grouped(10, 500)))):
        sorting = found(requests(prompts))
        assert sorting.by_text
        assert not sorting.by_length
        text = orders.text_of(requests(prompts)[0])
        assert b"All alike. " in text[: sorting.skip]


def test_bounds_that_differ_by_two_octaves_sort_by_length():
    given = requests(["a"] * 4, params={"max_tokens": 10})
    assert not found(given).by_length
    given += requests(["a"], params={"max_tokens": 17})
    assert not found(given).by_length
    given += requests(["a"], params={"max_tokens": 40})
    assert found(given).by_length


def test_what_earlier_answers_say_is_believed_up_to_the_bound():
    means = mean_lengths([(100, 50)] * 8 + [(5000, 900)] * 8 + [(9, 1)] * 7 + [(None, 5)] * 9)
    lengths = Lengths(600, means=means)
    assert lengths.expect("x" * 400, None) == 50
    assert lengths.expect("x" * 20_000, None) == 600
    assert lengths.expect("x" * 20_000, {"max_tokens": 7}) == 7
    assert lengths.expect("x" * 36, None) == 600, "seven answers are too few"
    assert lengths.expect("x" * 400, {"ignore_eos": True}) == 600
    assert Lengths(300, is_exact=True, means=means).expect("x" * 400, None) == 300
    assert Lengths().expect("x" * 400, None) is None


def test_groups_come_together_and_all_come():
    given = requests(grouped(10, 3000))
    order = AdmissionOrder("auto", NOTHING)
    order.put(given)
    taken = all_of(order)
    check_whole(taken, given)
    seen = [request.ordinal.row % 10 for request in taken]
    assert sum(a != b for a, b in pairwise(seen)) == 9


def test_long_answers_come_first_and_equal_ones_in_their_order():
    given = [
        request
        for n in range(0, 3000, 3)
        for bound, start in ((4000, n), (20, n + 1), (300, n + 2))
        for request in requests(["a"], start, params={"max_tokens": bound})
    ]
    order = AdmissionOrder("auto", NOTHING)
    order.put(given)
    taken = all_of(order)
    check_whole(taken, given)
    bounds = [(request.params or {})["max_tokens"] for request in taken]
    assert bounds == [4000] * 1000 + [300] * 1000 + [20] * 1000
    rows = [request.ordinal.row for request in taken]
    assert rows == sorted(rows, key=lambda row: row % 3 if row % 3 != 1 else 3)


def test_where_nothing_pays_requests_pass_untouched():
    given = requests(f"{random.Random(n).random()}" for n in range(5000))
    order = AdmissionOrder("auto", Lengths(16))
    order.put(given[:4000])
    assert order.is_full
    assert order.take() == given[:4000]
    assert order.is_plain


def test_an_engine_that_waits_gets_what_there_is_and_nothing_is_lost():
    given = requests(grouped(7, 4000))
    order = AdmissionOrder("auto", NOTHING)
    taken: list[Request] = []
    for at in range(0, 4000, 50):
        order.put(given[at : at + 50])
        if at % 200 == 0:
            taken += order.take()
    check_whole(taken + all_of(order), given)


def test_the_look_ahead_is_bounded():
    order = AdmissionOrder("auto", NOTHING, Reach(held_rows=5000))
    given = requests(grouped(50, 6000))
    order.put(given[:4900])
    assert not order.is_full
    order.put(given[4900:])
    assert order.is_full
    while order.is_full:
        order.take()
    assert order.num_held < 5000


def test_by_text_in_any_case_needs_nothing_that_pays():
    prompts = [f"{random.Random(n).random()} question" for n in range(3000)]
    order = AdmissionOrder("prefix", NOTHING)
    for at in range(0, 3000, 500):
        order.put(requests(prompts[at : at + 500], at))
    taken = all_of(order)
    check_whole(taken, requests(prompts))
    assert [request.prompt for request in taken] == sorted(prompts)


def keyed(given: Sequence[Request]) -> list[Keyed]:
    return [Keyed(0, b"", request.request_id, 100, request) for request in given]


def test_rows_that_wait_do_not_hold_the_memory_of_those_that_are_gone():
    runs = SortedRuns()
    for start in range(0, 200 * CHUNK_ROWS, CHUNK_ROWS):
        given = keyed(requests(["x"] * CHUNK_ROWS, start))
        # The last row of each run goes last.
        runs.add([*given[:-1], given[-1]._replace(rank=1)])
        runs.pop(CHUNK_ROWS - 1)
    left = runs.pop(10_000)
    assert [request.ordinal.row for request in left] == list(
        range(CHUNK_ROWS - 1, 200 * CHUNK_ROWS, CHUNK_ROWS)
    )
    batches = {id(request.batch.carried): request.batch.carried for request in left}
    assert sum(batch.num_rows for batch in batches.values()) <= MAX_RUNS * CHUNK_ROWS + 200
    assert (runs.num_rows, runs.num_bytes) == (0, 0)


def pinned_bytes(held: Iterable[Request]) -> int:
    batches = {id(request.batch.carried): request.batch.carried for request in held}
    return sum(batch.nbytes for batch in batches.values())


def test_a_few_rows_of_many_batches_do_not_hold_them_all():
    reach = Reach(held_bytes=1 << 20)
    order = AdmissionOrder("auto", Lengths(16), reach)
    first: list[Request] = []
    for start in range(0, 400_000, 400):
        read = requests(("x" for _ in range(400)), start)
        order.put(read[:1])
        first += read[:1]
    assert pinned_bytes(first) > 8 << 20
    taken = all_of(order)
    check_whole(taken, first)
    assert pinned_bytes(taken) < 2 << 20


def test_many_runs_come_in_order():
    runs, numbers = SortedRuns(), list(range(400))
    random.Random(2).shuffle(numbers)
    for at in range(0, 400, 2):
        runs.add(keyed([requests(["x"], n)[0] for n in numbers[at : at + 2]]))
    assert [request.ordinal.row for request in runs.pop(1000)] == list(range(400))


def test_rows_without_columns_are_sorted_too():
    bare = pa.RecordBatch.from_struct_array(pa.array([{}] * 3, pa.struct([])))
    batch = RowBatch(0, (0, 1, 2), (), bare, {}, Ranges())
    given = [Request(n, Ordinal(0, n), "p", "k", None, batch, n) for n in range(3)]
    runs = SortedRuns()
    runs.add(keyed(given)[::-1])
    assert [request.ordinal.row for request in runs.pop(9)] == [0, 1, 2]


def parts(text: str, image: str) -> Prompt:
    """A chat with an image, as OpenAI's API has it."""
    shown = {"type": "image_url", "image_url": {"url": image}}
    return [{"role": "user", "content": [shown, {"type": "text", "text": text}]}]


def test_what_is_in_parts_counts_against_the_bound():
    order = AdmissionOrder("auto", NOTHING, Reach(held_bytes=1 << 20, run_rows=10))
    given = requests(parts(f"{n}", f"data:{'x' * 100_000}") for n in range(30))
    for at in range(0, 30, 10):
        order.put(given[at : at + 10])
    assert order.is_full
    check_whole(all_of(order), given)


def test_of_an_image_no_answer_gets_longer():
    lengths = Lengths(600, means={octave(100): 50.0})
    assert lengths.expect(parts("x" * 400, "data:" + "y" * 100_000), None) == 50


def test_what_is_taken_at_a_time_is_bounded_too():
    given = requests(f"{n:04} {'x' * 1_000_000}" for n in range(40))
    order = AdmissionOrder("prefix", NOTHING, Reach(held_bytes=2 << 20, run_rows=4))
    for at in range(0, 40, 4):
        order.put(given[at : at + 4])
    first = order.take()
    assert 0 < len(first) < 12
    check_whole(first + all_of(order), given)


def test_without_lengths_the_long_are_not_first_and_like_prompts_come_together():
    given = [
        request
        for n, prompt in enumerate(grouped(10, 3000))
        for request in requests([prompt], n, params={"max_tokens": 4000 if n == 2999 else 4})
    ]
    order = AdmissionOrder("auto", None)
    order.put(given)
    seen = [request.ordinal.row % 10 for request in all_of(order)]
    assert sum(a != b for a, b in pairwise(seen)) == 9
