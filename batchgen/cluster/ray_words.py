"""What Ray says of a worker's end, in one line for people. Imports nothing of Ray."""

from __future__ import annotations

import re

_MAX_CHARS = 400
_NODE = re.compile(r"^\s*ip: (\S+)", re.MULTILINE)
_START_NODE = re.compile(r"\(pid=\d+, ip=([^,)]+)")
_EXIT = re.compile(r"Worker exit detail: (.*?)(?= Some common causes|\s*$)", re.DOTALL)
_SIGNS = ("End of file", "connection error code")
_MEMORY = re.compile(r"Memory on the node \(IP: ([^,\s]+).*?\) was (.*?)(?:,| \(|\n|$)")
_IS_INDENTED = re.compile(r"^\s")


def one_line(text: str) -> str:
    """A text without line ends, and not longer than a warning may be."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARS else line[: _MAX_CHARS - 4] + " ..."


def end_of_traceback(text: str) -> str:
    """What was raised: all that follows the last line of code."""
    lines = text.rstrip().splitlines()
    last_code = max((n for n, line in enumerate(lines) if _IS_INDENTED.match(line)), default=-1)
    return one_line("\n".join(lines[last_code + 1 :]) or text)


def death_told(text: str) -> str:
    """Why an actor is dead.

    Args:
        text: An `ActorDiedError`'s: some `key: value` lines, then the reason.

    Source:
        ray/exceptions.py, ActorDiedError; src/ray/gcs/actor and node_manager.cc for the reasons
        themselves, 2.52 to 2.60.
    """
    found = _NODE.search(text)
    node = f" on {found[1]}" if found else ""
    _, _, rest = text.partition(found[0]) if found else ("", "", text)
    if exit_found := _EXIT.search(text):
        detail = one_line(exit_found[1])
        if any(sign in detail for sign in _SIGNS):
            return f"its process{node} was killed or crashed, often the kernel out of memory"
        return f"its process{node} ended: {detail}"
    if "node has died" in text:
        lines = [line.strip(" \t:") for line in rest.splitlines() if line.startswith("\t")]
        cause = lines[-1].removeprefix("the actor's node was ") if lines else "no cause given"
        return f"its node{node.removeprefix(' on')} died: {cause}"
    if "killed by `ray.kill`" in text:
        return f"its process{node} was killed by a call of ray.kill"
    return _start_told(text) if "raised in its creation task" in text else one_line(rest)


def _start_told(text: str) -> str:
    found = _START_NODE.search(text)
    told = f"it does not start{f' on {found[1]}' if found else ''}: {end_of_traceback(text)}"
    if "failed to import" in text:
        told += "; the same batchgen has to be installed on every node"
    return told


def memory_told(text: str) -> str:
    """Why Ray's memory monitor killed an actor: the text of an `OutOfMemoryError`."""
    found = _MEMORY.search(text)
    told = f" on {found[1]}: {one_line(found[2])}" if found else ""
    return f"Ray's memory monitor killed its process, memory ran low{told}"


def refusal(address: str | None, error: Exception) -> str:
    """Why Ray did not start, or did not let us in."""
    told = one_line(str(error))
    if address is None:
        return f"Ray does not start on this machine: {told}"
    return (
        f"[run] ray_address = {address!r}: {told}; expected a running cluster that this machine "
        "is a node of: `ray start --head` on one, `ray start --address=HOST:6379` on the others, "
        "the same versions of Ray and Python on all"
    )


def counted(num: float, noun: str) -> str:
    """A number of things, for people: `2 nodes`."""
    return f"{num:g} {noun}{'' if num == 1 else 's'}"
