"""Commits of one run: under the lock, behind the fence, tried again while the disk recovers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from batchgen import __version__

if TYPE_CHECKING:
    from batchgen.core.records import EngineFacts
    from batchgen.pipeline.context import RunContext
    from batchgen.pipeline.stages import OpenPart
    from batchgen.pipeline.worker import Worker
    from batchgen.store.books import Epoch
    from batchgen.store.carry import Piece


class Commits:
    """Makes rows durable, in the committer's thread."""

    def __init__(self, context: RunContext, epoch: Epoch, worker: Worker) -> None:
        """Bind."""
        self._context = context
        self._epoch = epoch
        self._worker = worker
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
        self._worker.commit(part, facts)
        self._stats.num_committed += len(part.results)
        self._stats.num_committed += sum(len(rows) for rows in part.skipped.values())
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
        self._worker.commit_table(piece.table, piece.skipped, facts)
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
