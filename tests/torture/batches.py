"""Proof 10: `run-batch`, killed at random moments until it ends; the answers are whole or absent.

Each attempt is the real command line in a forked child. Half of the files get more requests once
they are answered: until their answers are there, those of before are.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from batchgen import cli
from tests.torture.harness import main
from tests.torture.support import Child, ProofError, replayable, spawn

if TYPE_CHECKING:
    from pathlib import Path

LINES, MORE = 60, 20
FLAGS = ("--model", "tiny", "--max-num-seqs", "16", "--step-s", "0.001", "--max-steps", "6")
SETS = ("model.backend=echo", "run.flush_rows=10", "output.rows_per_file=40")


def shard(folder: Path, seed: str, amount: int) -> Counter[str]:
    """Kill until `amount` kills are done, every file to its end."""
    counts: Counter[str] = Counter()
    number = 0
    while counts["kills"] < amount:
        moments = random.Random(f"{seed}/{number}")
        place = folder / str(number)
        place.mkdir()
        with replayable(f"seed {seed!r}, file {number}"):
            is_longer = moments.random() < 0.5
            _write(place, LINES)
            usual_s = _whole(place, None, LINES) if is_longer else 1.0
            if is_longer:
                _write(place, LINES + MORE)
            _torture(place, moments, usual_s, counts, is_longer=is_longer)
        counts["files: 0 lost, 0 doubled, 0 wrong"] += 1
        number += 1
    return counts


def _torture(
    place: Path, moments: random.Random, usual_s: float, counts: Counter[str], *, is_longer: bool
) -> None:
    before = LINES if is_longer else None
    after = LINES + MORE if is_longer else LINES
    while True:
        child = _run(place)
        if child.wait(moments.uniform(0, 1.15 * usual_s)):
            _check_end(child)
            break
        child.kill()
        counts["kills"] += child.code == -signal.SIGKILL
        if _num_answered(place) not in (before, after):
            msg = (
                f"{place}: {_num_answered(place)} lines after a kill, expected {before} or {after}"
            )
            raise ProofError(msg)
        counts["kills after the answers were there"] += _num_answered(place) == after
    _whole(place, after, after)
    if left := [path.name for path in place.iterdir() if path.suffix == ".tmp"]:
        counts["left over: temp files"] += len(left)


def _whole(place: Path, before: int | None, num: int) -> float:
    """Run to the end, check what is there; return how long it took."""
    if before is not None and _num_answered(place) != before:
        msg = f"{place}: {_num_answered(place)} lines at the end, expected {before}"
        raise ProofError(msg)
    began_s = time.monotonic()
    _check_end(_run(place).end())
    if _num_answered(place) != num:
        msg = f"{place}: {_num_answered(place)} lines after a whole run, expected {num}"
        raise ProofError(msg)
    return time.monotonic() - began_s


def _request(number: int) -> dict[str, Any]:
    said = [{"role": "user", "content": f"row {number} " + "lorem " * (number % 7)}]
    body = {"model": "tiny", "messages": said, "max_tokens": 40, "temperature": 0}
    body |= {"stream": True} if _is_bad(number) else {}
    url = "/v1/chat/completions"
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}


def _is_bad(number: int) -> bool:
    return number % 17 == 16


def _write(place: Path, num: int) -> None:
    lines = [json.dumps(_request(number)) for number in range(num)]
    (place / "in.jsonl").write_text("\n".join(lines) + "\n")


def _run(place: Path) -> Child:
    words = ["-i", place / "in.jsonl", "-o", place / "out.jsonl", *FLAGS]
    words += [word for text in SETS for word in ("--set", text)]

    def work() -> int:
        sys.argv = ["batchgen", "run-batch", *map(str, words)]
        cli.main()
        return 0

    return spawn(work, place / "report")


def _num_answered(place: Path) -> int | None:
    """How many lines there are; None without a file.

    Raises:
        ProofError: They are not those of the requests, in their order, each once.
    """
    path = place / "out.jsonl"
    if not path.exists():
        return None
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    ids = [line["custom_id"] for line in lines]
    statuses = [line["response"]["status_code"] for line in lines]
    said = [_answer(line["response"]["body"]) for line in lines]
    wanted = [_request(number) for number in range(len(lines))]
    expected = [_echoed(one["body"]["messages"][0]["content"]) for one in wanted]
    codes = [400 if _is_bad(number) else 200 for number in range(len(lines))]
    told = [None if code == 400 else answer for code, answer in zip(codes, expected, strict=True)]
    good = ids == [one["custom_id"] for one in wanted] and statuses == codes and said == told
    if not good or not text.endswith("\n"):
        msg = f"{place}: the answers are not those of the requests: {ids}, {statuses}"
        raise ProofError(msg)
    return len(lines)


def _answer(body: dict[str, Any]) -> str | None:
    return body["choices"][0]["message"]["content"] if "choices" in body else None


def _echoed(text: str) -> str:
    return text[:40]


def _check_end(child: Child) -> None:
    if child.code != 0:
        msg = f"a run ended with {child.code}: {child.told.get('text')}"
        raise ProofError(msg)


if __name__ == "__main__":
    main("tests.torture.batches", "kills", shard, 200)
