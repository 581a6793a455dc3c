"""What many tests start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from batchgen.job.load import parse_job
from batchgen.storage import LocalStorage
from tests.fakes import tables_of_job, write_jsonl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.job.model import JobConfig

hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")  # A machine that is busy with other things is no fault.

MARKERS = {"e2e": "proof", "ray": "proof", "torture": "proof", "gpu": "gpu"}
"""Folder of tests -> the marker that all in it get; what is in no such folder is fast."""
ROWS = [{"id": f"r{n}", "text": f"say {n}"} for n in range(10)]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """The output folder."""
    return LocalStorage(tmp_path / "out", temp_tag="run-a")


@pytest.fixture
def job_tables(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Tables of a job for the echo backend; writes its input, ten rows unless told otherwise.

    Keywords are tables whose keys replace or join the default ones.
    """

    def make(rows: Sequence[Any] | None = ROWS, **tables: dict[str, Any]) -> dict[str, Any]:
        if rows is not None:
            write_jsonl(tmp_path / "rows.jsonl", rows)
        return tables_of_job(**tables)

    return make


@pytest.fixture
def make_job(tmp_path: Path, job_tables: Callable[..., dict[str, Any]]) -> Callable[..., JobConfig]:
    """The same, loaded."""

    def make(rows: Sequence[Any] | None = ROWS, **tables: dict[str, Any]) -> JobConfig:
        return parse_job(job_tables(rows, **tables), base=tmp_path, where="job.toml")

    return make


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark tests by their folder."""
    here = Path(__file__).parent
    for item in items:
        marker = MARKERS.get(item.path.relative_to(here).parts[0])
        if marker is not None:
            item.add_marker(marker)
