"""Keys of requests that have an answer: 64 bits of each, in memory and beside published files.

Two keys that share them are told apart where the answer is copied, by all 128; until then the
second row merely waits.

    _batchgen/keys/FILE.bin          of the published file of that name: the keys that it answers

Numbers of 8 bytes, the machine's: the keys of rows that are ok, ascending; those of errors that
were asked; how many the one and the other are. A cache: where it is gone or torn, the keys are read
from the published file itself.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from typing import TYPE_CHECKING

import pyarrow as pa

from batchgen.core.data import pl
from batchgen.core.errors import OutputError, StorageError
from batchgen.store.books import FILES, STATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchgen.storage import LocalStorage

KEYS = f"{STATE}/keys"
_KEY_BYTES = 8
_MERGE_KEYS, _RUN_KEYS = 2**18, 2**20
_HEX = 16


class KeySet:
    """A growing set of request keys."""

    def __init__(self) -> None:
        self._runs: list[pl.Series] = []
        """Sorted, each of `_RUN_KEYS` or a little more: so that no sort needs much memory."""
        self._loaded: list[pl.Series] = []
        """Not sorted yet."""
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, [*self._runs, *self._loaded])) + len(self._recent)

    def load(self, prefixes: pl.Series) -> None:
        """Add many, see `prefixes_of`; repeats are fine."""
        self._loaded.append(prefixes)
        if sum(map(len, self._loaded)) >= _RUN_KEYS:
            self._sort()

    def _sort(self) -> None:
        # The last run may have room: many small loads must not become as many runs.
        if self._runs and len(self._runs[-1]) < _RUN_KEYS:
            self._loaded.append(self._runs.pop())
        if self._loaded:
            self._runs.append(pl.concat(self._loaded).sort())
            self._loaded.clear()

    def know(self, prefixes: Sequence[int]) -> list[bool]:
        """Whether each is in the set."""
        if not self:
            return [False] * len(prefixes)
        if len(self._recent) >= _MERGE_KEYS:
            self.load(pl.Series(list(self._recent), dtype=pl.UInt64))
            self._recent.clear()
        if self._loaded:
            self._sort()
        wanted = pl.Series(prefixes, dtype=pl.UInt64)
        found = pl.Series([prefix in self._recent for prefix in prefixes], dtype=pl.Boolean)
        for run in self._runs:
            if len(run):
                at = run.search_sorted(wanted).clip(0, len(run) - 1)
                found |= run.gather(at) == wanted
        return found.to_list()

    def add(self, prefix: int) -> bool:
        """Add one that `know` does not know; False if it was added since `know` was asked."""
        if prefix in self._recent:
            return False
        self._recent.add(prefix)
        return True

    def forget(self, prefix: int) -> None:
        """Remove one that was added lately."""
        self._recent.discard(prefix)


def prefixes_of(keys: pl.Series) -> pl.Series:
    """The first 64 bits of request keys; null for what is none."""
    return keys.str.head(_HEX).str.to_integer(base=16, dtype=pl.UInt64, strict=False)


def prefix_of(key: str) -> int:
    """The first 64 bits of a request key."""
    return int(key[:_HEX], 16)


def keys_of(name: str) -> str:
    """The file with the keys of a published file."""
    return f"{KEYS}/{name.rpartition('/')[2]}.bin"


class KeyFile:
    """Collects the keys of a published file while it is written."""

    def __init__(self, prefix: str) -> None:
        """Begin; `prefix` is that of batchgen's columns."""
        self._columns = f"{prefix}request_key", f"{prefix}status"
        self._found: tuple[list[pl.Series], list[pl.Series]] = [], []

    def add(self, rows: pa.Table) -> None:
        """Add those of rows in the part schema."""
        keys, status = (pl.Series(rows.column(name).cast(pa.string())) for name in self._columns)
        prefixes, is_ok = prefixes_of(keys), status == "ok"
        for found, wanted in zip(self._found, (is_ok, ~is_ok), strict=True):
            found.append(prefixes.filter(wanted).drop_nulls())

    def put(self, storage: LocalStorage, name: str) -> None:
        """Leave them for later runs; what fails here costs time, no more."""
        none = pl.Series([], dtype=pl.UInt64)
        ok, errors = (pl.concat([none, *found]).sort() for found in self._found)
        sizes = pl.Series([len(ok), len(errors)], dtype=pl.UInt64)
        data = array("Q", [number for one in (ok, errors, sizes) for number in one]).tobytes()
        with suppress(StorageError, OutputError):
            storage.replace(keys_of(name), data)


def read_keys(storage: LocalStorage, name: str, *, takes_errors: bool) -> pl.Series | None:
    """Keys that a result file answers, if they are known without reading it.

    Args:
        storage: The output.
        name: Of the file.
        takes_errors: Whether a row that is an error answers for rows like it.
    """
    if not name.startswith(FILES):
        return None
    try:
        data = storage.read(keys_of(name)) or b""
    except StorageError:
        return None
    num, rest = divmod(len(data), _KEY_BYTES)
    if rest or num < 2:
        return None
    found = pl.Series(pa.Array.from_buffers(pa.uint64(), num, [None, pa.py_buffer(data)]))
    num_ok, num_errors = found[-2:]
    if num_ok + num_errors + 2 != num:
        return None
    return found.head(num - 2 if takes_errors else num_ok)
