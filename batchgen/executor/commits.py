"""Commits of one run: under the lock, behind the fence, tried again while the disk recovers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchgen import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.books import Epoch
    from batchgen.engine.base import Engine
    from batchgen.executor.lock import RunLock
    from batchgen.ledger import Ledger
    from batchgen.sink.carry import Piece
    from batchgen.sink.parts import PartWriter
    from batchgen.stages import OpenPart
    from batchgen.stats import RunStats


class Commits:
    """Makes rows durable, in the committer's thread."""

    def __init__(
        self, lock: RunLock, ledger: Ledger, epoch: Epoch, writer: PartWriter, stats: RunStats
    ) -> None:
        """Bind."""
        self._lock = lock
        self._ledger = ledger
        self._epoch = epoch
        self._writer = writer
        self._stats = stats

    def _check(self) -> None:
        self._lock.acquire(steal=True)  # A stolen lock is free once its holder is gone.
        self._ledger.check_fence(self._epoch)

    def computed(self, part: OpenPart, engine: Engine) -> None:
        """Commit results of the engine.

        Raises:
            FencedError: Another run has taken over.
            StorageError: Not durable; may be tried again.
        """
        self._check()
        self._writer.commit(part.results, part.skipped, engine_facts(engine))
        self._stats.num_committed += len(part.results)
        self._stats.num_committed += sum(len(rows) for rows in part.skipped.values())
        self._stats.num_parts += 1

    def carried(self, piece: Piece) -> None:
        """Commit rows of an earlier plan.

        Raises:
            FencedError: Another run has taken over.
            StorageError: Not durable; may be tried again.
        """
        self._check()
        facts = {"batchgen": __version__, **({"engine": piece.engine} if piece.engine else {})}
        self._writer.commit_table(piece.table, piece.skipped, facts)
        self._stats.num_parts += 1


def engine_facts(engine: Engine) -> Mapping[str, Any]:
    """Who answers, for the footers of parts."""
    facts = engine.facts
    if facts is None:
        return {"batchgen": __version__}
    return {
        "batchgen": __version__,
        "engine": facts.name,
        "version": facts.version,
        "device": facts.device,
    }
