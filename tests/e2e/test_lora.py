"""The shipped adapters on real vLLM: a row's adapter answers it, whatever its neighbours have."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import batchgen

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
JOB = ROOT / "jobs" / "adapters.toml"
TICKETS = ROOT / "sample_data" / "routed_tickets.jsonl"
NUM_TICKETS = 20
ADAPTERS = ["teams", "urgency", None]
ANSWERS = {
    "teams": {"payments", "delivery", "technical", "product", "service"},
    "urgency": {"low", "normal", "high"},
    None: {
        "billing",
        "refund",
        "shipping",
        "account_access",
        "bug_report",
        "feature_request",
        "cancellation",
        "praise",
    },
}
UNKNOWN = "team"

pytestmark = pytest.mark.vllm


def tickets() -> list[dict[str, Any]]:
    lines = TICKETS.read_text(encoding="utf-8").splitlines()[:NUM_TICKETS]
    return [{key: json.loads(line)[key] for key in ("subject", "body")} for line in lines]


def answered(
    folder: Path, rows: Sequence[dict[str, Any]], **model: dict[str, str] | str
) -> list[dict[str, Any]]:
    """Run the shipped job over other rows with other adapters; return what it publishes."""
    folder.mkdir()
    text = "\n".join(map(json.dumps, rows))
    (folder / "in.jsonl").write_text(text, encoding="utf-8")
    tables = tomllib.loads(JOB.read_text(encoding="utf-8"))
    del tables["model"]["lora"], tables["model"]["lora_column"]
    tables["model"] |= {"name": str(ROOT / "sample_data" / "model"), "max_num_seqs": 16, **model}
    tables["model"]["engine"]["kv_cache_memory_bytes"] = 32 << 20
    tables["input"]["path"] = str(folder / "in.jsonl")
    tables["output"]["path"] = str(folder / "out")
    summary = batchgen.run(tables)
    assert summary.state == "complete"
    return batchgen.read(folder / "out").collect().to_dicts()


@pytest.fixture(scope="module")
def folders() -> dict[str, str]:
    """Name of each adapter of the shipped job -> its folder."""
    lora = tomllib.loads(JOB.read_text(encoding="utf-8"))["model"]["lora"]
    return {name: str((JOB.parent / path).resolve()) for name, path in lora.items()}


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, str]
) -> list[dict[str, Any]]:
    """Every ticket with each adapter and with none, side by side, and a row with an unknown one."""
    rows = [ticket | {"adapter": name} for ticket in tickets() for name in ADAPTERS]
    rows.insert(NUM_TICKETS, tickets()[0] | {"adapter": UNKNOWN})
    folder = tmp_path_factory.mktemp("lora") / "mixed"
    return answered(folder, rows, lora=folders, lora_column="adapter")


@pytest.mark.parametrize("name", ADAPTERS)
def test_mixed_rows_are_answered_as_by_their_adapter_alone(
    tmp_path: Path, mixed: list[dict[str, Any]], folders: dict[str, str], name: str | None
) -> None:
    alone = answered(
        tmp_path / "alone", tickets(), **({} if name is None else {"lora": {name: folders[name]}})
    )
    of_name = [row for row in mixed if row["adapter"] == name]
    assert [row["gen_status"] for row in of_name] == ["ok"] * NUM_TICKETS
    assert [row["gen_text"] for row in of_name] == [row["gen_text"] for row in alone]
    assert {row["gen_text"] for row in of_name} <= ANSWERS[name]
    assert len({row["gen_text"] for row in of_name}) > 1


def test_the_adapter_is_part_of_a_rows_key(mixed: list[dict[str, Any]]) -> None:
    assert len({row["gen_request_key"] for row in mixed[:3]}) == 3


def test_an_adapter_that_the_job_does_not_have_is_an_error_row(mixed: list[dict[str, Any]]) -> None:
    (bad,) = [row for row in mixed if row["adapter"] == UNKNOWN]
    assert (bad["gen_status"], bad["gen_error_type"]) == ("error", "unknown_adapter")
    assert bad["gen_text"] is None
    assert "'team'" in bad["gen_error"]
