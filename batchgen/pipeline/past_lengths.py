"""How long a job's answers were, from what it published last."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.engine.order import Lengths, mean_lengths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.job.model import JobConfig
    from batchgen.store.ledger import Ledger

MAX_ROWS = 20_000


def lengths_of(job: JobConfig, ledger: Ledger) -> Lengths:
    """What to expect of a job's answers; of a first run only their bound.

    A hint for the order of admission: what cannot be read is not known, and no trouble.
    """
    means = mean_lengths(islice(_seen(ledger, job.output.prefix), MAX_ROWS))
    return Lengths(job.sampling.max_tokens, bool(job.sampling.ignore_eos), means)


def _seen(ledger: Ledger, prefix: str) -> Iterator[tuple[int | None, int | None]]:
    manifest = ledger.latest_manifest()
    names = [f"{prefix}num_prompt_tokens", f"{prefix}num_output_tokens"]
    for file in manifest.files[:1] if manifest is not None else ():
        try:
            with pq.ParquetFile(ledger.storage.path(file["name"])) as parquet:
                for batch in parquet.iter_batches(columns=names):
                    yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
        except (OSError, pa.ArrowException, ValueError):
            return
