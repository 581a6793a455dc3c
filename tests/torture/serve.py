"""kill -9 to `batchgen serve` while clients upload, create, poll and cancel.

    python -m tests.torture.serve --kills 500

What must hold, whenever it dies: a batch whose creation was answered is there and ends; each of its
lines is in exactly one of its two files; a file that is listed is whole. Prints what was seen.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import openai

from tests.serving import CHAT, ENDS, SLOW, Server, lines_of, request, wait_for

CONFIG = f"{SLOW}\n[serve]\nmax_batches = 100000\nmax_files = 100000\nat_once = 2\n"
MOST_LIVE = 4
"""Batches, so that all of them have ended soon after the last kill."""


@dataclass
class Seen:
    """What clients were told, and what was wrong."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Batch -> its lines, for each that was accepted."""
    files: dict[str, int] = field(default_factory=dict)
    """File -> its bytes, for each that was accepted."""
    ended: set[str] = field(default_factory=set)
    """Batches that were seen to have ended."""
    num_lost_replies: int = 0
    wrong: list[str] = field(default_factory=list)


def main() -> int:
    """Run it; return how much was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-") as name:
        seen, states = run(Path(name) / "root", args.kills, args.seed)
    print(f"{args.kills} kills: {len(seen.sizes)} batches {dict(states)}, {len(seen.files)} files,")
    print(f"{seen.num_lost_replies} replies lost, {len(seen.wrong)} wrong")
    for text in seen.wrong[:20]:
        print(f"  {text}")
    return len(seen.wrong)


def run(root: Path, num_kills: int, seed: int) -> tuple[Seen, Counter[str]]:
    """Kill a server so often; look at all that it was given."""
    rng, seen, is_over = random.Random(seed), Seen(), threading.Event()
    server = Server(root, CONFIG)
    clients = [
        threading.Thread(target=call, args=(server, seen, random.Random(seed + at), is_over))
        for at in (1, 2)
    ]
    for client in clients:
        client.start()
    try:
        for _ in range(num_kills):
            time.sleep(rng.uniform(0.0, 2.5))
            server.end(signal.SIGKILL)
            server.start()
    finally:
        is_over.set()
        for client in clients:
            client.join()
    states: Counter[str] = Counter()
    with server.client() as client:
        for name, size in seen.sizes.items():
            states[look(client, name, size, seen)] += 1
        for name, size in seen.files.items():
            if len(client.files.content(name).content) != size:
                seen.wrong.append(f"{name}: not the bytes that were sent")
    server.end()
    return seen, states


def call(server: Server, seen: Seen, rng: random.Random, is_over: threading.Event) -> None:
    """Be a client that is never tired."""
    with server.client(max_retries=0, timeout=30) as client:
        while not is_over.is_set():
            try:
                act(client, seen, rng)
            except openai.NotFoundError as error:
                seen.wrong.append(f"what was accepted is not there: {error}")
            except (openai.APIConnectionError, openai.InternalServerError):
                seen.num_lost_replies += 1
                is_over.wait(0.1)


def act(client: openai.OpenAI, seen: Seen, rng: random.Random) -> None:
    """Do one of the things that clients do."""
    live = [name for name in seen.sizes if name not in seen.ended]
    if len(live) < MOST_LIVE and (rng.random() < 0.3 or not live):
        size = rng.randint(1, 60)
        data = "\n".join(json.dumps(request(at)) for at in range(size)).encode()
        file = client.files.create(file=("in.jsonl", data), purpose="batch")
        seen.files[file.id] = len(data)
        told = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        seen.sizes[client.batches.create(**told).id] = size
    elif rng.random() < 0.2:
        with suppress(openai.BadRequestError):
            client.batches.cancel(rng.choice(live))
    else:
        found = client.batches.retrieve(rng.choice(live))
        if found.status in ENDS:
            seen.ended.add(found.id)
        time.sleep(0.05)


def look(client: openai.OpenAI, name: str, size: int, seen: Seen) -> str:
    """Await a batch's end; return it, and note what is wrong with its lines."""
    wait_for(lambda: client.batches.retrieve(name).status in ENDS)
    batch = client.batches.retrieve(name)
    told = [*lines_of(client, batch.output_file_id), *lines_of(client, batch.error_file_id)]
    if sorted(line["custom_id"] for line in told) != sorted(f"row-{at}" for at in range(size)):
        seen.wrong.append(f"{name}, {batch.status}: {len(told)} lines of {size}")
    return str(batch.status)


if __name__ == "__main__":
    raise SystemExit(main())
