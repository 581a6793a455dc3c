"""Two nights on a real GPU: rows computed in the second one = rows edited.

    python -m tests.gpu.nights

Labels the sample as `jobs/quickstart.toml` does, edits 1 % of it in place, labels it again.
Prints one JSON line.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import batchgen

ROOT = Path(__file__).parents[2]
EVERY = 100
COLUMNS = ("ticket_id", "gen_label", "gen_text", "gen_run_id", "gen_latency_s")


def main() -> None:
    """Run both nights and print what they did."""
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(_nights(Path(name))))


def _nights(folder: Path) -> dict[str, Any]:
    source = folder / "tickets.jsonl"
    # Bytes: some of the sample's lines are broken on purpose.
    lines = (ROOT / "sample_data" / "tickets.jsonl").read_bytes().splitlines()
    source.write_bytes(b"\n".join(lines) + b"\n")
    job = ROOT / "jobs" / "quickstart.toml"
    sets = [f"input.path={source}", f"output.path={folder / 'out'}"]
    first = batchgen.run(job, overrides=sets)
    before = batchgen.read(folder / "out").select(COLUMNS).collect()
    edited = 0
    for at in range(0, len(lines), EVERY):
        row = json.loads(lines[at])
        lines[at] = json.dumps({**row, "body": f"{row['body']} Please hurry."}).encode()
        edited += 1
    source.write_bytes(b"\n".join(lines) + b"\n")
    second = batchgen.run(job, overrides=sets)
    after = batchgen.read(folder / "out").select(COLUMNS).collect()
    pairs = zip(before.iter_rows(), after.iter_rows(), strict=True)
    return {
        "engine": first.engine,
        "rows": len(lines),
        "edited": edited,
        "computed": second.run["num_ok"] + second.run["num_errors"],
        "carried": second.num_carried,
        "unlike": sum(was != now for was, now in pairs),
        "elapsed_s": [first.elapsed_s, second.elapsed_s],
    }


if __name__ == "__main__":
    main()
