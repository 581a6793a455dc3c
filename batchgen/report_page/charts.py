"""Charts over time, as SVG in the page's own colors; made of numbers only.

Vega-Lite's own renderer (vl-convert, the extra `report`) draws them in a process of its own, so
that nothing of it can end the run that is reported: it brings a JavaScript engine, which aborts
where memory is limited. Without it there are no charts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Sample = Mapping[str, Any]

_CHARTS = {
    "Rows a second": ({"rows": "requests_per_s"}, "~s"),
    "Tokens a second": ({"in": "prompt_tokens_per_s", "out": "output_tokens_per_s"}, "~s"),
    "KV cache and GPU": ({"KV cache": "kv_cache_usage", "GPU busy": "gpu_busy"}, ".0%"),
    "Requests in the engine": ({"running": "num_running", "waiting": "num_waiting"}, "~s"),
}
"""Title -> its lines, name -> column of stats.parquet, and the form of its numbers."""
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
    marks = [{"t": death / 60} for death in deaths]
    specs = {}
    for title, (lines, form) in _CHARTS.items():
        points = [
            {"t": sample["elapsed_s"] / 60, "v": float(sample[column]), "of": name}
            for name, column in lines.items()
            for sample in samples
            if sample.get(column) is not None
        ]
        if len(points) > len(lines):  # A point by itself is no line.
            specs[title] = _spec(points, marks, form)
    drawn = _drawn(list(specs.values()))
    return dict(zip(specs, drawn, strict=True)) if len(drawn) == len(specs) else {}


def _spec(points: Sequence[Sample], marks: Sequence[Sample], form: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(Path(__file__).with_name("chart.json").read_bytes())
    lines, deaths = spec["layer"]
    spec["data"]["values"], deaths["data"]["values"] = points, marks
    lines["encoding"]["y"]["axis"]["format"] = form
    if len({point["of"] for point in points}) == 1:
        lines["encoding"]["color"]["legend"] = None
    return spec


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
