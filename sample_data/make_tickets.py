"""Writes the shipped sample, `tickets.jsonl` and `tickets.parquet`, from a fixed seed.

The JSONL file holds what real exports hold: mostly good rows, a few that were sent twice and a few
that are broken. The Parquet file holds the rows that fit its schema, so it has the null and the
empty body and none of the other faults.

Usage:
    python sample_data/make_tickets.py
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tickets import Ticket, TicketWriter

Record = dict[str, Any]

FOLDER = Path(__file__).parent
JSONL_PATH = FOLDER / "tickets.jsonl"
PARQUET_PATH = FOLDER / "tickets.parquet"
SEED = 20260105
NUM_LINES = 2000
FIRST_FAULT_LINE = 30
HARD_SHARE = 0.1
NUM_SENT_TWICE = 12
# Fault -> how many lines have it.
FAULT_COUNTS = {
    "broken_json": 3,
    "truncated": 3,
    "top_level_array": 2,
    "missing_body": 3,
    "null_body": 2,
    "empty_body": 2,
    "wrong_type_body": 3,
    "invalid_utf8": 2,
    "blank": 3,
}
# Faults that a typed column can hold.
PARQUET_FAULTS = ("null_body", "empty_body")
SCHEMA = pa.schema(
    [
        pa.field("ticket_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("channel", pa.string(), nullable=False),
        pa.field("customer_tier", pa.string(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("body", pa.string()),
        pa.field("gold_label", pa.string(), nullable=False),
        pa.field("gold_urgency", pa.string(), nullable=False),
        pa.field("hard", pa.bool_(), nullable=False),
    ]
)


def encoded(value: object) -> bytes:
    """Return the value as one line of JSON without its line end."""
    return json.dumps(value, ensure_ascii=False).encode()


def broken_json(record: Record) -> bytes:
    """Lose the comma between the first two members."""
    return encoded(record).replace(b'", "', b'" "', 1)


def truncated(record: Record) -> bytes:
    """Stop in the middle of the line, as a full disk would."""
    line = encoded(record)
    return line[: len(line) * 3 // 5]


def invalid_utf8(record: Record) -> bytes:
    """Put a Latin-1 e-acute into the body."""
    return encoded(record | {"body": f"{record['body']} Caf\0"}).replace(b"\\u0000", b"\xe9")


FAULTS: dict[str, Callable[[Record], bytes]] = {
    "broken_json": broken_json,
    "truncated": truncated,
    "top_level_array": lambda record: encoded(list(record.values())),
    "missing_body": lambda record: encoded({k: v for k, v in record.items() if k != "body"}),
    "null_body": lambda record: encoded(record | {"body": None}),
    "empty_body": lambda record: encoded(record | {"body": ""}),
    "wrong_type_body": lambda record: encoded(record | {"body": record["body"].split()[:6]}),
    "invalid_utf8": invalid_utf8,
    "blank": lambda _: b"",
}


def plan_faults(random: Random) -> dict[int, str]:
    """Return line number (from 1) -> fault, spread over the file in line order."""
    faults = [fault for fault, count in FAULT_COUNTS.items() for _ in range(count)]
    random.shuffle(faults)
    stride = (NUM_LINES - FIRST_FAULT_LINE) // len(faults)
    starts = range(FIRST_FAULT_LINE, NUM_LINES, stride)
    return {
        start + random.randrange(stride // 2): fault
        for start, fault in zip(starts, faults, strict=False)
    }


def write_tickets() -> list[Ticket]:
    """Return one good ticket for every line."""
    writer = TicketWriter("shipped", SEED, HARD_SHARE)
    return [writer.write(number) for number in range(1, NUM_LINES + 1)]


def send_twice(records: list[Record], faults: dict[int, str], random: Random) -> list[int]:
    """Repeat some subjects and bodies a few rows later, in place.

    Returns:
        The line numbers (from 1) of the repeats, ascending.
    """
    free = [n for n in range(FIRST_FAULT_LINE, NUM_LINES) if not {n, n - 3} & faults.keys()]
    lines = sorted(random.sample(free, NUM_SENT_TWICE))
    for line in lines:
        same = ("channel", "customer_tier", "subject", "body", "gold_label", "gold_urgency", "hard")
        records[line - 1] |= {key: records[line - 4][key] for key in same}
    return lines


def parquet_record(record: Record, fault: str | None) -> Record:
    """Return the record with typed values and its fault, if it has one."""
    bodies = {"null_body": None, "empty_body": ""}
    body = bodies[fault] if fault else record["body"]
    return record | {"body": body, "created_at": datetime.fromisoformat(record["created_at"])}


def write_parquet(records: list[Record], faults: dict[int, str]) -> int:
    """Write the rows that fit the schema and return their number."""
    rows = [
        parquet_record(record, faults.get(line))
        for line, record in enumerate(records, start=1)
        if faults.get(line) in (None, *PARQUET_FAULTS)
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, PARQUET_PATH, compression="zstd")
    return len(rows)


def good_records() -> list[Record]:
    """Return the shipped JSONL rows that hold a usable body, in file order."""
    records = []
    for line in JSONL_PATH.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("body"), str) and record["body"]:
            records.append(record)
    return records


def main() -> None:
    """Write both files and print what went into them."""
    random = Random(SEED)
    faults = plan_faults(random)
    records = [asdict(ticket) for ticket in write_tickets()]
    repeats = send_twice(records, faults, random)
    lines = [
        FAULTS[faults[line]](record) if line in faults else encoded(record)
        for line, record in enumerate(records, start=1)
    ]
    JSONL_PATH.write_bytes(b"\n".join(lines) + b"\n")
    num_parquet = write_parquet(records, faults)
    good = good_records()
    for fault in FAULT_COUNTS:
        print(f"{fault:16}", *(line for line, name in faults.items() if name == fault))
    print(f"{'sent_twice':16}", *repeats)
    print(f"{len(good)} good rows of {NUM_LINES} lines, {sum(r['hard'] for r in good)} hard")
    print(f"{num_parquet} rows in {PARQUET_PATH.name}")


if __name__ == "__main__":
    main()
