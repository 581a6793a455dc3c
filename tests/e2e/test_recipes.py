"""What docs/recipes.md says: two jobs in a chain, and a job that is a mapping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import batchgen
from tests.fakes import write_jsonl

if TYPE_CHECKING:
    from pathlib import Path

ROWS: list[dict[str, Any]] = [{"id": n, "body": f"ticket {n}"} for n in range(20)]
ROWS[3]["body"] = None  # An error row of the first job.


def job(given: dict[str, Any], user: str, **output: Any) -> dict[str, Any]:
    return {
        "input": given,
        "prompt": {"user": user},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 64},
        "output": output,
    }


def test_the_second_job_reads_what_the_first_published_and_computes_what_is_new(
    tmp_path: Path,
) -> None:
    first = job({"path": str(tmp_path / "in.jsonl")}, "{{ body }}", path=str(tmp_path / "first"))
    second = job(
        {
            "path": str(tmp_path / "first" / "part-*.parquet"),
            "columns": ["id", "gen_text"],
            "where": "gen_status = 'ok'",
        },
        "Translate: {{ gen_text }}",
        path=str(tmp_path / "second"),
        prefix="second_",
    )
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    assert [batchgen.run(one).exit_code for one in (first, second)] == [0, 0]
    write_jsonl(tmp_path / "in.jsonl", [*ROWS, {"id": 99, "body": "new"}])
    assert batchgen.run(first).run["num_ok"] == 1
    again = batchgen.run(second)
    assert (again.num_ok, again.run["num_ok"], again.num_carried + again.num_copied) == (20, 1, 19)
    rows = batchgen.read(second).select("id", "second_text").collect().rows()
    assert rows[-1] == (99, "Translate: new")
    assert 3 not in {number for number, _ in rows}
