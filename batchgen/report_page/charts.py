"""Charts over time, as SVG in the page's own colors; made of numbers only.

Vega-Lite's own renderer (vl-convert, the extra `report`) draws them in a process of its own, so
that nothing of it can end the run that is reported: it brings a JavaScript engine, which aborts
where memory is limited. Without it there are no charts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Sample = Mapping[str, Any]

_CHARTS = {
    "Rows a second": ({"rows": "requests_per_s"}, "s"),
    "Tokens a second": ({"in": "prompt_tokens_per_s", "out": "output_tokens_per_s"}, "s"),
    "KV cache and GPU": ({"KV cache": "kv_cache_usage", "GPU busy": "gpu_busy"}, "%"),
    "Requests in the engine": ({"running": "num_running", "waiting": "num_waiting"}, "d"),
}
"""Title -> its lines, name -> column of stats.parquet, and the form of its axis."""
_FORMS = {"s": "~s", "%": ".0%", "d": "~s"}
_LEAST_SAMPLES = 3
_WAIT_S = 30.0


def charts(samples: Sequence[Sample], deaths: Sequence[float]) -> dict[str, str]:
    """Draw what is known of the run over time: title -> SVG.

    Args:
        samples: Rows of stats.parquet.
        deaths: When engines died, in seconds.

    Returns:
        Nothing if vl-convert is missing or fails, or where there are too few samples.
    """
    if len(samples) < _LEAST_SAMPLES:
        return {}
    unit_s, unit = (60.0, "minutes") if samples[-1]["elapsed_s"] > 300 else (1.0, "seconds")
    specs = {}
    for title, (lines, form) in _CHARTS.items():
        points = [
            {"t": float(sample["elapsed_s"]) / unit_s, "v": float(value), "of": name}
            for name, column in lines.items()
            for sample in samples
            if (value := sample.get(column)) is not None
        ]
        if points:
            marks = [{"t": float(death) / unit_s} for death in deaths]
            specs[title] = _spec(points, marks, _FORMS[form], unit)
    drawn = _drawn(list(specs.values()))
    return dict(zip(specs, drawn, strict=True)) if len(drawn) == len(specs) else {}


def _spec(
    points: Sequence[Sample], marks: Sequence[Sample], form: str, unit: str
) -> dict[str, Any]:
    axis = {"grid": False, "tickCount": 5}
    x = {"field": "t", "type": "quantitative", "title": unit, "axis": axis}
    y_axis = {"format": form, "tickCount": 4}
    y = {"field": "v", "type": "quantitative", "title": None, "axis": y_axis}
    names = list(dict.fromkeys(point["of"] for point in points))
    colors = {"domain": names, "range": ["var(--one)", "var(--two)"][: len(names)]}
    legend = {"orient": "top", "title": None, "symbolType": "stroke"} if len(names) > 1 else None
    color = {"field": "of", "type": "nominal", "scale": colors, "legend": legend}
    lines = {
        "data": {"values": points},
        "mark": {"type": "line", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": y, "color": color},
    }
    rules = {
        "data": {"values": marks},
        "mark": {"type": "rule", "color": "var(--bad)", "strokeDash": [4, 3]},
        "encoding": {"x": {"field": "t", "type": "quantitative"}},
    }
    words = {"labelColor": "var(--quiet)", "titleColor": "var(--quiet)"}
    return {
        "width": 290,
        "height": 120,
        "layer": [lines, rules] if marks else [lines],
        "config": {
            "background": None,
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": {
                **words,
                "gridColor": "var(--line)",
                "domainColor": "var(--line)",
                "tickColor": "var(--line)",
                "titleFontWeight": "normal",
            },
            "legend": words,
        },
    }


def _drawn(specs: Sequence[Mapping[str, Any]]) -> list[str]:
    try:
        done = subprocess.run(  # noqa: S603 - this very file
            [sys.executable, __file__],
            input=json.dumps(specs).encode(),
            capture_output=True,
            timeout=_WAIT_S,
            check=True,
        )
        return [str(svg) for svg in json.loads(done.stdout)]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def main() -> None:
    """Draw the charts that stdin describes."""
    import vl_convert

    specs = json.load(sys.stdin)
    sys.stdout.write(json.dumps([vl_convert.vegalite_to_svg(spec) for spec in specs]))


if __name__ == "__main__":
    main()
