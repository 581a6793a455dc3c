"""Which row of a snapshot is which of another, and how two of them are compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.core.errors import ConfigError, OutputError
from batchgen.source.text import DIGEST_BYTES
from batchgen.storage import LocalStorage
from batchgen.store.books import STATE, Manifest, PublishedFile, Segment
from batchgen.store.ledger import Ledger
from batchgen.store.matching import Span, digests_of
from batchgen.views.diff import diff
from batchgen.views.pairing import edited, paired
from batchgen.views.rows import Shown, rows
from tests.fakes import plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from batchgen.store.books import Plan

# --- pairing ------------------------------------------------------------------------------------


def put_file(storage: LocalStorage, name: str, lines: str, *, has_digests: bool = True) -> Segment:
    """An input file as planned; a letter is a line."""
    digest = hashlib.sha256(lines.encode()).hexdigest()
    if has_digests:
        data = b"".join(line.encode().ljust(DIGEST_BYTES, b"-") for line in lines)
        storage.put_if_absent(digests_of(digest), data)
    return Segment(f"/in/{name}.jsonl", len(lines), "1", digest, len(lines))


def pairs_of(spans: Sequence[Span], old: str, new: str) -> list[str]:
    """`a-b`: line a of the old file has become line b."""
    return [
        f"{old[span.old_start + at]}-{new[span.start + at]}"
        for span in spans
        for at in range(span.length)
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("abcd", "abcd", "a-a b-b c-c d-d"),
        ("abcd", "abcdef", "a-a b-b c-c d-d"),
        ("abcd", "cd", "c-c d-d"),
        ("abcd", "aXcd", "a-a b-X c-c d-d"),
        ("abcd", "XYcd", "a-X b-Y c-c d-d"),
        ("abcd", "abXY", "a-a b-b c-X d-Y"),
        ("abcd", "aXYcd", "a-a c-c d-d"),  # Nobody can tell which of X, Y was b.
        ("abcd", "aXd", "a-a d-d"),
        ("abcd", "aXcdY", "a-a b-X c-c d-d"),
        ("abcd", "XabYd", "a-a b-b c-Y d-d"),
        ("abcd", "WXYZ", "a-W b-X c-Y d-Z"),
        ("abcd", "XY", ""),
        ("abcd", "", ""),
        ("", "ab", ""),
    ],
)
def test_rows_between_the_same_neighbours_are_edited_rows(storage, old, new, expected):
    before = replace(plan(), segments=[put_file(storage, "f", old)])
    after = replace(plan(), segments=[put_file(storage, "f", new)], plan_id="plan-b", number=2)
    assert pairs_of(paired((storage, before), (storage, after)), old, new) == expected.split()


def test_rows_of_a_file_without_digests_are_paired_by_their_number(storage):
    before = replace(plan(), segments=[put_file(storage, "f", "abc", has_digests=False)])
    after = replace(plan(), segments=[put_file(storage, "f", "Xb", has_digests=False)], number=2)
    assert pairs_of(paired((storage, before), (storage, after)), "abc", "Xb") == ["a-X", "b-b"]


def test_a_row_that_moved_is_not_also_an_edited_one(storage):
    old, new = [put_file(storage, "f", "abcd")], [put_file(storage, "f", "aXYdb")]
    # X and Y stand where b and c did, but b has gone behind d.
    spans = [Span(0, 0, 0, 0, 1), Span(0, 3, 0, 3, 1), Span(0, 4, 0, 1, 1)]
    assert list(edited(storage, spans, old, new)) == []


def test_files_are_told_apart(storage):
    old = [put_file(storage, "f", "ab"), put_file(storage, "g", "cd")]
    new = [put_file(storage, "e", "xy"), put_file(storage, "f", "aX"), put_file(storage, "g", "cY")]
    before, after = replace(plan(), segments=old), replace(plan(), segments=new, number=2)
    assert paired((storage, before), (storage, after)) == [
        Span(1, 0, 0, 0, 1),
        Span(1, 1, 0, 1, 1),
        Span(2, 0, 1, 0, 1),
        Span(2, 1, 1, 1, 1),
    ]


# --- comparing ----------------------------------------------------------------------------------


class Nights:
    """Snapshots made by hand, of one input file each night."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ledger = Ledger(LocalStorage(root))
        self._number = 0

    def publish(
        self,
        lines: str,
        columns: Mapping[str, Sequence[Any]],
        *,
        tally: Mapping[str, Mapping[str, int]] | None = None,
        **changes: Any,
    ) -> None:
        """A snapshot with a row for each line, in files of two rows, or of `size`."""
        self._number += 1
        size = changes.pop("size", 2)
        prefix = changes.pop("prefix", "gen_")
        kind = changes.pop("schema", None)
        carried = [name for name in columns if not name.startswith(prefix)]
        made = self._plan(lines, carried, prefix)
        self.ledger.put_plan(made)
        folder = f"{STATE}/snapshots/e{self._number:06d}"
        table = pa.table(
            {**columns, f"{prefix}status": columns.get(f"{prefix}status", ["ok"] * len(lines))},
            schema=kind,
        )
        parts = [
            self._put(f"{folder}/part-{at:05d}.parquet", table.slice(at, size), size)
            for at in range(0, max(len(lines), 1), size)
        ]
        self.ledger.put_manifest(
            Manifest(
                number=self._number,
                plan_id=made.plan_id,
                epoch=self._number,
                run_id=f"run-{self._number}",
                created_at="",
                files=parts,
                num_planned=len(lines),
                num_ok=len(lines),
                num_errors=0,
                num_skipped=0,
                tally=tally or {},
            )
        )

    def _plan(self, lines: str, carried: Sequence[str], prefix: str) -> Plan:
        return replace(
            plan(),
            number=self._number,
            plan_id=f"plan-{self._number}",
            job={"recipe": {}, "input": {}, "output": {"prefix": prefix}},
            carried=carried,
            segments=[put_file(self.ledger.storage, "f", lines)],
        )

    def _put(self, name: str, table: pa.Table, size: int) -> PublishedFile:
        path = self.ledger.storage.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=size)
        data = path.read_bytes()
        order, digest = int(name[-13:-8]) + 1, hashlib.sha256(data).hexdigest()
        return PublishedFile(name, table.num_rows, len(data), digest, order=order)


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    return Nights(tmp_path / "out")


def test_rows_that_came_went_and_changed_are_counted_by_position(nights):
    nights.publish("abcde", {"id": [*"abcde"], "gen_text": [*"12345"]})
    nights.publish("abXeYZ", {"id": [*"abXeYZ"], "gen_text": [*"19x5yz"]})
    found = diff(nights.root)
    # c and d stand where X does now: one of them may have become it, and nobody knows which.
    assert (found.num_old, found.num_new, found.num_same) == (5, 6, 2)
    assert (found.num_added, found.num_removed) == (3, 2)
    assert (found.num_input_changed, found.num_answer_changed) == (0, 1)
    assert found.examples == [
        {"where": "/in/f.jsonl row 1", "changed": "answer", "columns": {"gen_text": ["2", "9"]}}
    ]


def test_an_edited_row_is_a_change_of_input_whatever_its_answer(nights):
    nights.publish("abc", {"id": [1, 2, 3], "text": [*"abc"], "gen_text": [*"abc"]})
    nights.publish("aXY", {"id": [1, 2, 3], "text": [*"aXY"], "gen_text": [*"abY"]})
    for on in ([], ["id"]):
        found = diff(nights.root, on=on)
        assert (found.num_input_changed, found.num_answer_changed, found.num_same) == (2, 0, 1)
        assert [example["columns"] for example in found.examples] == [
            {"text": ["b", "X"]},
            {"text": ["c", "Y"], "gen_text": ["c", "Y"]},
        ]
    assert [example["where"] for example in found.examples] == ["id = 2", "id = 3"]


def test_no_more_examples_than_asked_for(nights):
    nights.publish("abcd", {"id": [*"abcd"], "gen_text": [*"abcd"]})
    nights.publish("abcd", {"id": [*"abcd"], "gen_text": [*"ABCD"]})
    found = diff(nights.root, num_examples=2)
    assert [example["where"] for example in found.examples] == [
        "/in/f.jsonl row 0",
        "/in/f.jsonl row 1",
    ]
    assert diff(nights.root, num_examples=0).examples == []


def test_rows_in_another_order_are_the_same_by_their_key(nights):
    nights.publish("abc", {"k": [1, 1, 2], "l": [*"xyx"], "gen_text": [*"abc"]})
    nights.publish("cdb", {"k": [2, 3, 1], "l": [*"xxy"], "gen_text": [*"cdb"]})
    found = diff(nights.root, on=["k", "l"])
    assert (found.num_same, found.num_added, found.num_removed) == (2, 1, 1)
    assert found.matched_by == "k, l"


def test_what_differs_from_run_to_run_is_no_change(nights):
    same = {"id": [1, 2], "gen_text": ["a", "b"]}
    rows = {"gen_run_id": ["x", "x"], "gen_latency_s": [0.1, 0.2], "gen_attempts": [1, 1]}
    nights.publish("ab", {**same, **rows, "gen_probabilities": [{"p": 0.5}, {"p": 0.25}]})
    rows = {"gen_run_id": ["y", "x"], "gen_latency_s": [0.3, 0.2], "gen_attempts": [1, 2]}
    nights.publish("ab", {**same, **rows, "gen_probabilities": [{"p": 0.6}, {"p": 0.25}]})
    assert diff(nights.root).num_same == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ok", "error"),
        (None, "x"),
        ([1, 2], [1, 3]),
        ([], None),
        ({"a": 1, "b": None}, {"a": 1, "b": "z"}),
        ([{"t": "a", "p": 1.0}], [{"t": "a", "p": 2.0}]),
        (b"a", b"b"),
    ],
)
def test_a_change_in_a_value_of_any_type_is_seen(nights, old, new):
    kind = pa.array([old, new]).type
    schema = pa.schema([("id", pa.int64()), ("gen_output", kind), ("gen_status", pa.string())])
    nights.publish("ab", {"id": [1, 2], "gen_output": [old, old]}, schema=schema)
    nights.publish("ab", {"id": [1, 2], "gen_output": [old, new]}, schema=schema)
    found = diff(nights.root)
    assert (found.num_same, found.num_answer_changed) == (1, 1)
    shown = [value.decode() if isinstance(value, bytes) else value for value in (old, new)]
    assert found.examples[0]["columns"] == {"gen_output": shown}


def test_labels_that_moved_are_a_table_of_old_and_new(nights):
    def tally(**counts: int) -> dict[str, dict[str, int]]:
        return {"verdict": {"ok": 9}, "attempts": {"1": 9}, "gen_label": counts}

    before, after = ["x", "x", "x", "y", "y"], ["x", "y", "y", "y", "x", "x"]
    status = ["ok", "ok", "ok", "ok", "error"]  # The label of an error is none.
    nights.publish(
        "abcde",
        {"id": [*"abcde"], "gen_label": before, "gen_status": status},
        tally=tally(x=3, y=1),
    )
    nights.publish("abcdef", {"id": [*"abcdef"], "gen_label": after}, tally=tally(x=3, y=3))
    (moves,) = diff(nights.root).labels
    assert (moves.column, moves.before, moves.after) == (
        "gen_label",
        {"x": 3, "y": 1},
        {"x": 3, "y": 3},
    )
    assert moves.drift == 0.25
    assert moves.moves == [
        {"old": "x", "new": "y", "num_rows": 2},
        {"old": None, "new": "x", "num_rows": 1},
        {"old": "x", "new": "x", "num_rows": 1},
        {"old": "y", "new": "y", "num_rows": 1},
    ]


def test_labels_may_be_fields_lists_and_names_with_dots(nights):
    output = [{"label": "x", "tags": ["p", "q"], "a.b": "m"}] * 2
    columns = {"id": [1, 2], "gen_output": output, "gen_an.other": ["u", "v"]}
    names = ("gen_output.label", "gen_output.tags", "gen_output.a.b", "gen_an.other")
    for _ in range(2):
        nights.publish("ab", columns, tally={name: {} for name in names})
    found = diff(nights.root)
    assert [(moves.column, [move["new"] for move in moves.moves]) for moves in found.labels] == [
        ("gen_output.label", ["x"]),
        ("gen_output.tags", ["p, q"]),
        ("gen_output.a.b", ["m"]),
        ("gen_an.other", ["u", "v"]),
    ]
    assert all(moves.drift is None for moves in found.labels)


def test_snapshots_with_other_columns_are_compared_by_what_both_have(nights):
    nights.publish(
        "ab",
        {"id": [1, 2], "old": [1, 2], "n": [1, 2], "my_text": ["a", "b"], "my_mood": ["x", "y"]},
        tally={"my_mood": {"x": 1, "y": 1}},
        prefix="my_",
    )
    nights.publish(
        "ab",
        {"id": [1, 2], "new": [1, 2], "n": ["1", "2"], "gen_text": ["a", "c"], "gen_tone": [1, 2]},
        tally={"gen_tone": {"1": 1, "2": 1}},
    )
    found = diff(nights.root)
    assert (found.num_same, found.num_answer_changed) == (1, 1)
    assert found.columns_came == ["new", "gen_tone"]
    assert found.columns_went == ["old", "my_mood"]
    assert found.columns_retyped == ["n"]
    assert found.labels == []
    assert found.examples[0]["columns"] == {"gen_text": ["b", "c"]}


def test_rows_without_a_key_are_counted_and_left_out(nights):
    nights.publish("abc", {"id": [1, None, None], "gen_text": [*"abc"]})
    nights.publish("abcd", {"id": [1, None, 3, 4], "gen_text": [*"aXcd"]})
    found = diff(nights.root, on=["id"])
    assert (found.num_same, found.num_added, found.num_removed) == (1, 2, 0)
    assert found.num_without_key == (2, 1)


@pytest.mark.parametrize(
    ("on", "problem"),
    [
        (["id"], r"--on: id = 'b' is in 2 rows of snapshot 2, expected in one; name more columns"),
        (["idd"], r"--on: snapshot 1 has no column 'idd', expected one of: id, n, l"),
        (["n"], r"--on: n is Int64 and String, expected one plain type"),
        (["l"], r"--on: l is List\(Int64\) and List\(Int64\), expected one plain type"),
    ],
)
def test_columns_that_do_not_name_rows_are_refused(nights, on, problem):
    lists = [[1], [2], [3]]
    nights.publish("abc", {"id": [*"abc"], "n": [1, 2, 3], "l": lists})
    nights.publish("abc", {"id": [*"bba"], "n": ["1", "2", "3"], "l": lists})
    with pytest.raises(ConfigError, match=problem):
        diff(nights.root, on=on)


def test_any_two_snapshots_may_be_compared_and_others_are_refused(nights):
    for text in ("a", "b", "b"):
        nights.publish("a", {"id": [1], "gen_text": [text]})
    assert diff(nights.root).num_answer_changed == 0
    assert diff(nights.root, (1, 3)).num_answer_changed == 1
    assert diff(nights.root, (3, 1)).examples[0]["columns"] == {"gen_text": ["b", "a"]}
    with pytest.raises(OutputError, match="there is no snapshot 4, expected one of: 1, 2, 3"):
        diff(nights.root, (1, 4))


def test_one_snapshot_or_none_is_too_few(nights):
    with pytest.raises(OutputError, match="nothing is published here"):
        diff(nights.root)
    nights.publish("a", {"id": [1], "gen_text": ["a"]})
    with pytest.raises(OutputError, match="snapshot 1 is the only one, expected two to compare"):
        diff(nights.root)


def test_a_snapshot_without_rows_is_compared_too(nights):
    nights.publish("a", {"id": [1], "gen_text": ["a"]})
    schema = pa.schema([("id", pa.int64()), ("gen_text", pa.string()), ("gen_status", pa.string())])
    nights.publish("", {"id": [], "gen_text": []}, schema=schema)
    found = diff(nights.root)
    assert (found.num_removed, found.num_new) == (1, 0)


def test_a_file_that_is_gone_is_told(nights):
    for _ in range(2):
        nights.publish("ab", {"id": [1, 2], "gen_text": ["a", "b"]})
    (nights.root / STATE / "snapshots" / "e000001" / "part-00000.parquet").unlink()
    with pytest.raises(OutputError, match=r"cannot be read .* `batchgen verify JOB` tells more"):
        diff(nights.root)


@pytest.mark.parametrize("on", [[], ["id"]])
def test_of_a_large_snapshot_both_rows_of_a_pair_are_found_wherever_they_stand(nights, on):
    num_rows = 600_000  # More than are in memory at a time.
    letters = [chr(0x10000 + number) for number in range(num_rows)]
    was = {"id": letters, "gen_text": ["x"] * num_rows, "gen_l": ["a"] * num_rows}
    tally = {"gen_l": {"a": num_rows}}
    nights.publish("".join(letters), was, size=100_000, tally=tally)
    now = letters[50_000:]  # So that all rows stand elsewhere than they did.
    texts = ["y" if at in {7, 500_000} else "x" for at in range(len(now))]
    labels = ["b" if at == num_rows - 60_000 else "a" for at in range(len(now))]
    columns = {"id": now, "gen_text": texts, "gen_l": labels}
    nights.publish(
        "".join(now), columns, size=100_000, tally={"gen_l": {"a": len(now) - 1, "b": 1}}
    )
    found = diff(nights.root, on=on)
    assert (found.num_same, found.num_removed, found.num_added) == (549_997, 50_000, 0)
    assert found.num_answer_changed == 3
    assert [one["columns"].get("gen_text") for one in found.examples] == [
        ["x", "y"],
        ["x", "y"],
        None,
    ]
    moves = found.labels[0].moves
    assert [(one["old"], one["new"], one["num_rows"]) for one in moves] == [
        ("a", "a", 549_999),
        ("a", "b", 1),
    ]


def test_many_rows_in_many_files_keep_their_places(nights):
    num_rows = 3001
    letters = [chr(0x4E00 + number) for number in range(num_rows)]
    texts = [f"text {number}" for number in range(num_rows)]
    nights.publish("".join(letters), {"id": letters, "gen_text": texts})
    changed = {7, 1500, 3000}
    now = [f"{text}!" if at in changed else text for at, text in enumerate(texts)]
    del letters[100:200]
    del now[100:200]
    nights.publish("".join(letters), {"id": letters, "gen_text": now})
    found = diff(nights.root)
    assert (found.num_removed, found.num_added, found.num_answer_changed) == (100, 0, 3)
    assert [example["columns"]["gen_text"][0] for example in found.examples] == [
        "text 7",
        "text 1500",
        "text 3000",
    ]


def test_a_diff_is_plain_json(nights):
    nights.publish("ab", {"id": [1, 2], "gen_text": ["a", "b"]}, tally={})
    nights.publish("ab", {"id": [1, 2], "gen_text": ["a", "c"]}, tally={})
    found = json.loads(json.dumps(asdict(diff(nights.root))))
    assert (found["old"], found["new"], found["matched_by"]) == (1, 2, "position")


@pytest.mark.parametrize(
    ("new", "counts", "may_hide"),
    [("aXcd", (0, 0, 1), False), ("aXY", (2, 3, 0), True), ("abcdX", (1, 0, 0), False)],
)
def test_a_diff_says_that_rows_which_came_and_went_may_be_edited_ones(
    nights, new, counts, may_hide
):
    for lines in ("abcd", new):
        nights.publish(lines, {"id": list(lines), "gen_text": ["t"] * len(lines)})
    found = diff(nights.root)
    assert (found.num_added, found.num_removed, found.num_input_changed) == counts
    assert found.may_hide_edits is may_hide
    assert found.paired_by == "equal content and place in the input"
    by_key = diff(nights.root, on=["id"])
    assert (by_key.paired_by, by_key.may_hide_edits) == ("id", False)


def test_of_an_old_snapshots_damage_nobody_is_sent_to_what_reads_the_newest(nights):
    for number in (1, 2):
        nights.publish("ab", {"id": [1, 2]})
        path = nights.root / STATE / f"snapshots/e{number:06d}/part-00000.parquet"
        path.chmod(0o644)
        path.write_bytes(b"no Parquet")
    with pytest.raises(OutputError, match=r"cannot be read.*snapshot 1's files back from a backup"):
        rows(nights.root, Shown(1, snapshot=1))
    for newest in (2, None):
        with pytest.raises(OutputError, match=r"cannot be read.*`batchgen verify JOB` tells more"):
            rows(nights.root, Shown(1, snapshot=newest))
