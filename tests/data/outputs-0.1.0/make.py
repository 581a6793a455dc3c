"""Makes the folders beside this file: jobs with the outputs that batchgen 0.1.0 left.

They were written once, by the code of commit e905896, and are not written again: later code must
go on with them. In a mount and host name space of its own, so that no path or name of the machine
is in them:

    unshare --mount --uts bash -c 'hostname nightly; mount -t tmpfs none /srv;
        PYTHONPATH=path/of/e905896 python tests/data/outputs-0.1.0/make.py'

- nights: two files of JSONL, two snapshots; the second night edited one row and added three.
- interrupted: a run that was killed with parts written and nothing published.
- csv, parquet: one night each.
- binary: text in a binary column, which 0.1.0 printed as Python does: b'Caf\\xc3...'.
- tojson: a template that writes JSON, which 0.1.0 escaped for HTML, and asks for a default.
- turns: chats, some of which end with the assistant: 0.1.0 began a new turn after it.
- mark: a prompt file with a byte order mark, which 0.1.0 put into every prompt.
"""

from __future__ import annotations

import datetime
import json
import shutil
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
WORK = Path("/srv/labels")
"""Where the jobs ran: the paths in their plans begin so."""

ECHO = '[model]\nbackend = "echo"\n[model.engine]\n'
NIGHTS = f"""\
[input]
path = "data/*.jsonl"

[prompt]
user = "{{{{ text }}}}"

{ECHO}max_model_len = 200

[sampling]
max_tokens = 100
temperature = 0

[output]
path = "out"
schema = "ticket.schema.json"
flatten = true

[gate]
max_error_rate = 0.5
"""
INTERRUPTED = f"""\
[input]
path = "in.jsonl"

[prompt]
user = "Repeat: {{{{ text }}}}"

{ECHO}max_num_seqs = 1
step_s = 0.02

[sampling]
max_tokens = 40
temperature = 0.7

[output]
path = "out"

[checks]
allow_truncated = true

[run]
flush_rows = 10
order = "input"
"""
CSV = f"""\
[input]
path = "in.csv"
types = {{ id = "int64", score = "float64" }}
where = "score > 0"

[prompt]
user = "{{{{ text }}}}"

{ECHO}
[sampling]
max_tokens = 16
temperature = 0

[output]
path = "out"
choice = ["refund", "invoice", "other"]
with_seed = true

[gate]
max_error_rate = 0.5
"""
PARQUET = f"""\
[input]
path = "data"

[prompt]
system = "Repeat."
user = "{{{{ name }}}} has {{{{ tags | join(', ') }}}} since {{{{ day }}}}"

{ECHO}
[sampling]
max_tokens = 60
temperature = 1
n = 2

[output]
path = "out"
prefix = "llm_"
rows_per_file = 12

[checks]
allow_truncated = true
"""
BINARY = f"""\
[input]
path = "in.parquet"

[prompt]
user = "{{{{ text }}}}"

{ECHO}
[sampling]
max_tokens = 100
temperature = 0

[output]
path = "out"

[gate]
max_error_rate = 0.5
"""
TOJSON = BINARY.replace("in.parquet", "in.jsonl").replace(
    "{{ text }}", "{{ facts|tojson }} {{ note|default('none') }} {{ facts.a.b|default('-') }}"
)
MARK = BINARY.replace("in.parquet", "in.jsonl").replace(
    'user = "{{ text }}"', 'user_file = "prompt.jinja"'
)
TURNS = TOJSON[: TOJSON.index("user =")] + 'messages = "chat"\n\n' + TOJSON[TOJSON.index(ECHO) :]
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["refund", "invoice", "other"]},
        "urgency": {"type": "integer", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"type": "string"}},
        "who": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
    "required": ["label"],
}


def ticket(number: int) -> dict[str, object]:
    """A row whose text is its answer; every sixth has the text of another, every ninth a wrong one.

    Columns of several types are carried, some of them with nulls.
    """
    of = number % 18
    answer = {
        "label": ["refund", "invoice", "other"][of % 3],
        "urgency": 1 + of % (9 if of == 17 else 5),
        "tags": ["a", "b", "ä"][: of % 4],
        "who": {"name": f"n {of}"},
    }
    return {
        "id": number,
        "text": json.dumps(answer, ensure_ascii=False),
        "score": None if number % 7 == 3 else number / 4,
        "flag": number % 2 == 0,
        "at": f"2026-11-{1 + number % 28:02d}T12:00:00Z",
        "meta": {"k": number, "of": ["x", None]},
        "list": list(range(number % 3)),
    }


def write_tickets(path: Path, rows: list[object]) -> None:
    """JSONL; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def batchgen(*args: str) -> list[str]:
    """The command line of 0.1.0."""
    return [sys.executable, "-m", "batchgen", *args]


def make_nights() -> None:
    """Two snapshots."""
    (WORK / "data").mkdir()
    (WORK / "ticket.schema.json").write_text(json.dumps(SCHEMA, indent=1) + "\n")
    (WORK / "job.toml").write_text(NIGHTS)
    first: list[object] = [ticket(number) for number in range(24)]
    first[5], first[11] = '{"id": 5, "text": ', ""
    second: list[object] = [ticket(number) for number in range(100, 112)]
    second[4] = {**ticket(104), "text": "long " * 60}
    write_tickets(WORK / "data/a.jsonl", first)
    write_tickets(WORK / "data/b.jsonl", second)
    subprocess.run(batchgen("run", "job.toml"), cwd=WORK, check=True)
    second[2] = {**ticket(102), "text": '{"label":"other","urgency":2}'}
    write_tickets(WORK / "data/b.jsonl", [*second, *(ticket(n) for n in range(112, 115))])
    subprocess.run(batchgen("run", "job.toml"), cwd=WORK, check=True)


def make_interrupted() -> None:
    """Killed once two parts are there."""
    (WORK / "job.toml").write_text(INTERRUPTED)
    rows: list[object] = [{"id": n, "text": f"row {n}", "note": None} for n in range(40)]
    write_tickets(WORK / "in.jsonl", rows)
    run = subprocess.Popen(batchgen("run", "job.toml"), cwd=WORK)
    while len(list(WORK.glob("out/_batchgen/parts/*.parquet"))) < 2:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()


def make_csv() -> None:
    """Fields with quotes, delimiters and line breaks in them, and a row too wide."""
    (WORK / "job.toml").write_text(CSV)
    lines = ["id,text,score,note"]
    for n in range(24):
        text = ["refund", "invoice", "other", "maybe"][n % 4]
        note = ["plain", '"a, b"', '"said ""no"""', '"two\nlines"', ""][n % 5]
        lines.append(f"{n},{text},{n % 6},{note}")
    lines[8] += ",one,two"
    (WORK / "in.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(batchgen("run", "job.toml"), cwd=WORK, check=True)


def make_binary() -> None:
    """UTF-8 but for one row; a null."""
    (WORK / "job.toml").write_text(BINARY)
    texts = [b"Caf\xc3\xa9", b"plain", None, b"Gr\xc3\xb6\xc3\x9fe", b"\xff\xfe", b"plain", b"end"]
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.binary())})
    pq.write_table(table, WORK / "in.parquet")
    subprocess.run(batchgen("run", "job.toml"), cwd=WORK, check=True)


def make_tojson() -> None:
    """What needs no escapes, what does, a null where there is a default, and nothing to look in."""
    (WORK / "job.toml").write_text(TOJSON)
    facts = [{"a": {"b": 1}}, {"a": {"b": "Müller & <Söhne>"}}, {"a": {"b": 2}}, {"a": None}]
    notes = ["x", "y", None, "z"]
    rows = [{"facts": fact, "note": note} for fact, note in zip(facts, notes, strict=True)]
    write_tickets(WORK / "in.jsonl", list(rows))
    subprocess.run(batchgen("run", "job.toml", "--publish-anyway"), cwd=WORK, check=True)


def make_mark() -> None:
    """Two rows."""
    (WORK / "job.toml").write_text(MARK)
    (WORK / "prompt.jinja").write_text("\ufeffSay {{ text }}", encoding="utf-8")
    write_tickets(WORK / "in.jsonl", [{"text": "a"}, {"text": "b"}])
    subprocess.run(batchgen("run", "job.toml"), cwd=WORK, check=True)


def make_turns() -> None:
    """Three chats; with two of them 0.1.0 did not go on."""
    (WORK / "job.toml").write_text(TURNS)
    asks = {"role": "user", "content": "How?"}
    said = [[], [{"role": "assistant", "content": "So:"}]]
    rows: list[object] = [{"id": at, "chat": [asks, *said[at % 2]]} for at in range(3)]
    rows.append({"id": 3, "chat": [asks, {"role": "assistant", "content": "Thus: "}]})
    write_tickets(WORK / "in.jsonl", rows)
    subprocess.run(batchgen("run", "job.toml"), cwd=WORK, check=True)


def make_parquet() -> None:
    """Nested and temporal types; two answers a row; several published files."""
    (WORK / "data").mkdir()
    (WORK / "job.toml").write_text(PARQUET)
    day = datetime.date(2026, 11, 1)
    schema = pa.schema(
        [
            ("name", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("day", pa.date32()),
            ("at", pa.timestamp("us", tz="UTC")),
            ("price", pa.decimal128(8, 2)),
            ("who", pa.struct([("id", pa.int32()), ("ok", pa.bool_())])),
            ("raw", pa.binary()),
            ("kind", pa.dictionary(pa.int32(), pa.string())),
        ]
    )
    for number, count in enumerate((20, 10)):
        rows = [
            {
                "name": f"name {n}",
                "tags": ["x", "y"][: n % 3],
                "day": day + datetime.timedelta(days=n),
                "at": None
                if n % 5 == 4
                else datetime.datetime(2026, 11, 1, n % 24, tzinfo=datetime.UTC),
                "price": Decimal(n) / 4,
                "who": {"id": n, "ok": n % 2 == 0},
                "raw": bytes([n, 255 - n]),
                "kind": ["red", "green"][n % 2],
            }
            for n in range(100 * number, 100 * number + count)
        ]
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, WORK / f"data/{number}.parquet", row_group_size=8)
    subprocess.run(batchgen("run", "job.toml"), cwd=WORK, check=True)


def main() -> None:
    """Make every folder that is not there."""
    made = (make_nights, make_interrupted, make_csv, make_parquet, make_binary)
    for make in (*made, make_tojson, make_mark, make_turns):
        target = HERE / make.__name__.removeprefix("make_")
        if target.exists():
            continue
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir(parents=True)
        make()
        shutil.copytree(WORK, target)


if __name__ == "__main__":
    main()
