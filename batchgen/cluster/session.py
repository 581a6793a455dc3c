"""From a worker's first lease to the driver's `Finish`: one stretch of work without a pause."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from batchgen.cluster.messages import Committed, Finish, Noted, Read, Take
from batchgen.core.ranges import Ranges
from batchgen.pipeline.committer import footer_facts
from batchgen.source.text import LineIndexes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.cluster.mail import Mail
    from batchgen.cluster.messages import Lease, Order
    from batchgen.core.errors import StorageError
    from batchgen.core.records import Ordinal, Request
    from batchgen.engine.supervised import SupervisedEngine
    from batchgen.pipeline.committer import OpenPart
    from batchgen.pipeline.context import StopSwitch
    from batchgen.pipeline.feeder import FeedBatch
    from batchgen.pipeline.run_stats import RunStats
    from batchgen.pipeline.stages import Stages
    from batchgen.store.books import Epoch
    from batchgen.store.ledger import Ledger

NO_ROWS = Ranges()


class Session:
    """Ends the rows of leases as they come. Use many times, one at a time."""

    def __init__(  # noqa: PLR0913 - the worker's side of the seam, where all meets
        self,
        stages: Stages,
        epoch: Epoch,
        ledger: Ledger,
        mail: Mail,
        *,
        number: int,
        asks: bool,
        is_packed: bool,
        fetch: Callable[[Any], Sequence[FeedBatch]],
    ) -> None:
        """Bind to one plan.

        Args:
            stages: Makes the loop.
            epoch: The driver's claim.
            ledger: Of the output.
            mail: Where leases come from and events go.
            number: Of this worker.
            asks: Whether the driver is asked which requests are to be computed.
            is_packed: Whether leases come packed, in order.
            fetch: Brings what a lease's payload stands for.
        """
        self._stages = stages
        self._epoch = epoch
        self._ledger = ledger
        self._mail = mail
        self._number = number
        self._asks = asks
        self._is_packed = is_packed
        self._fetch = fetch
        self._indexes = LineIndexes()  # Leases are pieces of the same files, again and again.
        self._is_over = threading.Event()

    def run(
        self,
        lease: Lease,
        engine: SupervisedEngine,
        stats: RunStats,
        stop: StopSwitch,
        on_tick: Callable[[], None],
    ) -> bool:
        """End the rows of this lease and of those that come, up to a `Finish`, or until stopped.

        Returns:
            Whether every row of them has ended.

        Raises:
            BatchgenError: Job trouble, or the engine's; what finished before it is committed.
        """
        self._is_over.clear()

        def commit(part: OpenPart) -> None:  # In the committer's thread.
            self._commit(part, engine)

        # What the driver has put in order stays so.
        feeder = self._stages.feeder(self._batches(lease), engine, is_ordered=self._is_packed)
        try:
            runner = self._stages.runner(engine, feeder, stats, commit, self._tell_disk_trouble)
            return runner.run(stop, on_tick)
        finally:
            self._is_over.set()
            feeder.close()

    def _batches(self, lease: Lease) -> Iterator[FeedBatch]:
        """In the feeder's thread, which the session outlives."""
        yield from self._of(lease)
        while (order := self._next()) is not None:
            if isinstance(order, Finish):
                return
            if isinstance(order, Take):
                yield from self._of(order.lease)

    def _next(self) -> Order | None:
        if not self._mail.has_orders:
            self._mail.say(Read())
        return self._mail.next_order(self._is_over.is_set)

    def _of(self, lease: Lease) -> Iterator[FeedBatch]:
        if lease.payload is not None:
            return self._unpacked(lease)
        rows = self._stages.read(lease.rows, self._indexes)
        return self._stages.feed(rows, self._passing if self._asks else None)

    def _passing(self, requests: Sequence[Request]) -> list[Request]:
        return self._mail.ask(requests, self._is_over.is_set)

    def _unpacked(self, lease: Lease) -> Iterator[FeedBatch]:
        def is_ours(ordinal: Ordinal) -> bool:
            return ordinal.row in lease.rows.get(ordinal.segment, NO_ROWS)

        for batch in self._fetch(lease.payload):
            requests = [self._stages.own(one) for one in batch.requests if is_ours(one.ordinal)]
            results = [one for one in batch.results if is_ours(one.ordinal)]
            skipped = batch.skipped & lease.rows.get(batch.segment, NO_ROWS)
            yield batch.only(requests, results, skipped)

    def _commit(self, part: OpenPart, engine: SupervisedEngine) -> None:
        began_s = time.monotonic()
        self._ledger.check_fence(self._epoch)
        self._ledger.check_seal(self._epoch, self._number)
        name, footer = self._stages.writer.commit(
            part.results, part.skipped, footer_facts(engine.facts)
        )
        counts = (footer.num_ok, footer.num_errors, footer.num_skipped)
        kinds = Counter([one.error.error_type for one in part.results if one.error is not None])
        self._mail.say(Committed(name, footer.done, *counts, time.monotonic() - began_s, kinds))

    def _tell_disk_trouble(self, error: StorageError) -> None:
        self._mail.say(Noted(f"worker {self._number}: a commit is tried again: {error}"))
