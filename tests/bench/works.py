"""Kinds of work that people give an engine, made of real prompts, with lengths as in real work.

Output lengths are drawn beforehand and enforced (`ignore_eos`, a row's own `max_tokens`), so that
every way of feeding generates the same tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence
    from pathlib import Path

LABELS = ["time", "money", "work", "food"]
SCHEMA = {"enum": LABELS}
"""No room for whitespace, which random weights would fill."""
MAX_TOKENS = 4096
SEED = 0
TEMPERATURE = 0.7
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Work:
    """Rows to answer: chats, with each row's own sampling."""

    name: str
    system: str
    users: Sequence[str]
    max_tokens: Sequence[int]
    with_schema: bool = False

    def params(self) -> list[dict[str, Any]]:
        """vLLM's SamplingParams fields of each row; a schema's answers end by themselves."""
        ignore_eos = not self.with_schema
        return [{"max_tokens": num, "ignore_eos": ignore_eos} for num in self.max_tokens]

    @property
    def file_name(self) -> str:
        """Its name as a file may have it."""
        return self.name.replace("/", "-")

    def warm_up(self, num_rows: int) -> Work:
        """The same with its first rows only, and no long answers."""
        lengths = [min(num, WARM_UP_TOKENS) for num in self.max_tokens[:num_rows]]
        return replace(self, users=self.users[:num_rows], max_tokens=lengths)

    def share(self, number: int, count: int) -> Work:
        """The rows of one of `count` engines: every count-th, so that lengths are mixed alike."""
        return replace(
            self, users=self.users[number::count], max_tokens=self.max_tokens[number::count]
        )

    def write(self, path: Path) -> Path:
        """The rows as JSONL: user, sampling and, if there is one, schema."""
        with path.open("w", encoding="utf-8") as file:
            for user, params in zip(self.users, self.params(), strict=True):
                row = {"user": user, "sampling": params}
                if self.with_schema:
                    row["schema"] = json.dumps(SCHEMA)
                file.write(json.dumps(row) + "\n")
        return path


def decode_heavy(questions: Sequence[str], num_rows: int, rng: random.Random) -> Work:
    """Short prompts, answers lognormal with a mean near 160, the longest 2,048."""
    lengths = [min(2048, max(8, int(rng.lognormvariate(4.6, 1.0)))) for _ in range(num_rows)]
    system = "Label the problem by topic and difficulty, then solve it step by step."
    return Work("decode", system, cycle(questions, num_rows), lengths)


def decode_equal(questions: Sequence[str], num_rows: int, _rng: random.Random) -> Work:
    """Short prompts, 256 tokens out each: no row waits for another one."""
    system = "Solve the problem step by step."
    return Work("equal", system, cycle(questions, num_rows), [256] * num_rows)


def small_night(questions: Sequence[str], num_rows: int, _rng: random.Random) -> Work:
    """Short prompts, 64 tokens out each: with few rows, a night that is all start."""
    system = "Solve the problem in a sentence."
    return Work("night", system, cycle(questions, num_rows), [64] * num_rows)


def labeling(questions: Sequence[str], num_rows: int, rng: random.Random) -> Work:
    """About 780 tokens in, of which some 360 are the same for all; 8 out."""
    examples = "\n".join(f"Example: {text} => {rng.choice(LABELS)}" for text in questions[:6])
    users = [
        " ".join(rng.choice(questions) for _ in range(rng.randint(3, 12))) for _ in range(num_rows)
    ]
    return Work("label", f"Label the text. {examples}", users, [8] * num_rows)


def labeling_by_schema(questions: Sequence[str], num_rows: int, rng: random.Random) -> Work:
    """The same through a JSON Schema."""
    plain = labeling(questions, num_rows, rng)
    return Work("label+schema", plain.system, plain.users, plain.max_tokens, with_schema=True)


def shared_prefixes(num_groups: int) -> Callable[[Sequence[str], int, random.Random], Work]:
    """Groups with a beginning of some 600 tokens each, interleaved in the input; 8 out."""

    def make(questions: Sequence[str], num_rows: int, rng: random.Random) -> Work:
        heads = [" ".join(rng.sample(list(questions), 30))[:2600] for _ in range(num_groups)]
        tails = cycle(questions, num_rows)
        users = [f"{heads[n % num_groups]}\n\n{tail}" for n, tail in enumerate(tails)]
        return Work(f"prefix/{num_groups}", "Label the last problem.", users, [8] * num_rows)

    return make


def long_tail(questions: Sequence[str], num_rows: int, rng: random.Random) -> Work:
    """Answers of some 100 tokens, and one in a hundred of 4,096, anywhere in the input."""
    lengths = [min(400, max(8, int(rng.lognormvariate(4.4, 0.6)))) for _ in range(num_rows)]
    for at in rng.sample(range(num_rows), num_rows // 100):
        lengths[at] = MAX_TOKENS
    return Work("tail", "Solve it step by step.", cycle(questions, num_rows), lengths)


def cycle(questions: Sequence[str], num_rows: int) -> list[str]:
    """So many questions, from the beginning again when they run out."""
    return (list(questions) * (num_rows // len(questions) + 1))[:num_rows]


def read_questions(path: Path) -> list[str]:
    """`question` of each line of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["question"] for line in lines]
