"""What is generated from the code: the editor schema and the README's option table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args, get_origin

from batchgen.job.load import json_schema
from batchgen.job.model import JobConfig, Table

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "jobs" / "job.schema.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- options -->\n", "<!-- /options -->"


def schema_text() -> str:
    """The editor schema as `batchgen schema` prints it."""
    return json.dumps(json_schema(), indent=1) + "\n"


def option_table() -> str:
    """Every key of a job file with its default and meaning."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for table, field in JobConfig.model_fields.items():
        model = field.annotation
        is_list = get_origin(model) is list
        model = get_args(model)[0] if is_list else model
        assert isinstance(model, type)
        assert issubclass(model, Table)
        for name, key in model.model_fields.items():
            default = "required" if key.is_required() else _shown(key.default)
            shown = f"[{table}].{key.alias or name}" if is_list else f"{table}.{key.alias or name}"
            lines.append(f"| `{shown}` | {default} | {_one_line(key.description)} |")
    return "\n".join(lines) + "\n"


def _shown(default: object) -> str:
    return "" if default in (None, "", {}, []) else f"`{json.dumps(default)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def readme_text() -> str:
    """The README with its generated block renewed."""
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{option_table()}{END}{tail}"


def main() -> None:
    """Rewrite both files."""
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    README.write_text(readme_text(), encoding="utf-8")
    sys.stdout.write("docs are up to date\n")


if __name__ == "__main__":
    main()
