"""How long a job's rows are in tokens, from an earlier run or a few of its rows. Loads no vLLM."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.core.ranges import Ranges
from batchgen.core.records import RowError
from batchgen.preview.past import last_run
from batchgen.source.files import stat_input
from batchgen.storage import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from batchgen.core.records import Prompt
    from batchgen.pipeline.prepare import Prepared

SAMPLE_ROWS = 200
MESSAGE_TOKENS = 5
"""About what a chat template puts around a message: role, line break, begin and end."""
LARGE_BYTES = 256 << 20
"""A larger file is taken to have enough rows; they would be over a MiB long otherwise."""
CHARS_A_TOKEN = 4
"""Of English, where there is no tokenizer to ask."""


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Tokens of a row, in the mean."""

    prompt: float
    longest_prompt: int | None
    """Of those looked at."""
    answer: float
    is_bound: bool
    """`answer` is what max_tokens allows, since nothing is known of answers."""
    source: str
    """For people."""
    num_tight: int = 0
    """Of the prompts looked at: they leave less room than max_tokens below max_model_len."""

    @property
    def total(self) -> float:
        """Of prompt and answer."""
        return self.prompt + self.answer


def row_lengths(
    prepared: Prepared, max_model_len: int | None = None, sample_rows: int = SAMPLE_ROWS
) -> RowLengths | None:
    """Lengths of the last run with this recipe; else of the first rows, with the longest answers.

    Args:
        prepared: The job.
        max_model_len: Tokens of a row, prompt and answer; None where there is no limit.
        sample_rows: How many to look at, at most.

    Returns:
        None if the first rows hold no prompt.

    Raises:
        BatchgenError: The input cannot be read.
    """
    past = last_run(LocalStorage(Path(prepared.job.output.path)), prepared)
    if past is not None and past.is_same_recipe:
        n = prepared.job.sampling.n
        return RowLengths(
            prompt=past.prompt_tokens / past.num_rows,
            longest_prompt=None,
            answer=past.output_tokens / past.num_rows / n,
            is_bound=False,
            source=f"run {past.run_id}",
        )
    count, told = counter(Path(prepared.model.path))
    found = [_tokens(prompt, count) for prompt in prompts(prepared, sample_rows)]
    if not found:
        return None
    most = prepared.job.sampling.max_tokens
    limit = max_model_len if max_model_len is not None else max(found) + most
    rooms = [max(0, min(most, limit - num)) for num in found]  # As `forecast.survey` has it.
    return RowLengths(
        prompt=statistics.fmean(found),
        longest_prompt=max(found),
        answer=statistics.fmean(rooms),
        is_bound=True,
        source=f"the first {len(found):,} rows, {told}",
        num_tight=sum(0 < room < most for room in rooms),
    )


def prompts(prepared: Prepared, num_rows: int) -> Iterator[Prompt]:
    """Yield the prompts of the first rows; those without one are left out."""
    spec = replace(prepared.spec(), batch_rows=64)
    batches = chain.from_iterable(
        prepared.reader.read(path, 0, Ranges.until(_rows(prepared, path, num_rows)), spec)
        for path in prepared.files
    )
    values = (value for batch in batches for value in batch.values if value is not None)
    built = (prepared.builder.build(value) for value in values)
    yield from islice((prompt for prompt in built if not isinstance(prompt, RowError)), num_rows)


def _rows(prepared: Prepared, path: str, num_rows: int) -> int:
    """How many rows of a file to read at most. Counting a large file's would take its time."""
    if stat_input(path).size_bytes > LARGE_BYTES:
        return num_rows
    return prepared.reader.scan(path).num_rows


def counter(folder: Path) -> tuple[Callable[[str], int], str]:
    """What counts tokens, and how it does, for people.

    The model's own tokenizer.json; where there is none, or the library is not installed, four
    characters make a token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():  # A pipe would be waited for, for ever.
        return _by_characters, "at four characters a token"
    try:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception:  # noqa: BLE001 - the library raises bare ones; an estimate will do
        return _by_characters, "at four characters a token"

    def count(text: str) -> int:
        try:
            return len(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception:  # noqa: BLE001 - such as a vocabulary without what the text needs
            return _by_characters(text)

    return count, "by the model's tokenizer"


def _by_characters(text: str) -> int:
    return -(-len(text) // CHARS_A_TOKEN)


def _tokens(prompt: Prompt, count: Callable[[str], int]) -> int:
    if isinstance(prompt, str):
        return count(prompt)
    return sum(MESSAGE_TOKENS + count(_text(message.get("content"))) for message in prompt)


def _text(content: object) -> str:
    """Of a message; parts that are no text do not count."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else json.dumps(content, default=str)
