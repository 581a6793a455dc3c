"""Two outputs side by side: which rows are which, how far they agree, and the rows that differ."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

import batchgen
from batchgen.core.errors import ConfigError, OutputError
from batchgen.views.sides import LabelMoves
from tests.e2e.support import run_cli, write_job

if TYPE_CHECKING:
    from pathlib import Path

ODD = ["é ü", 'a "b"', "c,d", "e\u2028f", "<svg onload=x>"]


def label_job(folder: Path, rows: list[dict[str, Any]], name: str = "out", **tables: Any) -> Path:
    """A job that answers with the row's `a`, or, by another prompt, with its `b`."""
    lines = [json.dumps(row) for row in rows]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return write_job(
        folder,
        "in.jsonl",
        **{
            "prompt": {"user": "{{ a }}"},
            "output": {"path": name, "choice": ODD},
            "gate": {"max_error_rate": 1.0, "max_shrink": 1.0},
            **tables,
        },
    )


def two(folder: Path, pairs: list[tuple[str, str]]) -> tuple[Path, Path]:
    rows = [{"id": number, "a": a, "b": b} for number, (a, b) in enumerate(pairs)]
    job = label_job(folder, rows)
    batchgen.run(job)
    batchgen.run(job, overrides=["output.path=other", "prompt.user={{ b }}"])
    return folder / "out", folder / "other"


def test_agreement_confusion_and_kappa_of_two_prompts(tmp_path: Path) -> None:
    pairs = [(ODD[0], ODD[0])] * 6 + [(ODD[0], ODD[1])] * 3 + [(ODD[2], ODD[2])] * 2
    pairs += [(ODD[4], "no label")]
    out, other = two(tmp_path, pairs)
    found = batchgen.compare(out, other)
    assert (found.num_both, found.rows.num_same, found.rows.num_answer_changed) == (12, 8, 4)
    assert found.recipe == ["prompt.user: '{{ a }}' -> '{{ b }}'"]
    (labels,) = found.rows.labels
    assert labels.column == "gen_label"
    assert labels.confusion == {(ODD[0], ODD[0]): 6, (ODD[0], ODD[1]): 3, (ODD[2], ODD[2]): 2}
    assert labels.agreement == 8 / 11
    both = pairs[:-1]
    assert labels.kappa == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)))
    assert (found.a.num_errors, found.b.num_errors) == (0, 1)
    assert found.a.output_tokens == sum(len(a.encode()) for a, _ in pairs)
    text = run_cli("compare", out, other).stdout
    assert "8 the same (66.7%), 4 not" in text
    assert "agree    gen_label: 72.7% of 11 rows, kappa" in text
    assert f"3 rows: {ODD[0]} -> {ODD[1]}" in text
    told = json.loads(run_cli("compare", out, other, "--json").stdout)
    assert told["labels"][0]["kappa"] == pytest.approx(labels.kappa)
    assert told["num_differ"] == 4
    assert told["a"]["cost"] is None
    priced = batchgen.compare(out, other, gpu_cost="3600EUR")
    assert priced.a.cost == pytest.approx(1000 / priced.a.requests_per_s)
    text = run_cli("compare", out, other, "--gpu-cost", "3600EUR").stdout
    assert text.count(" EUR per 1,000 rows\n") == 2


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1))
@settings(max_examples=200)
def test_kappa_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    moves = [{"old": a, "new": b, "num_rows": pairs.count((a, b))} for a, b in sorted(set(pairs))]
    kappa = LabelMoves("x", {}, {}, None, moves).kappa
    if kappa is None:  # Which scikit-learn warns of, and calls nan.
        assert len({label for pair in pairs for label in pair}) == 1
    else:
        assert kappa == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))


def test_the_rows_that_differ_as_parquet(tmp_path: Path) -> None:
    out, other = two(tmp_path, [(ODD[0], ODD[0]), (ODD[0], ODD[1]), (ODD[2], "none")])
    path = tmp_path / "differ.parquet"
    batchgen.compare(out, other, to=path)
    rows = pl.read_parquet(path)
    assert rows["id"].to_list() == [1, 2]
    assert rows["a_label"].to_list() == [ODD[0], ODD[2]]
    assert rows["b_label"].to_list() == [ODD[1], None]
    assert rows["b_error_type"].to_list() == [None, "schema_violation"]
    assert set(rows["changed"]) == {"answer"}
    with pytest.raises(ConfigError, match="exists, expected a new file"):
        batchgen.compare(out, other, to=path)


def test_input_columns_with_the_names_of_ours_are_kept_apart(tmp_path: Path) -> None:
    rows = [{"a": ODD[0], "b": ODD[1], "changed": 1, "at": 2, "a_text": 3, "at_old": 4, "class": 5}]
    job = label_job(tmp_path, rows)
    batchgen.run(job)
    batchgen.run(job, overrides=["output.path=other", "prompt.user={{ b }}"])
    path = tmp_path / "differ.parquet"
    batchgen.compare(job, tmp_path / "other", to=path)
    (row,) = pl.read_parquet(path).to_dicts()
    assert {name: row[name] for name in rows[0]} == rows[0]
    assert (row["changed_"], row["a_text_"], row["b_text"]) == ("answer", ODD[0], ODD[1])


def test_rows_of_one_output_only_and_edited_ones(tmp_path: Path) -> None:
    rows = [{"id": number, "a": ODD[0]} for number in range(10)]
    job = label_job(tmp_path, rows)
    batchgen.run(job)
    more = [{"id": -1, "a": ODD[0]}, *rows[:4], {"id": 4, "a": ODD[1]}, *rows[5:8]]
    label_job(tmp_path, more)
    batchgen.run(job, overrides=["output.path=other"])
    found = batchgen.compare(tmp_path / "out", tmp_path / "other").rows
    assert (found.num_same, found.num_added, found.num_removed) == (7, 1, 2)
    assert found.num_input_changed == 1
    by_id = batchgen.compare(tmp_path / "out", tmp_path / "other", on="id").rows
    assert (by_id.num_same, by_id.num_input_changed) == (7, 1)
    assert (by_id.num_added, by_id.num_removed) == (1, 2)


def test_snapshots_of_one_output(tmp_path: Path) -> None:
    job = label_job(tmp_path, [{"a": ODD[0], "b": ODD[1]}] * 3)
    batchgen.run(job)
    batchgen.run(job, overrides=["prompt.user={{ b }}"], accept_recipe=True)
    found = batchgen.compare(f"{tmp_path / 'out'}@1", f"{job}@2")
    assert (found.a.snapshot, found.b.snapshot, found.rows.num_answer_changed) == (1, 2, 3)
    same = batchgen.compare(f"{job}@2", job)
    assert (same.agreement, same.recipe) == (1.0, [])
    with pytest.raises(OutputError, match="there is no snapshot 9, expected one of: 1, 2"):
        batchgen.compare(job, f"{job}@9")


def test_other_forms_of_answers_are_compared_by_what_both_have(tmp_path: Path) -> None:
    out, _ = two(tmp_path, [(ODD[0], ODD[1])])
    job = write_job(tmp_path, "in.jsonl", prompt={"user": "{{ a }}"}, output={"path": "free"})
    batchgen.run(job)
    found = batchgen.compare(out, tmp_path / "free")
    assert found.agreement == 1.0  # The text is the same.
    assert found.rows.columns_went == ["gen_label"]
    assert found.rows.labels == []
    assert "columns  only in A: gen_label" in found.as_text()


def test_other_types_of_a_column_are_no_comparison_of_it(tmp_path: Path) -> None:
    for name, value in (("out", 1), ("other", "1")):
        job = label_job(tmp_path, [{"id": value, "a": ODD[0]}], name)
        batchgen.run(job)
    found = batchgen.compare(tmp_path / "out", tmp_path / "other").rows
    assert found.columns_retyped == ["id"]
    with pytest.raises(ConfigError, match="expected one plain type in both"):
        batchgen.compare(tmp_path / "out", tmp_path / "other", on="id")


def test_outputs_without_a_row(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    job = write_job(tmp_path, "in.jsonl", prompt={"user": "x"}, output={"choice": ODD})
    batchgen.run(job)
    batchgen.run(job, overrides=["output.path=other"])
    found = batchgen.compare(tmp_path / "out", tmp_path / "other", to=tmp_path / "d.parquet")
    assert (found.num_both, found.agreement) == (0, None)
    assert "0 in both" in found.as_text()
    assert len(pl.read_parquet(tmp_path / "d.parquet")) == 0


@pytest.mark.parametrize("what", ["nothing", "folder", "file"])
def test_what_is_no_output_is_refused(tmp_path: Path, what: str) -> None:
    out, _ = two(tmp_path, [(ODD[0], ODD[0])])
    other = tmp_path / "x"
    if what == "folder":
        other.mkdir()
    elif what == "file":
        other.write_text("no job")
    done = run_cli("compare", out, other)
    assert done.returncode == 2
    assert str(other) in done.stderr


def test_damage_is_told_in_a_line(tmp_path: Path) -> None:
    out, other = two(tmp_path, [(ODD[0], ODD[0])])
    (file,) = (other / "_batchgen" / "files").glob("*.parquet")
    file.chmod(0o644)
    file.write_bytes(b"PAR1")
    done = run_cli("compare", out, other)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "cannot be compared" in done.stderr


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from([*ODD, "other"]), st.sampled_from([*ODD, "other"])), max_size=12
    )
)
def test_the_counts_are_those_of_a_loop(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("loop")
    out, other = two(folder, pairs or [(ODD[0], ODD[0])])
    pairs = pairs or [(ODD[0], ODD[0])]
    found = batchgen.compare(out, other)
    assert found.rows.num_same == sum(a == b for a, b in pairs)
    labels = [(a, b) for a, b in pairs if a in ODD and b in ODD]
    moves = {pair: labels.count(pair) for pair in labels}
    told = found.rows.labels[0].confusion if found.rows.labels else {}
    assert told == moves
