"""The commit record: what goes into a part's footer comes out, and nothing else passes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.records import Ranges, RowSet
from batchgen.store.books import FOOTER_KEY, PartFooter

FOOTER = PartFooter(
    plan="plan-a",
    epoch=3,
    run_id="run-1",
    done=RowSet({0: Ranges.of([0, 1, 5]), 7: Ranges.of([2])}),
    num_ok=2,
    num_errors=1,
    num_skipped=1,
    engine={"engine": "fake", "version": "7"},
    tally={"verdict": {"ok": 2, "error": 1}},
)


def changed(**fields):
    content = json.loads(FOOTER.to_metadata()[FOOTER_KEY])
    content |= fields
    return {FOOTER_KEY: json.dumps(content).encode()}


def test_the_footer_is_this_json_under_this_key():
    (found,) = FOOTER.to_metadata().items()
    assert found == (
        b"batchgen",
        b'{"plan":"plan-a","epoch":3,"run_id":"run-1","done":{"0":[0,2,5,6],"7":[2,3]},'
        b'"num_ok":2,"num_errors":1,"num_skipped":1,"engine":{"engine":"fake","version":"7"},'
        b'"tally":{"verdict":{"ok":2,"error":1}}}',
    )


def test_a_footer_comes_back_as_it_went():
    assert PartFooter.from_metadata(FOOTER.to_metadata()) == FOOTER
    assert FOOTER.num_results == 3


@pytest.mark.parametrize("tally", [{"verdict": 3}, {"verdict": {"ok": "2"}}, [1], 7])
def test_a_tally_that_is_no_counts_is_no_footer(tally):
    with pytest.raises(ValueError, match="no batchgen footer"):
        PartFooter.from_metadata(changed(tally=tally))


@given(
    st.dictionaries(st.integers(0, 2**31 - 1), st.sets(st.integers(0, 2**40)), max_size=4),
    st.data(),
)
def test_any_ordinals_come_back(rows, data):
    num_rows = sum(map(len, rows.values()))
    num_ok = data.draw(st.integers(0, num_rows))
    num_errors = data.draw(st.integers(0, num_rows - num_ok))
    done = RowSet({segment: Ranges.of(numbers) for segment, numbers in rows.items()})
    rows = {segment: numbers for segment, numbers in rows.items() if numbers}
    footer = PartFooter(
        "p", 1, "r", done, num_ok, num_errors, num_rows - num_ok - num_errors, {"note": "\u00e9\n"}
    )
    again = PartFooter.from_metadata(footer.to_metadata())
    assert again == footer
    assert {segment: set(ranges) for segment, ranges in again.done.items()} == rows


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        (None, "no batchgen footer"),
        ({}, "no batchgen footer"),
        ({b"ARROW:schema": b"x"}, "no batchgen footer"),
        ({FOOTER_KEY: b""}, "empty document"),
        ({FOOTER_KEY: b'{"plan": "pl'}, "unexpected end of data"),
        ({FOOTER_KEY: b'{"plan": "\xff"}'}, "decode"),
        ({FOOTER_KEY: b"[]"}, "no batchgen footer"),
        ({FOOTER_KEY: b"{}"}, "no batchgen footer"),
        ({FOOTER_KEY: b'{"done": {}}'}, "no batchgen footer"),
        (changed(done=[]), "no batchgen footer"),
        (changed(done={"x": [0, 1]}), "invalid literal"),
        (changed(done={"0": [3, 1]}), "not a list of ranges"),
        (changed(colour=1), "no batchgen footer.*colour"),
        (changed(num_ok="2"), "no batchgen footer"),
        (changed(num_ok=3), "footer names 4 rows, but counts 5"),
        (changed(num_errors=0), "footer names 4 rows, but counts 3"),
        (changed(num_skipped=0), "footer names 4 rows, but counts 3"),
        (changed(done={"0": [0, 2]}), "footer names 2 rows, but counts 4"),
    ],
)
def test_what_is_not_a_balanced_footer_is_refused(metadata, why):
    with pytest.raises(ValueError, match=why):
        PartFooter.from_metadata(metadata)
