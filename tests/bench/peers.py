"""batchgen beside its peers: the same rows, model and engine options; time, and what a crash costs.

    python -m tests.bench.peers --model sample_data/model --prompts FILE \
        --python ray=/path/to/python --python distribatch=... --python saturate=...

Each peer is a process of its own, started anew for each run, as its documentation has it
(`peer_program`, `peer_kinds`). One that is not installed is told, with how to install it.

First table, for each peer: seconds from the start of its process to its end; seconds from the
moment when its engine could take requests (told by a plugin inside every engine, see
`peer_marks`) to the last write to its files; that time as a multiple of batchgen's; rows
answered; requests that the engine finished. What a peer does while its engine starts is in the
whole time only. A client's server is started beforehand and is not counted.

Second table: SIGKILL to all of a peer's processes, and to its server, once its engine has
answered half of the rows. Rows that were durable then; the time of a second run, as the
documentation says to start it; rows that the engine had to answer again for it; rows that are
twice or not at all in the output then.

One peer (distribatch) has no `ignore_eos`, so the model is used without its end token: all answers
have `max_tokens` tokens. Equal lengths favor whoever waits for the slowest row of a chunk.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchgen.engine.devices import device_name
from batchgen.engine.vllm.settings import is_cpu_build
from tests.bench import peer_marks, works
from tests.bench.peer_kinds import PEERS, Order, Peer
from tests.bench.peer_runs import Crash, PeerError, Ran, Stage, crash, time_once

CPU_OPTIONS = {"max_num_seqs": 64, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
GPU_OPTIONS = {"gpu_memory_utilization": 0.9}
END_TOKENS = {
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
    "tokenizer_config.json": "eos_token",
}
VERSIONS = """
import importlib.metadata as m, json, sys
def version(name):
    names = [name, *m.packages_distributions().get(name, ())]
    for name in names:
        try:
            return m.version(name)
        except m.PackageNotFoundError:
            pass
print(json.dumps([version(name) for name in sys.argv[1:]]))
"""


@dataclass
class Seen:
    """What was measured of one peer."""

    version: str
    times: list[Ran] = field(default_factory=list)
    num_rows: int = 0
    crashes: list[Crash] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Of a field of its runs."""
        return float(statistics.median(getattr(ran, name) for ran in self.times))


Measure = Callable[[Peer, Stage, int, Seen], None]


def main() -> None:
    """Run all peers, print both tables."""
    args = _arguments()
    pythons = dict(entry.split("=", 1) for entry in args.python)
    peers = [one for one in PEERS if not args.peer or {one.package, one.name} & {*args.peer}]
    seen: dict[str, Seen] = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        plugin = peer_marks.install(folder / "plugin")
        order = _order(args, folder)
        stages = {}
        for peer in peers:
            python = pythons.get(peer.package, sys.executable)
            if (version := _version(python, peer)) is None:
                print(f"{peer.name}: not installed: {peer.hint}")
                continue
            stages[peer.name] = Stage(order, python, plugin, args.limit_s)
            seen[peer.name] = Seen(version)
        ready = [peer for peer in peers if peer.name in stages]
        for _ in range(args.repeats):
            for peer in ready:
                if not peer.only_crash:
                    _try(_time, peer, stages[peer.name], args.rows, seen)
        for peer in ready if args.crash else ():
            _try(_crash, peer, stages[peer.name], args.rows, seen)
        print(_conditions(args, order))
    ready = [peer for peer in ready if peer.name in seen]
    _print_times(ready, seen, args.rows)
    if args.crash:
        _print_crashes(ready, seen, args.rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument(
        "--option", action="append", default=[], help="engine option for all, KEY=JSON"
    )
    parser.add_argument(
        "--python", action="append", default=[], help="PEER=interpreter that has it installed"
    )
    parser.add_argument("--peer", action="append", help="this package or peer only")
    parser.add_argument("--repeats", type=int, default=1, help="of the first table")
    parser.add_argument("--no-crash", dest="crash", action="store_false", help="no second table")
    parser.add_argument("--limit-s", type=float, default=900.0, help="for one run")
    args = parser.parse_args()
    packages = {peer.package for peer in PEERS}
    named = [entry.partition("=")[0] for entry in args.python]
    known = packages | {peer.name for peer in PEERS}
    if unknown := ({*named} - packages) | ({*(args.peer or ())} - known):
        parser.error(f"{sorted(unknown)}: expected names of {sorted(known)}")
    return args


def _order(args: argparse.Namespace, folder: Path) -> Order:
    is_cpu = is_cpu_build()
    given = {key: json.loads(value) for key, value in (o.split("=", 1) for o in args.option)}
    users = works.cycle(works.read_questions(args.prompts), args.rows)
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number, user in enumerate(users):
            file.write(json.dumps({"id": f"row-{number:07d}", "user": user}) + "\n")
    return Order(
        model=_without_end(args.model.resolve(), folder / "model"),
        rows=rows,
        options={
            "max_model_len": args.max_model_len,
            **(CPU_OPTIONS if is_cpu else GPU_OPTIONS),
            **given,
        },
        sampling={"temperature": 0.0, "max_tokens": args.max_tokens, "ignore_eos": True},
        is_cpu=is_cpu,
    )


def _without_end(model: Path, folder: Path) -> Path:
    """The model with no token that ends an answer; its weights are linked."""
    folder.mkdir()
    for path in model.iterdir():
        if path.name in END_TOKENS:
            told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            told.pop(END_TOKENS[path.name], None)
            (folder / path.name).write_text(json.dumps(told), encoding="utf-8")
        else:
            (folder / path.name).symlink_to(path)
    return folder


def _version(python: str, peer: Peer) -> str | None:
    """Of the peer, and of the vLLM that it finds; None if either is missing."""
    command = [python, "-c", VERSIONS, peer.package, "vllm"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    own, engine = json.loads(told)
    if own is None or engine is None:
        return None
    return f"vllm {engine}" if peer.package == "vllm" else f"{own}, vllm {engine}"


def _try(measure: Measure, peer: Peer, stage: Stage, num_rows: int, seen: dict[str, Seen]) -> None:
    """A peer that fails is told and left out; the others go on."""
    if peer.name not in seen:
        return
    try:
        measure(peer, stage, num_rows, seen[peer.name])
    except PeerError as error:
        print(f"does not run: {error}", flush=True)
        del seen[peer.name]


def _time(peer: Peer, stage: Stage, _num_rows: int, seen: Seen) -> None:
    ran, seen.num_rows = time_once(peer, stage)
    seen.times.append(ran)
    print(f"{peer.name}: {ran}, {seen.num_rows} rows", flush=True)


def _crash(peer: Peer, stage: Stage, num_rows: int, seen: Seen) -> None:
    seen.crashes.append(crash(peer, stage, num_rows))
    print(f"{peer.name}: {seen.crashes[-1]}", flush=True)


def _conditions(args: argparse.Namespace, order: Order) -> str:
    options = ", ".join(f"{key} {value}" for key, value in order.options.items())
    return (
        f"\n{device_name()}, Python {platform.python_version()}; {args.model.name}, {options}; "
        f"{args.rows} rows of {args.prompts.name}, {args.max_tokens} tokens out each; "
        f"{args.repeats} run(s), medians"
    )


def _print_times(peers: list[Peer], seen: dict[str, Seen], num_rows: int) -> None:
    print("\n| peer | version | whole, s | engine ready, s | x batchgen | answered | asked |")
    print("|---|---|---|---|---|---|---|")
    ours = seen["batchgen"].median("ready_s") if "batchgen" in seen else None
    for peer in peers:
        if (told := seen[peer.name]).times:
            whole_s, ready_s = told.median("whole_s"), told.median("ready_s")
            ratio = f"{ready_s / ours:.2f}" if ours else ""
            start = " (+ server)" if peer.needs_server else ""
            print(
                f"| {peer.name} | {told.version} | {whole_s:.1f}{start} | {ready_s:.1f} | {ratio} "
                f"| {told.num_rows} of {num_rows} | {told.median('num_asked'):.0f} |"
            )


def _print_crashes(peers: list[Peer], seen: dict[str, Seen], num_rows: int) -> None:
    print(
        "\n| peer | saves | answered when killed | durable | second run: how | whole, s "
        "| engine ready, s | answered again | twice in the output | missing |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for peer in peers:
        for one in seen[peer.name].crashes:
            repeated = one.num_answered + one.again.num_asked - num_rows
            print(
                f"| {peer.name} | {peer.saves} | {one.num_answered} | {one.num_durable} "
                f"| {peer.again} | {one.again.whole_s:.1f} | {one.again.ready_s:.1f} "
                f"| {repeated} | {one.num_twice} | {one.num_missing} |"
            )


if __name__ == "__main__":
    main()
