"""The page about a run: what it tells, that data cannot make anything else of it, its size."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import batchgen
from batchgen.api import job_run
from batchgen.api.endings import look_back
from batchgen.cli import cli
from batchgen.core.errors import GateError, OutputError
from batchgen.job.load import parse_job
from batchgen.pipeline.context import RunOptions, StopSwitch
from batchgen.report_page.charts import charts
from batchgen.report_page.facts import ReportOptions, gather
from batchgen.report_page.page import MOST_BYTES, Texts, render, write_report
from batchgen.store.books import STATE

HOSTILE = [
    "</script><script>alert(1)</script>",
    '<svg onload="alert(1)"><img src=x onerror=alert(1)>',
    "\"' onmouseover='alert(1)' style='position:fixed",
    "{{ 7 * 7 }}{% for x in range(9) %}{{ x }}{% endfor %}",
    "</title></style></dd></dl><base href=//evil.example>",
    "\u202eevil\u2066\u200b\x1b]0;owned\x07\x00\x85",
    "&lt;b&gt; &#x3c;i&#x3e; javascript:alert(1)",
    "]]><!--<?xml --!>",
]
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "footer", "section", "article"),
    *("h1", "h2", "h3", "h4", "p", "strong", "b", "ul", "li", "div", "dl", "dt", "dd", "code"),
    *("table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("svg", "rect", "g", "path", "line", "text"),
}
OFF = {"checks": {"allow_truncated": True}, "gate": {"max_error_rate": 1.0}}


class Page(HTMLParser):
    """A page, parsed as a browser would."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        self.text = "\n".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_harmless(html: str) -> Page:
    """Nothing in the page but what it is made of."""
    page = Page(html)
    assert page.tags <= TAGS
    assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
    assert not {"src", "href", "srcdoc", "action", "formaction"} & set(page.attributes)
    odd = {c for c in html if unicodedata.category(c) in {"Cc", "Cf", "Cs"} and c not in "\n\t"}
    assert odd == set()
    assert "default-src 'none'; style-src 'sha256-" in html
    assert len(html.encode()) <= MOST_BYTES
    return page


def tables_of(folder: Path, lines: list[str], **tables: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "input": {"path": str(folder / "in.jsonl")},
        "prompt": {"user": "{{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 40, "temperature": 0},
        "output": {"path": str(folder / "out")},
        **OFF,
        **tables,
    }


def page_of(summary: Any) -> str:
    return Path(summary.summary_path).with_name("report.html").read_text(encoding="utf-8")


def lines_of(*texts: Any, **columns: Any) -> list[str]:
    return [json.dumps({"id": at, "text": text, **columns}) for at, text in enumerate(texts)]


def test_a_run_writes_a_page_that_tells_what_came_of_it(tmp_path: Path) -> None:
    job = tables_of(tmp_path, [*lines_of("yes", "no", None, "yes"), "{bad"])
    job["output"]["choice"] = ["yes", "no"]
    summary = batchgen.run(job)
    page = check_harmless(page_of(summary))
    told = " ".join(page.text.split())
    assert "Complete: 3 of 5 rows ok, 2 errors (40.0 %)" in told
    assert "null_value: 1 rows, such as" in told
    assert "bad_json: 1 rows, such as" in told
    assert f"row 2 of {tmp_path / 'in.jsonl'} (line 3)" in told
    assert "There is no last snapshot to compare with." in told
    assert "echo 1 on none" in told
    assert batchgen.__version__ in told
    (tmp_path / "in.jsonl").write_text("\n".join(lines_of("no", "no", "no", "yes")) + "\n")
    page = check_harmless(page_of(batchgen.run(job)))
    assert "drift 0.417" in " ".join(page.text.split())
    assert re.search(r"no\s+3\s+75.0\xa0%\s+33.3\xa0%\s+\+41.7", page.text)


def test_hostile_texts_are_texts_in_values_in_names_and_in_paths(tmp_path: Path) -> None:
    folder = tmp_path / "it's <svg onload=alert(1)>\u202e\x1b[2J"
    rows = [
        json.dumps({"text": text, text: {"a": [text]}, "x" + text[:5]: text}) for text in HOSTILE
    ]
    job = tables_of(folder, [*rows, "{bad <script>", '{"text": null}'])
    job["prompt"]["system"] = HOSTILE[0]
    summary = batchgen.run(job)
    for _ in range(2):  # Sampled and, for the report, the same again.
        html = page_of(summary)
        page = check_harmless(html)
        assert "&lt;script" in html
        assert "<svg onload" in page.text
    write_report(Path(summary.output), ReportOptions(), tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == html


@given(st.text(max_size=2000), st.integers(1, 700))
def test_any_text_is_cut_and_printable(text: str, most: int) -> None:
    shown = Texts()(text, most)
    assert not {c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs"}} - {
        *"\n\t\u200c\u200d"
    }
    assert (len(text) > most) == shown.endswith(" characters)") or text.endswith(" characters)")


def test_all_texts_together_are_bounded() -> None:
    texts = Texts(1000)
    shown = [texts("<" * 100) for _ in range(50)]
    assert shown[0] == "<" * 100
    assert shown[-1] == "\u2026"
    assert sum(len(text) * 4 for text in shown if text != "\u2026") <= 1000


def test_the_page_is_small_whatever_the_output_is(tmp_path: Path) -> None:
    wide = {f"{'c<' * 400}{at}": "\u2603<&" * 1000 for at in range(60)}
    lines = [json.dumps({"text": "<\u202e" * 500_000, **wide}), *lines_of(*["x"] * 9, **wide)]
    choice = [f"<label {at} {'&' * 300}" for at in range(300)]
    job = tables_of(tmp_path, lines, sampling={"max_tokens": 4, "temperature": 0})
    job["prompt"]["system"] = "<" * 100_000
    job["output"]["choice"] = choice
    summary = batchgen.run(job)
    html = page_of(summary)
    check_harmless(html)
    assert " characters)" in html  # Which rows are drawn is another in each run.


CANARY = "canary-7f3a"


def test_without_rows_no_text_of_a_row_is_anywhere(tmp_path: Path) -> None:
    rows = [
        *(json.dumps({"id": CANARY, "text": f"{CANARY} {at}", CANARY: CANARY}) for at in range(5)),
        json.dumps({"text": None, "id": CANARY}),
        f'{{"text": {CANARY}',
    ]
    run = {"report": "no-rows"}
    hold = {"max_error_rate": 0.0}
    job = tables_of(tmp_path, rows, run=run, gate=hold)
    job["output"]["choice"] = ["yes", "no"]  # Each row's error quotes its answer.
    with pytest.raises(GateError, match="max_error_rate = 0"):
        batchgen.run(job)
    (path,) = (tmp_path / "out" / STATE / "runs").glob("*/report.html")
    html = path.read_text(encoding="utf-8")
    page = check_harmless(html)
    assert CANARY not in html
    assert "Held back by the gate" in page.text
    assert "schema_violation: 5 rows" in page.text
    assert "There is no text of a row in this file." in page.text
    summary = batchgen.run({**job, "gate": {"max_error_rate": 1.0}})
    assert CANARY not in page_of(summary)
    write_report(tmp_path / "out", ReportOptions())
    assert CANARY in page_of(summary)
    done = CliRunner().invoke(cli, ["report", str(tmp_path / "out"), "--no-rows"])
    assert done.stdout.strip() == str(Path(summary.summary_path or "").with_name("report.html"))
    assert CANARY not in page_of(summary)


def test_examples_of_a_prompt_are_data_too(tmp_path: Path) -> None:
    prompt = {"user": "{{ text }}", "examples": [{"user": CANARY, "assistant": "a"}]}
    job = tables_of(tmp_path, lines_of("a"), prompt=prompt)
    root = Path(batchgen.run(job).output)
    assert CANARY in render(gather(root, ReportOptions()))
    assert CANARY not in render(gather(root, ReportOptions(with_rows=False)))


@pytest.mark.parametrize(
    "lines",
    [[], [""], ["{bad"], lines_of(None, None), ['{"text": ""}']],
    ids=["no line", "blank", "bad", "nulls", "empty"],
)
def test_of_an_output_with_little_in_it(tmp_path: Path, lines: list[str]) -> None:
    job = tables_of(tmp_path, lines, gate={"max_error_rate": 1.0, "max_shrink": 1.0})
    job["input"]["types"] = {"text": "string"}
    summary = batchgen.run(job)
    check_harmless(page_of(summary))


def test_a_run_may_leave_none(tmp_path: Path) -> None:
    summary = batchgen.run(tables_of(tmp_path, lines_of("a"), run={"report": "none"}))
    assert not Path(summary.summary_path or "").with_name("report.html").exists()
    assert "report  " not in summary.as_text()


def test_of_a_run_that_was_stopped_or_killed_or_lost_its_figures(tmp_path: Path) -> None:
    job = tables_of(tmp_path, lines_of("a", "b"))
    stop = StopSwitch()
    stop.ask()
    config = parse_job(job, base=tmp_path, where="job")
    stopped = job_run(config, stop, RunOptions()).run()
    assert stopped.state == "stopped"
    assert "Stopped on purpose, with work left" in page_of(stopped)
    summary = batchgen.run(job)
    folder, root = Path(summary.summary_path or "").parent, tmp_path / "out"
    (folder / "stats.parquet").unlink()
    check_harmless(render(gather(root, ReportOptions(), summary.run_id)))
    (folder / "summary.json").unlink()
    html = render(gather(root, ReportOptions(), summary.run_id))
    assert "Killed, or the machine went down" in html
    check_harmless(html)
    for other in folder.parent.iterdir():
        shutil.rmtree(other)
    with pytest.raises(OutputError, match="left no figures"):
        gather(tmp_path / "out", ReportOptions())


def test_a_damaged_output_is_told_with_the_rest(tmp_path: Path) -> None:
    job = tables_of(tmp_path, lines_of("a", "b"))
    summary = batchgen.run(job)
    (file,) = (tmp_path / "out" / STATE / "files").glob("*.parquet")
    file.chmod(0o644)
    file.write_bytes(b"x" * file.stat().st_size)
    html = render(gather(tmp_path / "out", ReportOptions()))
    assert "its rows cannot be read" in check_harmless(html).text
    config = parse_job(job, base=tmp_path, where="job")
    shutil.rmtree(Path(summary.summary_path or "").parent)
    before = list(summary.warnings)
    summary.error_examples.clear()
    look_back(config, summary)  # Its folder is gone: a report may fail, a run does not.
    assert summary.exit_code == 0
    assert len(summary.warnings) - len(before) <= 1


SAMPLES = [
    {
        "elapsed_s": 5.0 * at,
        "requests_per_s": 40.0 + at % 7,
        "prompt_tokens_per_s": 4000.0,
        "output_tokens_per_s": 500.0,
        "num_running": 64,
        "num_waiting": at % 5,
        "kv_cache_usage": None if at < 9 else 0.5,
        "gpu_busy": None,
    }
    for at in range(100)
]


def test_charts_are_made_of_what_is_known_and_small() -> None:
    drawn = charts(SAMPLES, [250.0])
    assert list(drawn) == [
        *("Rows a second", "Tokens a second", "KV cache and GPU", "Requests in the engine")
    ]
    for svg in drawn.values():
        page = Page(svg)
        assert page.tags <= TAGS
        assert "style" not in page.attributes
        assert len(svg) < 40_000
        assert "var(--bad)" in svg  # The death.
        assert ("in" in page.texts) == ("out" in page.texts)  # A legend, where there are two.
    assert "GPU busy" not in drawn["KV cache and GPU"]
    assert charts(SAMPLES[:2], []) == {}


def test_without_the_library_there_is_a_table(tmp_path: Path) -> None:
    facts = gather(Path(batchgen.run(tables_of(tmp_path, lines_of("a"))).output), ReportOptions())
    facts.samples = SAMPLES
    with_charts = Page(render(facts))
    without = Page(render(facts, draw=lambda *_: {}))
    assert "figure" in with_charts.tags
    assert "figure" not in without.tags
    assert "The extra report draws charts of it." in " ".join("".join(without.texts).split())
    assert "4,000" in without.text


def test_a_price_tells_what_rows_cost(tmp_path: Path) -> None:
    job = tables_of(tmp_path, lines_of("a", "b"), run={"gpu_cost": "3600 EUR"})
    summary = batchgen.run(job)
    (cost,) = re.findall(r"([\d.,]+) EUR, [\d.,]+ EUR in all", page_of(summary))
    assert float(cost.replace(",", "")) == pytest.approx(500 * summary.run["elapsed_s"], rel=0.01)


def test_only_a_few_row_groups_are_read_of_a_long_output(tmp_path: Path) -> None:
    """A million rows: figures of narrow columns, texts of a handful of rows."""
    job = tables_of(tmp_path, lines_of(*["x"] * 8))
    summary = batchgen.run(job)
    (file,) = (tmp_path / "out" / STATE / "files").glob("*.parquet")
    small = pq.read_table(file)
    big = pa.concat_tables([small] * 2048).combine_chunks()
    file.unlink()
    with pq.ParquetWriter(file, big.schema) as writer:
        for _ in range(61):
            writer.write_table(big)
    facts = gather(tmp_path / "out", ReportOptions())
    assert facts.num_looked == 61 * 2048 * 8
    assert 1 <= len(facts.rows) <= 5
    assert facts.trouble == ""
    check_harmless(render(facts))
    assert summary.state == "complete"


@pytest.mark.parametrize("kind", ["full", "no-rows"])
def test_the_score_is_told_and_gold_labels_are_data(tmp_path: Path, kind: str) -> None:
    rows = [json.dumps({"text": "yes", "right": right}) for right in ("yes", CANARY, "yes", "yes")]
    job = tables_of(tmp_path, rows, run={"report": kind}, score={"gold": "right"})
    job["output"]["choice"] = ["yes", "no"]
    page = check_harmless(page_of(batchgen.run(job)))
    assert "accuracy 75.0%, macro F1" in page.text
    assert (CANARY in page.text) == (kind == "full")
