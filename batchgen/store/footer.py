"""What a part says of itself: the JSON in its Parquet footer, the commit record of its rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen.core.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Mapping

FOOTER_KEY = b"batchgen"


@dataclass(frozen=True, slots=True)
class PartFooter:
    """The books of one part.

    Invariant: the ordinals in `done` are `num_ok + num_errors` results and `num_skipped` rows
    that end without a result (blank lines, rows that `where` leaves out).
    """

    plan: str
    """Id of the plan that the ordinals belong to."""
    epoch: int
    run_id: str
    done: Mapping[int, Ranges]
    """Segment -> physical row numbers."""
    num_ok: int
    num_errors: int
    num_skipped: int
    engine: Mapping[str, Any]
    """Who answered: engine name and version, device, batchgen version."""
    tally: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What the gate needs of the rows: see `sink.tally`."""

    @property
    def num_results(self) -> int:
        """Rows of the Parquet file."""
        return self.num_ok + self.num_errors

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return Parquet key-value metadata."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["done"] = {str(seg): ranges.to_json() for seg, ranges in self.done.items()}
        fields["engine"] = dict(self.engine)
        fields["tally"] = {name: dict(counts) for name, counts in self.tally.items()}
        return {FOOTER_KEY: json.dumps(fields, separators=(",", ":")).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> PartFooter:
        """Read what `to_metadata` wrote.

        Raises:
            ValueError: No such entry, or its books do not balance.
        """
        try:
            fields = json.loads((metadata or {})[FOOTER_KEY])
            fields["done"] = {
                int(seg): Ranges.from_json(flat) for seg, flat in fields["done"].items()
            }
            footer = cls(**fields)
            num_done = sum(len(ranges) for ranges in footer.done.values())
            balance = footer.num_results + footer.num_skipped
            for counts in footer.tally.values():
                sum(counts.values())
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"no batchgen footer: {error!r}"
            raise ValueError(msg) from error
        if num_done != balance:
            msg = f"footer names {num_done} rows, but counts {balance}"
            raise ValueError(msg)
        return footer
