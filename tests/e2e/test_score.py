"""Published labels held against gold labels, by scikit-learn's definitions, and in the gate."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

import batchgen
from batchgen.core.errors import ConfigError, GateError, OutputError
from batchgen.quality.score import Calibration, _calibration, _threshold
from tests.e2e.support import run_cli, write_job

if TYPE_CHECKING:
    from pathlib import Path

ODD = ["é ü", 'a "b"', "c,d", "(no answer)", "<svg onload=x>"]
OPEN = {"gate": {"max_error_rate": 1.0, "max_shrink": 1.0}}


def job_of(folder: Path, rows: list[tuple[str, Any]], **tables: Any) -> Path:
    """A job that answers with each row's first value; the second is its gold label."""
    lines = [json.dumps({"told": told, "gold": gold}) for told, gold in rows]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = {"prompt": {"user": "{{ told }}"}, "output": {"choice": ODD}, **OPEN}
    return write_job(folder, "in.jsonl", **{**given, **tables})


def test_accuracy_f1_and_confusion(tmp_path: Path) -> None:
    rows = [(ODD[0], ODD[0])] * 5 + [(ODD[0], ODD[1])] * 2 + [(ODD[3], ODD[3]), (ODD[3], ODD[2])]
    rows += [("no label", ODD[1]), (ODD[2], None), (ODD[2], "")]
    job = job_of(tmp_path, rows)
    batchgen.run(job)
    found = batchgen.score(job, gold="gold")
    assert (found.num_rows, found.num_without_gold, found.num_unanswered) == (10, 2, 1)
    assert found.accuracy == 0.6
    gold = [right for _, right in rows[:10]]
    told = [told if told in ODD else "none" for told, _ in rows[:10]]
    names = sorted(set(gold))
    each = dict(zip(names, f1_score(gold, told, labels=names, average=None), strict=True))
    assert {one.label: one.f1 for one in found.labels if one.num_gold} == pytest.approx(each)
    assert found.macro_f1 == pytest.approx(sum(each.values()) / len(each))
    assert found.confusion[:2] == [
        {"gold": ODD[0], "answered": ODD[0], "num_rows": 5},
        {"gold": ODD[1], "answered": ODD[0], "num_rows": 2},
    ]
    assert {"gold": ODD[1], "answered": None, "num_rows": 1} in found.confusion
    done = run_cli("score", job, "--gold", "gold")
    assert "accuracy 60.0%, macro F1" in done.stdout
    assert "1 without an answer are wrong" in done.stdout
    assert f"2 rows: {ODD[1]}, answered {ODD[0]}" in done.stdout
    told_json = json.loads(run_cli("score", tmp_path / "out", "--gold", "gold", "--json").stdout)
    assert told_json["accuracy"] == 0.6
    assert told_json["calibration"] is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([*ODD, "other"]), st.sampled_from([*ODD, None, "", "x"])),
        min_size=1,
        max_size=15,
    )
)
def test_the_gate_and_the_score_count_alike(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("score")
    job = job_of(folder, rows, score={"gold": "gold"})
    (figure,) = [one["figure"] for one in batchgen.run(job).gate if one["name"] == "min_accuracy"]
    scored = [(told, right) for told, right in rows if right]
    assert batchgen.score(job).accuracy == figure
    if scored:
        assert figure == pytest.approx(
            accuracy_score([right for _, right in scored], [told for told, _ in scored])
        )
    else:
        assert figure is None


def test_a_limit_for_the_accuracy_holds_a_run_back(tmp_path: Path) -> None:
    rows = [(ODD[0], ODD[0])] * 3 + [(ODD[0], ODD[1])]
    score = {"score": {"gold": "gold"}}
    job = job_of(tmp_path, rows, **score, gate={"min_accuracy": 0.8})
    with pytest.raises(GateError) as caught:
        batchgen.run(job)
    text = (
        "3 of 4 rows with a label in 'gold' have it in their answer, below gate.min_accuracy = 0.8"
    )
    assert str(caught.value).startswith(f"{text}; nothing published")
    assert "--errors" not in str(caught.value)
    done = run_cli("run", job, "--publish-anyway")
    assert f"published over a limit of the gate: {text}" in done.stdout
    job_of(tmp_path, rows, **score, gate={"min_accuracy": 0.75})
    again = batchgen.run(job)  # The limit is no part of the recipe.
    assert again.state == "nothing_to_do"
    fresh = run_cli("run", job, "--fresh")
    assert "accuracy 0.75 of at least 0.75" in fresh.stdout


def test_gold_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    rows = [(ODD[0], ODD[0])]
    job = job_of(tmp_path, rows)
    batchgen.run(job)
    job_of(tmp_path, rows, score={"gold": "gold", "precision": 0.9})
    assert batchgen.run(job).state == "nothing_to_do"


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"score": {"gold": "golt"}}, "no column 'golt' in the output; did you mean 'gold'?"),
        ({"score": {"gold": "gold", "answer": "gen_labl"}}, "did you mean 'gen_label'?"),
        ({"gate": {"min_accuracy": 0.5}}, "expected the column that has the right labels"),
        ({"score": {"gold": "gold"}, "output": {"choice": None}}, "the answer has no labels"),
        (
            {"score": {"gold": "gold"}, "input": {"columns": ["told"]}},
            "gold: no column 'gold' in the",
        ),
        ({"score": {"gold": "list"}}, "expected texts or whole numbers"),
        ({"score": {"gold": "real"}}, "expected texts or whole numbers"),
    ],
)
def test_a_job_that_cannot_be_scored_is_refused(
    tmp_path: Path, tables: dict[str, Any], problem: str
) -> None:
    job_of(tmp_path, [])
    row = {"told": ODD[0], "gold": "a", "list": ["a"], "real": 1.5}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    given: dict[str, Any] = {"prompt": {"user": "{{ told }}"}, "output": {"choice": ODD}, **tables}
    if given["output"] == {"choice": None}:
        given["output"] = {}
    job = write_job(tmp_path, "in.jsonl", **given)
    with pytest.raises(ConfigError, match="score") as caught:
        batchgen.run(job)
    assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "gold: missing"),
        ({"gold": "golt"}, "did you mean 'gold'?"),
        ({"gold": "gold", "answer": "gen_text"}, "holds no labels"),
        ({"gold": "gold", "precision": 1.5}, "expected: a share, 0 to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    job = job_of(tmp_path, [(ODD[0], ODD[0])])
    batchgen.run(job)
    with pytest.raises(ConfigError) as caught:
        batchgen.score(tmp_path / "out", **options)
    assert problem in str(caught.value)


KEYED = {"gold": "right", "gold_path": "gold.csv", "on": "gold"}
"""The input's column `gold` is what rows are found by."""


@pytest.mark.parametrize("name", ["gold.csv", "gold.tsv", "gold.jsonl", "gold.parquet"])
def test_right_labels_of_a_file_of_their_own(tmp_path: Path, name: str) -> None:
    rows = [(ODD[0], 1), (ODD[1], 2), (ODD[2], 3), (ODD[3], None), ("no label", 5), (ODD[4], 6)]
    given = {"gold": [1, 2, 5, 6, 77], "right": [ODD[0], ODD[0], ODD[2], None, ODD[1]]}
    frame, path = pl.DataFrame(given), tmp_path / name
    if name == "gold.parquet":
        frame.write_parquet(path)
    elif name == "gold.jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_csv(path, separator="\t" if name == "gold.tsv" else ",")
    job = job_of(tmp_path, rows, score={**KEYED, "gold_path": name})
    (figure,) = [one["figure"] for one in batchgen.run(job).gate if one["name"] == "min_accuracy"]
    found = batchgen.score(job)
    assert (found.num_rows, found.num_without_gold, found.num_unanswered) == (3, 3, 1)
    assert found.accuracy == figure == pytest.approx(1 / 3)
    asked = {"gold": "right", "gold_path": path, "on": "gold"}
    assert batchgen.score(tmp_path / "out", **asked).accuracy == found.accuracy
    options = ("--gold", "right", "--gold-path", path, "--on", "gold")
    told = run_cli("score", tmp_path / "out", *options).stdout
    assert told.startswith(f"gen_label against right of {path}, snapshot 1: 3 rows with a gold")


@pytest.mark.parametrize(
    ("score", "content", "problem"),
    [
        ({}, None, "gold_path: {}: cannot be read: No such file"),
        ({}, "gold,wrong\n1,a\n", 'gold_path: {}: cannot be read: unable to find column "right"'),
        ({}, "gold,right\n1,a\n1,b\n", "gold_path: {}: gold = '1' is in several rows"),
        ({"on": None}, "gold,right\n", "on: missing, expected a column"),
        (
            {"on": "tolt"},
            "gold,right\n",
            "on: no column 'tolt' in the output; did you mean 'told'?",
        ),
        ({"gold": None}, "gold,right\n", "gold: missing, expected the column"),
        ({"gold_path": "gold.xlsx"}, "x", "gold_path: {}: cannot be read: {}: is a spreadsheet"),
    ],
)
def test_a_file_of_right_labels_that_does_not_fit_is_refused(
    tmp_path: Path, score: dict[str, Any], content: str | None, problem: str
) -> None:
    table = {name: value for name, value in {**KEYED, **score}.items() if value is not None}
    job = job_of(tmp_path, [(ODD[0], "1")], score=table)
    path = tmp_path / table["gold_path"]
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="score") as caught:
        batchgen.run(job)
    assert problem.replace("{}", str(path)) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_column_that_holds_no_labels_is_not_counted_for_ever(tmp_path: Path) -> None:
    job = job_of(tmp_path, [(ODD[0], f"text {number}") for number in range(1001)])
    batchgen.run(job)
    with pytest.raises(ConfigError, match="more than 1,000 values, expected labels"):
        batchgen.score(job, gold="gold")


def test_nothing_published_and_nothing_to_score(tmp_path: Path) -> None:
    job = job_of(tmp_path, [(ODD[0], None)])
    with pytest.raises(OutputError, match="nothing is published here"):
        batchgen.score(job, gold="gold")
    batchgen.run(job)
    found = batchgen.score(job, gold="gold")
    assert (found.num_rows, found.accuracy, found.labels) == (0, None, [])
    assert "0 rows with a gold label, 1 without" in found.as_text()


@pytest.mark.parametrize("gold", [[1, 0], [True, False]])
def test_gold_labels_of_other_types_are_texts(tmp_path: Path, gold: list[Any]) -> None:
    choice = [str(value).lower() for value in gold]
    rows = [(choice[0], gold[0]), (choice[1], gold[1]), (choice[0], gold[1])]
    job = job_of(tmp_path, rows, output={"choice": choice}, score={"gold": "gold"})
    gate = batchgen.run(job).gate
    assert [one["figure"] for one in gate if one["name"] == "min_accuracy"] == [2 / 3]
    assert batchgen.score(job).accuracy == 2 / 3


def test_fields_of_a_schema_are_scored_one_by_one(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"label": {"enum": ["a", "b"]}, "mood": {"enum": ["x", "y"]}},
        "required": ["label", "mood"],
    }
    rows = [(json.dumps({"label": label, "mood": "x"}), "a") for label in "aab"]
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for flatten, answer in ((False, "gen_output.label"), (True, "gen_label")):
        output = {"schema": "schema.json", "flatten": flatten, "path": f"out{flatten}"}
        score = {"gold": "gold", "answer": answer}
        job = job_of(tmp_path, rows, output=output, score=score)
        batchgen.run(job)
        assert batchgen.score(job).accuracy == pytest.approx(2 / 3)
        with pytest.raises(ConfigError, match="answer: missing, expected answer with one of gen_"):
            batchgen.score(tmp_path / f"out{flatten}", gold="gold")


class FakeSide:
    """What `_calibration` asks of a snapshot, whose probabilities need a model."""

    def __init__(self, rows: list[tuple[str, str, dict[str, float | None]]]) -> None:
        kind = pl.Struct({"a": pl.Float32, "b": pl.Float32})
        names = ("gold", "gen_label", "gen_probabilities")
        self.frame = pl.DataFrame(
            rows, schema=dict(zip(names, (pl.String, pl.String, kind), strict=True)), orient="row"
        ).lazy()
        self.schema = self.frame.collect_schema()
        self.labels = {"label": pl.col("gen_label")}
        self.plan = type("plan", (), {"prefix": "gen_"})


def calibrated(rows: list[tuple[str, str, dict[str, float | None]]], wanted: float) -> Calibration:
    found = _calibration(FakeSide(rows), pl.col("gold"), "label", len(rows), wanted)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_probabilities_are_held_against_how_often_they_are_right() -> None:
    rows = [("a", "a", {"a": 0.95, "b": 0.05})] * 18 + [("b", "a", {"a": 0.95, "b": 0.05})] * 2
    rows += [("a", "b", {"a": 0.4, "b": 0.6})] * 6 + [("b", "b", {"a": 0.4, "b": 0.6})] * 4
    rows += [("b", "b", {"a": None, "b": None})]  # Nobody knows: left out.
    found = calibrated(rows, 0.85)
    assert found.num_rows == 30
    assert [(one["from"], one["num_rows"]) for one in found.bins] == [(0.6, 10), (0.9, 20)]
    assert [one["accuracy"] for one in found.bins] == [0.4, 0.9]
    assert found.expected_error == pytest.approx((0.2 * 10 + 0.05 * 20) / 30, abs=1e-6)
    assert found.brier == pytest.approx(
        (18 * 0.05**2 + 2 * 0.95**2 + 6 * 0.6**2 + 4 * 0.4**2) / 30, abs=1e-6
    )
    assert found.threshold == pytest.approx(0.95)
    assert (found.threshold_precision, found.threshold_share) == (0.9, 20 / 31)
    assert calibrated(rows, 0.99).threshold is None


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.booleans()), min_size=1),
    st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
def test_the_threshold_is_the_least_that_is_precise_enough(
    rows: list[tuple[float, bool]], wanted: float
) -> None:
    frame = pl.DataFrame(rows, schema={"p": pl.Float64, "right": pl.Boolean}, orient="row")
    precise = []
    for at in sorted({p for p, _ in rows}):
        kept = [right for p, right in rows if p >= at]
        if sum(kept) / len(kept) >= wanted:
            precise.append((at, len(kept) / len(rows)))
    found = _threshold(frame, len(rows), wanted)
    if any(right for _, right in rows):
        told = (found.get("threshold"), found.get("threshold_share"))
        assert told == (precise[0] if precise else (None, None))
    else:
        assert "threshold" not in found


def test_without_scikit_learn_there_is_a_line_that_says_so(tmp_path: Path) -> None:
    job = job_of(tmp_path, [(ODD[0], ODD[0])], score={"gold": "gold"})
    batchgen.run(job)  # The gate needs none.
    code = (
        "import sys; sys.modules['sklearn'] = None; from batchgen.cli import main; "
        f"sys.argv = ['batchgen', 'score', {str(job)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "scikit-learn is not installed: pip install scikit-learn" in done.stderr
