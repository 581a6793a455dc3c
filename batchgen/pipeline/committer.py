"""Finished rows become durable beside the loop, in a thread.

A row's way here: open part -> `Committer`'s queue -> `Commits`, under the lock and behind the
fence -> `PartWriter`. No disk ever makes the engine wait: one that refuses (full, over quota, I/O
error) gets time to recover while the part stays in memory.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import pyarrow.compute as pc

from batchgen import __version__
from batchgen.core.errors import StorageError
from batchgen.core.ranges import RowSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchgen.core.records import EngineFacts, Result
    from batchgen.job.model import RunConfig
    from batchgen.pipeline.context import RunContext
    from batchgen.store.books import Epoch
    from batchgen.store.parts import PartWriter
    from batchgen.store.reuse import Piece

# Begin a commit a little early: a row is to be durable, not merely sent, within flush_s.
_FLUSH_EARLY = 0.8
_RETRY_FIRST_S, _RETRY_MOST_S = 0.1, 10.0

Work = TypeVar("Work")
"""What one commit makes durable."""


@dataclass(slots=True)
class OpenPart:
    """Finished rows that are not durable yet."""

    results: list[Result] = field(default_factory=list)
    skipped: RowSet = field(default_factory=RowSet)
    since_s: float | None = None
    num_bytes: float = 0.0

    def __bool__(self) -> bool:
        return self.since_s is not None

    def is_due(self, now_s: float, run: RunConfig) -> bool:
        """Whether it is time to commit."""
        return self.since_s is not None and (
            len(self.results) >= run.flush_rows
            or self.num_bytes >= run.flush_mib * 2**20
            or now_s - self.since_s >= run.flush_s * _FLUSH_EARLY
        )


class Committer(Generic[Work]):
    """Makes parts durable in a thread, so that no disk ever makes the engine wait.

    A disk in trouble (full, over quota, I/O error) gets time to recover: the part stays in
    memory and its commit is tried again, which is safe because a put is idempotent.
    """

    def __init__(
        self,
        commit: Callable[[Work], None],
        grace_s: float,
        on_retry: Callable[[StorageError], None],
    ) -> None:
        """Start the thread.

        Args:
            commit: Runs in the thread, one part at a time; may be repeated for the same part.
            grace_s: How long to go on trying a commit that the disk refuses.
            on_retry: Told of each refusal, in the thread.
        """
        self._commit = commit
        self._grace_s = grace_s
        self._on_retry = on_retry
        # One part waiting while one is written: more would only be memory.
        self._queue: queue.Queue[Work | None] = queue.Queue(1)
        self._error: BaseException | None = None
        self._give_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)
        self._thread.start()

    def put(self, part: Work, timeout_s: float | None) -> bool:
        """Hand a part over; False if another one was still waiting when the time was up.

        Raises:
            BatchgenError: What an earlier commit raised.
        """
        self.check()
        try:
            self._queue.put(part, timeout=timeout_s)
        except queue.Full:
            return False
        return True

    def check(self) -> None:
        """Raise what a commit raised, if any did."""
        if self._error is not None:
            raise self._error

    def hurry(self) -> None:
        """Grant a refusing disk no more time: what it does not take now is done again."""
        self._give_up.set()

    def close(self) -> None:
        """Wait until everything handed over is durable, or has failed.

        Raises:
            BatchgenError: What a commit raised.
        """
        self._queue.put(None)
        self._thread.join()
        self.check()

    def _work(self) -> None:
        while (part := self._queue.get()) is not None:
            if self._error is not None:
                continue  # Keep taking, so that nobody blocks on a committer that gave up.
            try:
                self._commit_patiently(part)
            except BaseException as error:  # noqa: BLE001 - raised again in the runner's thread
                self._error = error

    def _commit_patiently(self, part: Work) -> None:
        give_up_s = time.monotonic() + self._grace_s
        wait_s = _RETRY_FIRST_S
        while True:
            try:
                self._commit(part)
            except StorageError as error:
                if time.monotonic() + wait_s > give_up_s or self._give_up.wait(wait_s):
                    raise
                self._on_retry(error)
                wait_s = min(2 * wait_s, _RETRY_MOST_S)
            else:
                return


class Commits:
    """Makes rows of this process durable, in the committer's thread."""

    def __init__(self, context: RunContext, epoch: Epoch, writer: PartWriter) -> None:
        """Bind to the run's claim; `writer` numbers the parts."""
        self._context = context
        self._epoch = epoch
        self._writer = writer
        self._stats = context.stats

    def _check(self) -> None:
        self._context.lock.acquire(steal=True)  # A stolen lock is free once its holder is gone.
        self._context.ledger.check_fence(self._epoch)

    def computed(self, part: OpenPart, facts: EngineFacts | None) -> None:
        """Commit results of the engine.

        Raises:
            FencedError: Another run has taken over.
            StorageError: Not durable; may be tried again.
        """
        began_s = time.monotonic()
        self._check()
        self._writer.commit(part.results, part.skipped, footer_facts(facts))
        self._stats.num_committed += len(part.results)
        self._stats.num_committed += part.skipped.num_rows
        self._stats.num_parts += 1
        self._context.note_commit(time.monotonic() - began_s)

    def taken(self, piece: Piece) -> None:
        """Commit rows that another row or plan has had answered.

        Raises:
            FencedError: Another run has taken over.
            StorageError: Not durable; may be tried again.
        """
        if not piece.table.num_rows and not piece.skipped:
            return
        self._check()
        facts = {"batchgen": __version__, **({"engine": piece.engine} if piece.engine else {})}
        self._writer.commit_table(piece.table, piece.skipped, facts)
        self._stats.num_parts += 1
        self._count(piece)

    def _count(self, piece: Piece) -> None:
        taken = self._context.taken
        status = piece.table.column(f"{self._context.job.output.prefix}status")
        num_ok = pc.sum(pc.equal(status, "ok")).as_py() or 0
        num_skipped = sum(len(rows) for rows in piece.skipped.values())
        taken.num_ok += num_ok
        taken.num_errors += piece.table.num_rows - num_ok
        taken.num_skipped += num_skipped
        taken.num_rows += piece.table.num_rows + num_skipped
        self._stats.num_resumed += piece.table.num_rows + num_skipped


def footer_facts(facts: EngineFacts | None) -> dict[str, str]:
    """Who answered, for the footer of a part; `facts` is None where no engine was ever up."""
    if facts is None:
        return {"batchgen": __version__}
    return {
        "batchgen": __version__,
        "engine": facts.name,
        "version": facts.version,
        "device": facts.device,
    }
