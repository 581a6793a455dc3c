"""What of a task is durable: by the words of its workers and, once one is gone, by its files."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from batchgen.cluster.messages import Committed, Passing
from batchgen.core.errors import AccountingError, OutputError
from batchgen.core.ranges import Ranges
from batchgen.store.books import PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.cluster.board import Board
    from batchgen.cluster.leases import LeaseBook
    from batchgen.cluster.messages import Asked
    from batchgen.cluster.roster import Member
    from batchgen.store.books import Epoch, Part
    from batchgen.store.dedupe import Sieve
    from batchgen.store.ledger import Ledger

NO_ROWS = Ranges()
_LISTING_S, _LISTING_WAIT_S = 90.0, 0.5
_LATELY = 5000
"""Parts that some folder may not show yet: 256 workers commit so many in eight minutes."""


class Settling:
    """Settles the rows of one task in its lease book."""

    def __init__(
        self, epoch: Epoch, book: LeaseBook, board: Board, ledger: Ledger, sieve: Sieve | None
    ) -> None:
        """Bind."""
        self._epoch = epoch
        self._book = book
        self._board = board
        self._ledger = ledger
        self._sieve = sieve
        self._told: deque[str] = deque(maxlen=_LATELY)
        """Parts that count, the last ones."""

    def set_aside(self, member: Member, asked: Asked) -> Passing:
        """Say which requests are to be computed; the rows of the others wait for their answers."""
        assert self._sieve is not None  # noqa: S101 - else nobody asks
        passes = self._sieve.let_pass(asked.prefixes, asked.has_seed)
        member.passed.append((asked, passes))
        aside = [row for row, passed in zip(asked.rows, passes, strict=True) if not passed]
        if aside:
            member.num_set_aside += len(aside)
            self._book.settle(member.number, {asked.segment: Ranges.of(aside)})
        return Passing(asked.ask, passes)

    def commit(self, member: Member, committed: Committed) -> None:
        """A part is durable.

        Raises:
            AccountingError: It holds rows that the worker should not have.
        """
        self._told.append(committed.name)
        member.parts.add(committed.name)
        self._board.note_committed(member.number, committed)
        if self._book.settle(member.number, committed.done):
            msg = f"{committed.name}: holds rows that worker {member.number} was not given"
            raise AccountingError(msg)
        if self._sieve is not None:
            self._forget_answers(member)

    def _forget_answers(self, member: Member) -> None:
        """Those about rows that are settled: they will not be taken back."""
        left = self._book.rows_out(member.number)

        def matters(asked: Asked) -> bool:
            rows = left.get(asked.segment, NO_ROWS)
            return any(rows.within(min(asked.rows), max(asked.rows) + 1))

        member.passed = deque(one for one in member.passed if matters(one[0]))

    def close(self, member: Member, reason: str, *, has_died: bool) -> None:
        """A worker is given up: what it has committed counts, its other rows are free again.

        Raises:
            StorageError: It cannot be sealed yet: its rows stay where they are.
        """
        if member.is_begun:
            for part in self._sealed(member):
                footer = part.footer
                counts = (footer.num_ok, footer.num_errors, footer.num_skipped)
                self.commit(member, Committed(part.name, footer.done, *counts, 0.0))
        self._board.note_gone(member.number, reason)
        rows = self._book.take_back(member.number, has_died=has_died).rows
        if self._sieve is None:
            return
        for asked, passes in member.passed:
            mine = rows.get(asked.segment, NO_ROWS)
            those = zip(asked.rows, asked.prefixes, asked.has_seed, passes, strict=True)
            self._sieve.take_back(
                (prefix, seeded) for row, prefix, seeded, passed in those if passed and row in mine
            )

    def _sealed(self, member: Member) -> Sequence[Part]:
        """Seal a worker; parts of it that count and that it has not told of."""
        names = self._ledger.seal(self._epoch, member.number)
        return self._ledger.parts(self._epoch.plan, set(names) - member.parts).parts

    def await_parts(self) -> None:
        """Wait until the parts that workers have told of can be listed here.

        A network file system may show a folder as it was a while ago: NFS keeps its entries for
        up to 60 s (nfs(5), acdirmax).

        Raises:
            OutputError: One is not there.
        """
        storage, until_s = self._ledger.storage, time.monotonic() + _LISTING_S
        while missing := set(self._told) - set(storage.list(PARTS)):
            if time.monotonic() >= until_s:
                msg = f"{storage.where}: {min(missing)} was committed and is not there"
                raise OutputError(msg)
            time.sleep(_LISTING_WAIT_S)
