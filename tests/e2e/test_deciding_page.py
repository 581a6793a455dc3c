"""The commands of docs/guide/deciding.md do what the page says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import batchgen
from tests.e2e.support import run_cli, write_job

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "deciding.md"


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = ["BILL", "bill", "HELP", "help"]
    rows = [
        {"id": n, "body": labels[n % 4], "channel": "web", "gold_label": labels[n % 3]}
        for n in range(60)
    ]
    rows[7]["body"] = "neither"
    Path("in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gold = [f"{row['id']},{row['gold_label']}" for row in rows]
    Path("gold.csv").write_text("\n".join(["id,right_label", *gold]))
    job = write_job(
        tmp_path,
        "in.jsonl",
        prompt={"user": "{{ body }}"},
        output={"path": "out/labels", "choice": labels},
        score={"gold": "gold_label", "answer": "gen_label", "precision": 0.95},
        gate={"max_error_rate": 0.5},
    )
    job.rename("labels.toml")
    text = PAGE.read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        done = run_cli(*words)
        code = int(found[1]) if (found := re.search(r"# exits with (\d+)", line)) else 0
        assert (program, done.returncode) == ("batchgen", code), f"{line}\n{done.stderr}"
    assert Path("differ.parquet").exists()
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    told: dict[str, object] = {"batchgen": batchgen}
    exec(python, told)
    assert {path.name for path in Path("out").iterdir()} == {"labels", "upper"}
    for name in ("tried", "both", "score"):
        assert not repr(told[name]).startswith(type(told[name]).__name__)
        assert json.dumps(told[name].as_dict())  # type: ignore[attr-defined]
