"""The report in a real browser: at three widths, light and dark, and on paper."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright

import batchgen
from batchgen.report_page.facts import ReportOptions, gather
from batchgen.report_page.page import render
from tests.unit.test_report import HOSTILE, SAMPLES, tables_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(NAMES)}"),
    # As playwright leaves its driver's transport to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a second night with labels, hostile texts, errors, charts and a death."""
    folder = tmp_path_factory.mktemp("report")
    labels = ["billing and payment", "refund", "x" * 70]
    long = "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 " * 90
    texts = [labels[at % 3] for at in range(60)]
    rows = [
        json.dumps({"text": text, "subject": HOSTILE[at % len(HOSTILE)], "w" * 90: "w" * 900})
        for at, text in enumerate(texts)
    ]
    rows += [json.dumps({"text": None, "subject": long}), "{bad"]
    job = tables_of(folder, rows)
    job["output"]["choice"] = labels
    batchgen.run(job)
    (folder / "in.jsonl").write_text("\n".join(rows[:40] + rows[58:]) + "\n", encoding="utf-8")
    facts = gather(Path(batchgen.run(job).output), ReportOptions())
    facts.samples, facts.deaths = SAMPLES, [(250.0, "CUDA error: out of memory")]
    path = folder / "report.html"
    path.write_text(render(facts), encoding="utf-8")
    return path


SEEN = """() => {
    const wide = document.documentElement;
    const out = [...document.querySelectorAll('body *')].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width && (box.right > wide.clientWidth + 1 || box.left < -1)
            && !e.closest('.scroll') && !e.closest('svg svg, svg g');
    });
    const luminance = color => {
        const [r, g, b] = color.match(/[0-9.]+/g).map(Number).map(
            v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const words = 'p, dd, dt, td, th, h1, h2, h3, h4, li';
    const contrasts = [...document.querySelectorAll(words)].map(e => {
        let behind = e;
        while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)'
            && behind.parentElement) behind = behind.parentElement;
        const [a, b] = [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor]
            .map(luminance).sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    });
    const narrow = [...document.querySelectorAll('.bars td:first-child, dd')].filter(
        e => e.getBoundingClientRect().width < 60 && e.textContent.length > 12);
    const chart = document.querySelector('figure svg text');
    return {
        width: wide.scrollWidth, client: wide.clientWidth, out: out.length,
        contrast: Math.min(...contrasts), narrow: narrow.length,
        charts: document.querySelectorAll('figure svg').length,
        text: chart.getBoundingClientRect().height,
        scripts: document.scripts.length, owned: window.owned ?? null,
        paper: luminance(getComputedStyle(document.body).backgroundColor),
    };
}"""


def look(browser: Browser, report: Path, width: int, **how: Any) -> dict[str, Any]:
    """What a browser makes of the page, and all that it asked for or complained of."""
    media = how.pop("media", "screen")
    page = browser.new_page(viewport={"width": width, "height": 900}, **how)
    asked: list[str] = []
    told: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.on("dialog", lambda dialog: told.append(dialog.message))
    page.emulate_media(media=media)
    page.goto(report.as_uri())
    seen = page.evaluate(SEEN)
    page.close()
    return {**seen, "asked": len(asked), "told": told}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_it_fits_and_can_be_read(browser: Browser, report: Path, width: int, scheme: str) -> None:
    seen = look(browser, report, width, color_scheme=scheme)
    assert (seen["width"], seen["out"], seen["narrow"]) == (width, 0, 0), seen
    assert seen["contrast"] >= 4.5
    assert seen["charts"] == 4
    assert seen["text"] >= 9
    assert (seen["paper"] > 0.5) == (scheme == "light")
    assert (seen["asked"], seen["told"], seen["scripts"], seen["owned"]) == (1, [], 0, None)


def test_on_paper_it_is_black_on_white(browser: Browser, report: Path) -> None:
    seen = look(browser, report, 700, color_scheme="dark", media="print")
    assert seen["paper"] == 1
    assert seen["contrast"] >= 4.5
    assert (seen["width"], seen["out"]) == (700, 0)
    page = browser.new_page()
    page.goto(report.as_uri())
    assert 3 <= len(re.findall(rb"/Type /Page\b", page.pdf(format="A4"))) <= 12
    page.close()


def test_the_policy_holds_should_markup_ever_come_in(browser: Browser, report: Path) -> None:
    """What escaping keeps out: a script, a handler, a style, a picture from elsewhere."""
    wrong = (
        "<script>window.owned = 1</script><svg onload='window.owned = 2'></svg>"
        "<img src='http://127.0.0.1:9/x' onerror='window.owned = 3'>"
        "<p style='position:fixed' id=styled></p>"
    )
    path = report.with_name("wrong.html")
    text = report.read_text(encoding="utf-8")
    path.write_text(text.replace("<ul class", f"{wrong}<ul class", 1), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    assert page.evaluate("window.owned ?? null") is None
    assert page.evaluate("getComputedStyle(document.getElementById('styled')).position") == "static"
    page.close()
