"""A fix may change what a prompt is: answers to the old one stay until the user says otherwise.

The outputs are those that batchgen 0.1.0 left: text in a binary column, printed as
`b'Caf\\xc3\\xa9'`; JSON with escapes for HTML; a byte order mark in each prompt.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen.core.errors import GateError
from batchgen.pipeline.rendering import RENDERING
from tests.e2e.support import run_cli

if TYPE_CHECKING:
    from batchgen.pipeline.context import Summary

MADE = Path(__file__).parents[1] / "data" / "outputs-0.1.0" / "binary"
NUM_OLD = 6  # Of 7: the null never had a prompt.
SAID = f"{NUM_OLD} rows were made with the old rendering of binary columns"
NEW = ["Café", "plain", None, "Größe", None, "plain", "end"]


def copy_of(made: Path, folder: Path) -> Path:
    """A copy whose books are right: nothing has changed since the last night."""
    shutil.copytree(made, folder, copy_function=shutil.copyfile)
    books = folder / "out/_batchgen/plan/000001.json"
    plan = json.loads(books.read_bytes())
    (segment,) = plan["segments"]
    source = folder / Path(segment["path"]).name
    segment |= {"path": str(source), "version": str(source.stat().st_mtime_ns)}
    books.write_text(json.dumps(plan), encoding="utf-8")
    return folder / "job.toml"


@pytest.fixture
def job(tmp_path):
    return copy_of(MADE, tmp_path / "job")


def texts(job: Path) -> list[Any]:
    return batchgen.read(job).collect()["gen_text"].to_list()


def plan_of(job: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (job.parent / f"out/_batchgen/plan/{number:06d}.json").read_bytes()
    )
    return found


def forecast(job: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_cli("plan", job, *options, "--json").stdout)
    return found


def notes(told: list[str]) -> list[str]:
    return [text for text in told if "old rendering" in text]


def num_computed(summary: Summary) -> int:
    return sum(sum(found.values()) for found in summary.run.get("verdicts", {}).values())


def write(job: Path, values: list[bytes | None], kind: pa.DataType | None = None) -> None:
    """Another input."""
    ids = list(range(len(values)))
    table = pa.table({"id": ids, "text": pa.array(values, kind or pa.binary())})
    pq.write_table(table, job.parent / "in.parquet")


def given() -> list[bytes | None]:
    found: list[bytes | None] = pq.read_table(MADE / "in.parquet")["text"].to_pylist()
    return found


def test_an_old_output_stays_and_says_how_many_rows_are_old(job):
    ahead = forecast(job)
    assert (ahead["state"], ahead["num_old_rendering"]) == ("nothing_to_do", NUM_OLD)
    summary = batchgen.run(job)
    assert (summary.state, summary.num_old_rendering) == ("nothing_to_do", NUM_OLD)
    assert notes(summary.warnings) == [f"{SAID}; rerender=True runs them again"]
    assert notes(ahead["warnings"]) == [f"{SAID}; --rerender runs them again"]
    for verb in ("plan", "run"):
        printed = run_cli(verb, job)
        assert SAID in printed.stdout + printed.stderr
    assert texts(job)[0] == "b'Caf\\xc3\\xa9'"


def test_a_night_on_which_nothing_happens_counts_them_once(job):
    """And believes no count that is not of this plan, or damaged."""
    counted = job.parent / "out/_batchgen/rendering.json"
    assert batchgen.run(job).num_old_rendering == NUM_OLD
    known = json.loads(counted.read_bytes())
    for content, num in (
        (json.dumps({**known, "num": 99}), 99),
        (json.dumps({**known, "of": ["another", *known["of"][1:]], "num": 99}), NUM_OLD),
        ('{"of": ', NUM_OLD),
        ("[" * 100_000, NUM_OLD),
        ('{"of": null, "num": "x"}', NUM_OLD),
    ):
        counted.write_text(content, encoding="utf-8")
        assert batchgen.run(job).num_old_rendering == num
    assert json.loads(counted.read_bytes()) == known


def test_rerender_runs_those_rows_once_and_no_others(job):
    ahead = forecast(job, "--rerender")
    assert (ahead["state"], ahead["num_old_rendering"]) == ("ready", NUM_OLD)
    assert (ahead["rows"]["num_again"], ahead["rows"]["num_reused"]) == (NUM_OLD, 1)
    summary = batchgen.run(job, rerender=True, publish_anyway=True)
    assert (summary.state, num_computed(summary)) == (
        "complete",
        4,
    )  # Two are equal, one is no text.
    assert notes(summary.warnings) == [f"{SAID}: run again"]
    assert texts(job) == NEW
    assert plan_of(job, 2)["rendering"] == RENDERING
    frame = batchgen.read(job).collect()
    assert frame["gen_error_type"].to_list()[4] == "invalid_utf8"
    again = batchgen.run(job, rerender=True)
    assert (again.state, again.num_old_rendering) == ("nothing_to_do", 0)


def test_the_next_night_renders_new_rows_anew_and_keeps_the_others(job):
    old = texts(job)
    added = job.parent / "more.parquet"
    pq.write_table(pa.table({"id": [7], "text": pa.array([b"n\xc3\xa4chste"])}), added)
    both = 'input.path=["in.parquet", "more.parquet"]'
    ahead = forecast(job, "--set", both)
    assert (ahead["num_old_rendering"], ahead["rows"]["num_new"]) == (NUM_OLD, 1)
    summary = batchgen.run(job, overrides=[both])
    assert (summary.num_old_rendering, num_computed(summary)) == (NUM_OLD, 1)
    assert texts(job) == [*old, "nächste"]
    assert "rendering" not in plan_of(job, 1)
    assert plan_of(job, 2)["rendering"] == 0
    # And that night may run the old ones again, whatever lies between.
    done = batchgen.run(job, overrides=[both], rerender=True, publish_anyway=True)
    assert num_computed(done) == 4
    assert texts(job) == [*NEW, "nächste"]


def test_a_file_that_changed_is_rendered_anew_and_that_is_said(job):
    """Of Parquet, only a row's request tells that it was there before."""
    write(job, [*given(), b"new"])
    ahead = forecast(job)
    told = "8 rows of changed files are told by their requests only: what was made with the old "
    assert notes(ahead["warnings"]) == [f"{told}rendering of binary columns runs again"]
    assert (ahead["num_old_rendering"], ahead["todo"]["num_to_compute"]) == (0, 5)
    summary = batchgen.run(job, publish_anyway=True)
    assert notes(summary.warnings) == notes(ahead["warnings"])
    assert num_computed(summary) == 5
    assert texts(job) == [*NEW, "new"]


def test_a_night_may_change_the_input_and_rerender_at_once(job):
    added = job.parent / "more.parquet"
    pq.write_table(pa.table({"id": [7], "text": pa.array([b"n\xc3\xa4chste"])}), added)
    both = 'input.path=["in.parquet", "more.parquet"]'
    done = batchgen.run(job, overrides=[both], rerender=True, publish_anyway=True)
    assert (done.num_old_rendering, num_computed(done)) == (NUM_OLD, 5)
    assert texts(job) == [*NEW, "nächste"]
    assert plan_of(job, 2)["rendering"] == RENDERING


def test_a_night_that_was_held_back_goes_on_as_it_began(job):
    with pytest.raises(GateError):
        batchgen.run(job, rerender=True, overrides=["gate.max_error_rate=0"])
    assert texts(job)[0] == "b'Caf\\xc3\\xa9'"
    done = batchgen.run(job)
    assert (done.state, done.num_old_rendering, num_computed(done)) == ("complete", 0, 0)
    assert texts(job) == NEW


def test_a_job_whose_prompts_do_not_read_bytes_reads_no_row_for_it(job):
    job.write_text(job.read_text().replace("{{ text }}", "{{ id }}"), encoding="utf-8")
    shutil.rmtree(job.parent / "out")
    batchgen.run(job)
    books = job.parent / "out/_batchgen/plan/000001.json"
    plan = json.loads(books.read_bytes())
    del plan["rendering"]
    books.chmod(0o644)
    books.write_text(json.dumps(plan), encoding="utf-8")
    summary = batchgen.run(job)
    assert (summary.state, summary.num_old_rendering, summary.warnings) == ("nothing_to_do", 0, [])
    # The plan of the next night is as new as the program.
    write(job, [*given(), b"x"])
    assert batchgen.run(job).num_old_rendering == 0
    assert plan_of(job, 2)["rendering"] == RENDERING


def test_a_template_that_decodes_by_itself_has_the_prompts_that_it_had(job):
    """And so nothing of it is old: its rows are compared once, and never again."""
    decoding = "{{ text.decode('utf-8') if id != 4 else 'none' }}"
    job.write_text(job.read_text().replace("{{ text }}", decoding), encoding="utf-8")
    shutil.rmtree(job.parent / "out")
    summary = batchgen.run(job)
    assert texts(job) == ["Café", "plain", None, "Größe", "none", "plain", "end"]
    assert summary.num_errors == 1


OTHERS = {
    # Of four rows one needs no escapes, and one has no null but where it is JSON.
    "tojson": (
        "tojson and of default",
        2,
        [
            '{"a": {"b": 1}} x 1',
            '{"a": {"b": "Müller & <Söhne>"}} y Müller & <Söhne>',
            '{"a": {"b": 2}} none 2',
            '{"a": null} z -',
        ],
    ),
    "mark": ("a byte order mark", 2, ["Say a", "Say b"]),
    "turns": (
        "chats that end with the assistant",
        2,
        ["How?", "How?\nSo:", "How?", "How?\nThus: "],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_templates_that_are_rendered_otherwise_have_their_old_answers_until_asked(name, tmp_path):
    of, num_old, wanted = OTHERS[name]
    job = copy_of(MADE.parent / name, tmp_path / "job")
    before = texts(job)
    summary = batchgen.run(job)
    assert (summary.state, summary.num_old_rendering) == ("nothing_to_do", num_old)
    said = f"{num_old} rows were made with the old rendering of {of}; rerender=True runs them again"
    assert notes(summary.warnings) == [said]
    assert texts(job) == before
    assert num_computed(batchgen.run(job, rerender=True)) == num_old
    assert texts(job) == wanted
    assert batchgen.run(job).num_old_rendering == 0
