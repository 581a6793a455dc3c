"""Readers of the folder, in processes of their own, during a thousand switches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.switches import switch

if TYPE_CHECKING:
    from pathlib import Path


def test_in_a_thousand_switches_nobody_reads_two_snapshots_at_once(tmp_path: Path) -> None:
    found = switch(tmp_path / "out", 1000, seed=11)
    for how, (seen, num_errors) in found.items():
        print(f"{how}: {len(seen)} snapshots read, {num_errors} errors")
    assert all(len(seen) > 5 for seen, _ in found.values())
    assert sum(num_errors for _, num_errors in found.values())
