"""Which result files hold answers that a plan's rows need not be computed for again.

Those of the plans that it is based on, and those of try-outs: rows that somebody looked at before
the run, by the very recipe. A try-out has books of its own; what is wrong with them costs its
answers, and never a row of the run.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.errors import OutputError, StorageError
from batchgen.storage import LocalStorage
from batchgen.store.books import PARTS, Durable, Manifest, Places, Plan
from batchgen.store.keys import KeySet
from batchgen.store.ledger import Ledger
from batchgen.store.published import groups_of, row_groups, stretches
from batchgen.store.result_files import ROW, SEGMENT, ResultFile, rows_of
from batchgen.store.reuse import Source, key_prefixes, published_sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.core.records import RowSet
    from batchgen.pipeline.prepare import Checked

NUM_TRIES = 5
"""So many of the last try-outs are kept, and looked at."""


def base_sources(ledger: Ledger, plan: Plan) -> list[Source]:
    """List the result files of a plan's bases, whose answers serve equal requests."""
    takes_errors = plan.takes_errors
    found: list[Source] = []
    for base in plan.bases:
        manifest = ledger.manifest(base.plan)
        if manifest is None:
            found += [Source(name, takes_errors) for name in base.parts]
        else:
            found += published_sources(ledger.storage, manifest, takes_errors=takes_errors)
    return found


def answered_keys(
    storage: LocalStorage, sources: Sequence[Source], prefix: str, tell: Callable[[str], None]
) -> KeySet:
    """Read which requests have an answer in result files, see `key_prefixes`."""
    known = KeySet()
    for prefixes in key_prefixes(storage, sources, prefix, tell):
        known.load(prefixes)
    return known


def ended_rows(
    storage: LocalStorage,
    durable: Durable,
    published: tuple[Manifest | None, Plan],
    columns: Sequence[str],
    wanted: RowSet | None = None,
) -> Iterator[pa.Table]:
    """Yield rows of parts and of a snapshot, piece by piece: their ordinals, and some columns.

    What is damaged is left out.

    Args:
        storage: Where they are.
        durable: Parts, and files that the plan keeps.
        published: The snapshot's manifest, None if there is none, and the plan.
        columns: Names in the files.
        wanted: Only pieces with one of these rows; None: all.

    Raises:
        OutputError: The snapshot has no index of rows, or it is damaged.
        StorageError: Something cannot be read right now.
    """
    names = [SEGMENT, ROW, *columns]
    for part in durable.parts:
        if wanted is None or part.footer.done & wanted:
            with ResultFile(storage.path(part.name)) as file:
                yield from (table for _, table in file.groups(names))
    kept = stretches(storage, durable.kept, Places(published[1]), wanted)
    groups = chain(groups_of(kept), row_groups(storage, *published, wanted))
    for file, group, ordinals in groups:
        place = ordinals().select([SEGMENT, ROW])
        if wanted is not None and not rows_of(place) & wanted:
            continue
        if (found := file.group(group, columns, is_proven=False)) is not None:
            yield pa.table([*place, *found], names=names)


def tried_sources(storage: LocalStorage, place: str | None, checked: Checked) -> list[Source]:
    """List the result files of the last try-outs whose answers are what the job's would be.

    Args:
        storage: The job's output.
        place: The folder in it where try-outs have their books, "" for `storage` itself; None:
            they are of no interest.
        checked: The job.
    """
    if place is None:
        return []
    ledger = Ledger(LocalStorage(storage.path(place)))
    try:
        found = list(_tried(ledger, checked))
    except (OutputError, StorageError, KeyError, TypeError):  # Damage of any kind.
        return []
    return [source._replace(name=f"{place}/{source.name}".lstrip("/")) for source in found]


def _tried(ledger: Ledger, checked: Checked) -> Iterator[Source]:
    newest = ledger.latest_plan_number()
    for number in range(newest, max(newest - NUM_TRIES, 0), -1):
        plan = ledger.plan(number)
        if not checked.answers_alike(plan):
            continue
        if (manifest := ledger.manifest(number)) is not None:
            yield from published_sources(ledger.storage, manifest, takes_errors=False)
            continue
        parts = ledger.parts(plan, ledger.storage.list(PARTS)).parts  # Of one that was killed.
        yield from (Source(part.name, takes_errors=False) for part in parts)
