"""Who has which rows: by property against a plain model, and the search for rows that kill."""

from __future__ import annotations

import random
import time
import weakref

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from batchgen.cluster.leases import FEW_DEATHS, FEW_SUSPECTS, PIECES, SOLO_DEATHS, LeaseBook
from batchgen.core.errors import AccountingError
from batchgen.core.records import Ranges

TODO = {0: Ranges([(0, 7), (9, 30)]), 2: Ranges([(5, 6), (8, 12)])}
WORKERS = st.integers(0, 3)


class Payload:
    """Something that can be watched."""


def rows_of(mapping):
    return {(segment, row) for segment, rows in mapping.items() for row in rows}


def mapping_of(rows):
    return {s: Ranges.of(r for t, r in rows if t == s) for s in {s for s, _ in rows}}


class Books(RuleBasedStateMachine):
    """Calls in any order; `where` says for every row: free, a worker, settled or guilty."""

    def __init__(self):
        super().__init__()
        self.book = LeaseBook(TODO)
        self.where = dict.fromkeys(rows_of(TODO), "free")
        self.payloads = {}
        self.dead_with = {}
        self.leased = {}

    def held(self, worker):
        return {row for row, place in self.where.items() if place == worker}

    @rule(num=st.integers(1, 8))
    def add(self, num):
        rows = {(9, len(self.payloads) + n) for n in range(num)}
        payload = Payload()
        self.book.add(mapping_of(rows), payload)
        self.where.update(dict.fromkeys(rows, "free"))
        self.payloads.update(dict.fromkeys(rows, payload))

    @rule(worker=WORKERS, num=st.integers(0, 12))
    def take(self, worker, num):
        was_alone, before = self.book.is_alone(worker), self.held(worker)
        lease = self.book.take(worker, num)
        if lease is None:
            assert num == 0 or before or not self.book.num_pending
            return
        rows = rows_of(lease.rows)
        assert rows
        assert {self.where[row] for row in rows} == {"free"}
        assert {id(self.payloads.get(row)) for row in rows} == {id(lease.payload)}
        assert not was_alone
        if self.book.is_alone(worker):  # Then it has nothing else.
            assert not before
            assert len(rows) == 1
        self.leased[worker] = len(rows) + (self.leased[worker] if before else 0)
        self.where.update(dict.fromkeys(rows, worker))

    @rule(worker=WORKERS, data=st.data())
    def settle(self, worker, data):
        rows = data.draw(st.sets(st.sampled_from(sorted(self.where)), max_size=40))
        mine = rows & self.held(worker)
        strays = self.book.settle(worker, mapping_of(rows))
        assert rows_of(strays) == rows - mine
        self.where.update(dict.fromkeys(mine, "settled"))

    @rule(worker=WORKERS)
    def settle_all(self, worker):
        rows = self.held(worker)
        assert not self.book.settle(worker, mapping_of(rows))
        self.where.update(dict.fromkeys(rows, "settled"))

    @rule(worker=WORKERS, has_died=st.booleans())
    def take_back(self, worker, has_died):
        rows, was_alone = self.held(worker), self.leased.get(worker) == 1
        free = rows_of(self.book.take_back(worker, has_died=has_died))
        assert free <= rows
        self.where.update(dict.fromkeys(rows, "free"))
        self.where.update(dict.fromkeys(rows - free, "guilty"))
        if has_died and was_alone:
            self.dead_with.update({row: self.dead_with.get(row, 0) + 1 for row in rows})
        for row in rows - free:
            assert rows == {row}
            assert self.dead_with[row] >= SOLO_DEATHS

    @rule()
    def guilty(self):
        told = [row for rows in self.book.guilty() for row in rows_of(rows)]
        assert len(told) == len(set(told))
        assert set(told) == {row for row, place in self.where.items() if place == "guilty"}
        self.where.update(dict.fromkeys(told, "settled"))

    @invariant()
    def figures_agree(self):
        places = list(self.where.values())
        assert self.book.num_pending == places.count("free")
        assert [self.book.rows_out(n).num_rows for n in range(4)] == [
            places.count(n) for n in range(4)
        ]
        assert not self.book.is_through

    def teardown(self):
        """Whatever happened, the rest can be worked off."""
        for worker in range(4):
            self.settle_all(worker)
        while (lease := self.book.take(1, 5)) is not None:
            rows = rows_of(lease.rows)
            assert {self.where[row] for row in rows} == {"free"}
            self.where.update(dict.fromkeys(rows, 1))
            self.settle_all(1)
        self.guilty()
        assert set(self.where.values()) == {"settled"}
        self.book.is_fed = True
        assert self.book.is_through


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def taken(book, worker, num):
    lease = book.take(worker, num)
    return sorted(rows_of(lease.rows)) if lease else None


def test_rows_go_out_in_order_returned_ones_first_then_packed_ones():
    book = LeaseBook({1: Ranges([(0, 2)]), 0: Ranges([(4, 6), (8, 10)])})
    assert taken(book, 1, 3) == [(0, 4), (0, 5), (0, 8)]
    book.add({7: Ranges.until(5)}, "a")
    book.add({7: Ranges([(5, 6)])}, "b")
    book.take_back(1, has_died=False)
    assert taken(book, 2, 2) == [(0, 4), (0, 5)]
    assert taken(book, 2, 2) == [(0, 8)]
    assert taken(book, 2, 3) == [(7, 0), (7, 1), (7, 2)]
    assert taken(book, 2, 3) == [(7, 3), (7, 4)]  # Another payload begins.
    assert taken(book, 2, 3) == [(7, 5)]
    assert taken(book, 2, 9) == [(0, 9), (1, 0), (1, 1)]
    assert taken(book, 2, 9) is None


def test_rows_settle_in_any_order_across_leases_and_strays_are_told():
    book = LeaseBook({0: Ranges([(0, 10), (20, 30)]), 1: Ranges.until(5)})
    for _ in range(5):
        book.take(1, 5)
    assert book.settle(1, {0: Ranges([(3, 7), (28, 40)])}) == {0: Ranges([(30, 40)])}
    assert book.rows_out(1).num_rows == 19
    assert book.settle(1, {0: Ranges([(2, 5), (9, 22)])}) == {0: Ranges([(3, 5), (10, 20)])}
    assert book.rows_out(1).num_rows == 15
    assert book.settle(2, {1: Ranges.until(2)}) == {1: Ranges.until(2)}
    assert book.settle(1, {1: Ranges.until(5), 7: Ranges.until(1)}) == {7: Ranges.until(1)}
    assert book.take_back(1, has_died=False) == {
        0: Ranges([(0, 2), (7, 9), (22, 28)]),
    }
    assert book.settle(1, {0: Ranges.until(1)}) == {0: Ranges.until(1)}


def test_a_lease_holds_rows_of_one_history():
    book = LeaseBook({0: Ranges.until(20)})
    book.take(1, 5)
    book.take(2, 5)
    book.take_back(2, has_died=False)  # Fresh ones come back behind doubtful ones.
    book.take_back(1, has_died=True)
    leases = [taken(book, 5, 7), taken(book, 5, 7)]
    assert sorted(map(len, leases)) == [5, 5]


def test_a_payload_is_let_go_with_its_last_row():
    book, payload = LeaseBook({}), Payload()
    watch = weakref.ref(payload)
    book.add({0: Ranges.until(4)}, payload)
    del payload
    book.take(1, 2)
    book.take(2, 2)
    book.settle(1, {0: Ranges.until(2)})
    book.take_back(2, has_died=True)
    book.take(3, 9)
    book.settle(3, {0: Ranges([(2, 3)])})
    assert watch() is not None
    book.settle(3, {0: Ranges([(3, 4)])})
    assert watch() is None


def test_nothing_is_added_after_the_end():
    book = LeaseBook({})
    assert not book.is_through
    book.is_fed = True
    assert book.is_through
    with pytest.raises(AccountingError, match="3 rows were added"):
        book.add({0: Ranges.until(3)}, None)


def test_after_one_death_rows_go_out_again_as_any_rows():
    book = LeaseBook({0: Ranges.until(100)})
    book.take(1, 80)
    assert book.take_back(1, has_died=True) == {0: Ranges.until(80)}
    assert len(taken(book, 2, 50)) == 50
    assert len(taken(book, 2, 50)) == 30
    assert len(taken(book, 2, 50)) == 20


def test_rows_taken_back_from_the_living_are_never_suspects():
    book = LeaseBook({0: Ranges.until(10)})
    for worker in range(5):
        assert len(taken(book, worker, 10)) == 10
        assert not book.is_alone(worker)
        book.take_back(worker, has_died=False)


def dead(num, times=2):
    """Some rows that were in so many deaths, and as many fresh ones, or 100."""
    book = LeaseBook({0: Ranges.until(num + max(num, 100))})
    for worker in range(100, 100 + times):
        book.take(worker, num)
        book.take_back(worker, has_died=True)
    return book


def test_of_the_suspects_a_worker_gets_a_part_at_a_time_among_other_rows():
    book = dead(1600)
    assert taken(book, 1, 999) == [(0, row) for row in range(1600 // PIECES)]
    assert not book.is_alone(1)
    assert taken(book, 1, 7) == [(0, row) for row in range(1600, 1607)]
    assert taken(book, 2, 999) == [(0, row) for row in range(100, 200)]
    book.settle(1, {0: Ranges.until(99)})
    assert taken(book, 1, 1) == [(0, 1607)]
    book.settle(1, {0: Ranges([(99, 100)])})
    assert taken(book, 1, 1)[0] == (0, 200)


def test_of_few_suspects_a_worker_gets_more_than_one():
    book = dead(20)
    sizes = [len(taken(book, worker, 1)) for worker in range(4)]
    assert sizes == [FEW_SUSPECTS, FEW_SUSPECTS, 4, 1]


def test_a_part_that_a_worker_dies_with_is_cut_again_and_goes_first():
    book = dead(1600)
    book.take(1, 1)
    book.take_back(1, has_died=True)
    assert taken(book, 2, 1) == [(0, row) for row in range(FEW_SUSPECTS)]
    book.take_back(2, has_died=False)  # It was sent away: no more is known.
    assert taken(book, 3, 1) == [(0, row) for row in range(FEW_SUSPECTS)]
    book.take_back(3, has_died=True)
    assert taken(book, 4, 1) == [(0, 0)]
    assert book.is_alone(4)


def test_a_single_suspect_waits_for_a_worker_that_is_up_and_holds_nothing():
    book = dead(2)
    book.take(1, 1)
    book.take(2, 5)
    book.take_back(1, has_died=True)
    assert len(taken(book, 2, 5)) == 5  # Who has other rows gets more of them.
    lease = book.take(3, 5, is_up=False)
    assert not book.is_alone(3)
    assert len(lease.rows[0]) == 5
    assert taken(book, 4, 5) == [(0, 0)]
    assert book.is_alone(4)
    assert book.take(4, 5) is None


def test_a_row_is_guilty_after_two_deaths_alone_and_told_once():
    book = LeaseBook({0: Ranges.until(1)})
    book.is_fed = True
    for worker in range(2 + SOLO_DEATHS):
        assert not book.guilty()
        assert taken(book, worker, 1) == [(0, 0)]
        book.take_back(worker, has_died=True)
    assert book.num_pending == 0
    assert not book.is_through
    assert book.guilty() == [{0: Ranges.until(1)}]
    assert not book.guilty()
    assert book.is_through


def test_a_death_alone_counts_only_if_the_worker_died():
    book = dead(1)
    for worker in range(2, 9):
        assert taken(book, worker, 1) == [(0, 0)]
        assert not book.guilty()
        book.take_back(worker, has_died=worker == 2)
    book.take(9, 1)
    book.take_back(9, has_died=True)
    assert len(book.guilty()) == 1


def test_the_last_of_a_lease_did_not_die_alone():
    book = dead(2)
    book.take(2, 1)
    book.settle(2, {0: Ranges([(0, 1)])})
    book.take_back(2, has_died=True)
    for worker in range(3, 3 + SOLO_DEATHS):
        assert not book.guilty()
        assert taken(book, worker, 1) == [(0, 1)]
        book.take_back(worker, has_died=True)
    assert book.guilty() == [{0: Ranges([(1, 2)])}]


@pytest.mark.parametrize(("num_others", "more"), [(0, 0), (FEW_DEATHS, 1), (2 * FEW_DEATHS, 2)])
def test_where_workers_die_all_the_time_it_takes_more_deaths(num_others, more):
    book = LeaseBook({0: Ranges.until(1000)})
    for worker in range(1000, 1000 + num_others):
        book.take(worker, 1)
        book.take_back(worker, has_died=True)
        book.settle(worker, {0: Ranges.until(0)})
        lease = book.take(worker, 1)
        book.settle(worker, lease.rows)
    row = taken(book, 0, 1)
    for worker in range(2 + SOLO_DEATHS + 3 * more):
        assert not book.guilty()
        book.take_back(worker, has_died=True)
        taken(book, worker + 1, 1)
    assert [sorted(rows_of(rows)) for rows in book.guilty()] == [row]


def search(num, killers, num_workers):
    """Work off `num` rows; a worker dies of a killer at once. Returns the deaths, the guilty."""
    book, deaths, told, names = LeaseBook({0: Ranges.until(num)}), 0, [], num_workers
    book.is_fed = True
    workers = list(range(num_workers))
    while not book.is_through:
        for at, worker in enumerate(workers):
            while book.take(worker, 5 * num) is not None:
                pass
            held = book.rows_out(worker)
            if any(row in held.get(0, ()) for row in killers):
                book.take_back(worker, has_died=True)
                workers[at] = names = names + 1
                deaths += 1
            else:
                book.settle(worker, held)
            told += [row for rows in book.guilty() for _, row in rows_of(rows)]
    return deaths, told


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize(("num", "most"), [(1, 6), (16, 6), (1000, 6), (100_000, 8)])
def test_one_killer_is_found_in_few_deaths(num, most, num_workers):
    for killer in {0, num // 3, num - 1}:
        deaths, told = search(num, {killer}, num_workers)
        assert told == [killer]
        assert deaths <= most


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("killers", [{5, 6}, {0, 99_999}, {31, 70_000}])
def test_two_killers_are_found_in_few_deaths(killers, num_workers):
    deaths, told = search(100_000, killers, num_workers)
    assert sorted(told) == sorted(killers)
    assert deaths <= 14


def test_scattered_commits_are_cheap():
    num = 200_000
    book, rows = LeaseBook({0: Ranges.until(num)}), list(range(num))
    while book.take(1, 50_000) is not None:
        pass
    random.Random(7).shuffle(rows)
    commits = [{0: Ranges.of(rows[at : at + 20_000])} for at in range(0, num, 20_000)]
    started = time.process_time()
    for commit in commits:
        assert not book.settle(1, commit)
    assert time.process_time() - started < 2  # 0.1 s here; with a set of rows a block, minutes.
    assert book.rows_out(1).num_rows == 0


def test_what_is_withdrawn_is_free_no_more_and_may_come_again_packed():
    book = LeaseBook({0: Ranges.until(100), 1: Ranges.until(10)})
    book.is_fed = True
    lease = book.take(1, 30)
    book.take(2, 5)
    book.take_back(2, has_died=True)
    book.is_fed = False
    assert book.withdraw() == {0: Ranges([(30, 100)]), 1: Ranges.until(10)}
    assert book.num_pending == 0
    assert book.take(2, 10) is None
    book.add({0: Ranges([(30, 60)])}, "packed")
    assert book.take(2, 100).rows == {0: Ranges([(30, 60)])}
    assert book.rows_out(1) == lease.rows
    book.settle(1, {0: Ranges.until(10)})
    assert book.rows_out(1) == {0: Ranges([(10, 30)])}
    assert book.rows_out(7) == {}


def test_packed_rows_are_not_withdrawn():
    book = LeaseBook({})
    book.add({0: Ranges.until(4)}, "packed")
    assert book.withdraw() == {}
    assert book.num_pending == 4
