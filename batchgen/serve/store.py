"""Files and batches on disk: a folder each, with `about.json` that is replaced as a whole.

    ROOT/lock                    held by the one server that works on it
    ROOT/files/ID/about.json     owner, and the FileObject as the API gives it
                 /content        its bytes
    ROOT/batches/ID/about.json   owner, and the Batch as the API gives it
                   /out/         output folder of its job, removed with its answers
    ROOT/tmp/                    uploads that are not whole yet

What has no `about.json` was never answered for, and is removed at the next start. All that is asked
about is kept in memory; the files are the truth.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from openai.types import Batch, FileObject

from batchgen.core.errors import BusyError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

Thing = TypeVar("Thing", Batch, FileObject)

ABOUT, CONTENT = "about.json", "content"
LIVE = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
"""States of a batch that is still to be worked on."""
_COPY_BYTES = 1 << 20
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class Record(Generic[Thing]):
    """A file or a batch, and what only the server knows of it."""

    thing: Thing
    owner: str
    number: int
    """Ascends with each that was made."""
    more: Mapping[str, Any] = field(default_factory=dict)


class Shelf(Generic[Thing]):
    """All records of a kind, each in a folder."""

    def __init__(self, root: Path, kind: type[Thing]) -> None:
        self.root = root
        kind_of: Any = kind
        self._records: dict[str, Record[Thing]] = {}
        root.mkdir(mode=0o700, exist_ok=True)
        for folder in root.iterdir():
            try:
                told = json.loads((folder / ABOUT).read_bytes())
                thing = kind_of.model_validate(told["thing"])
            except (OSError, ValueError, LookupError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self._records[thing.id] = Record(thing, told["owner"], told["number"], told["more"])
        found = sorted(self._records.items(), key=lambda item: item[1].number)
        self._records = dict(found)

    def of(self, owner: str) -> list[Record[Thing]]:
        """Return an owner's, the oldest first."""
        return [one for one in list(self._records.values()) if one.owner == owner]

    def all(self) -> list[Record[Thing]]:
        """Return everybody's, the oldest first."""
        return list(self._records.values())

    def get(self, name: str, owner: str | None = None) -> Record[Thing] | None:
        """Find one; None if there is none, or it is another owner's."""
        found = self._records.get(name)
        return found if found is not None and owner in (None, found.owner) else None

    def folder(self, name: str) -> Path:
        """Where one is, or will be."""
        return self.root / name

    def put(self, record: Record[Thing]) -> None:
        """Write one down, durably, and only then tell of it."""
        folder = self.folder(record.thing.id)
        folder.mkdir(mode=0o700, exist_ok=True)
        told = {
            "thing": record.thing.model_dump(mode="json", exclude_none=True),
            "owner": record.owner,
            "number": record.number,
            "more": dict(record.more),
        }
        write_whole(folder / ABOUT, json.dumps(told, indent=1).encode())
        self._records[record.thing.id] = record

    def remove(self, name: str) -> None:
        """Forget one, and every byte of it; what a crash leaves of it goes at the next start."""
        self._records.pop(name, None)
        (self.folder(name) / ABOUT).unlink(missing_ok=True)
        shutil.rmtree(self.folder(name), ignore_errors=True)


class Store:
    """What a server has under its root. Any thread may use it."""

    def __init__(self, root: Path) -> None:
        """Take the root, and read what is there.

        Raises:
            BusyError: Another server is at work on it.
        """
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root
        self._lock_file = (root / "lock").open("wb")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(f"{root}: another server is at work on it") from error
        temp = root / "tmp"
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(mode=0o700)
        # Uploads are spooled to disk beside their place, and not where /tmp may be memory.
        tempfile.tempdir = str(temp)
        self.lock = threading.RLock()
        """Held while something is looked up and changed by what was found."""
        self.files = Shelf(root / "files", FileObject)
        self.batches = Shelf(root / "batches", Batch)
        self.changed = threading.Event()
        """Set when the runner has something to look at."""

    def keep(self, record: Record[FileObject], source: BinaryIO) -> None:
        """Take a file in: its bytes first, then what is told of it."""
        folder = self.files.folder(record.thing.id)
        folder.mkdir(mode=0o700)
        try:
            with (folder / CONTENT).open("xb") as file:
                shutil.copyfileobj(source, file, _COPY_BYTES)
                file.flush()
                os.fsync(file.fileno())
            self.files.put(record)
        except OSError:
            self.files.remove(record.thing.id)
            raise

    def content(self, name: str) -> Path:
        """Where a file's bytes are."""
        return self.files.folder(name) / CONTENT

    def update(self, name: str, **changes: Any) -> Batch:  # noqa: ANN401 - any field
        """Change a batch; none is ever removed."""
        with self.lock:
            found = self.batches.get(name)
            assert found is not None  # noqa: S101 - see above
            thing = Batch.model_validate({**found.thing.model_dump(), **changes})
            self.batches.put(Record(thing, found.owner, found.number, found.more))
            return thing

    def is_needed(self, name: str) -> bool:
        """Tell whether a batch that has not ended reads a file."""
        return any(one.thing.input_file_id == name for one in self.live())

    def live(self) -> Iterator[Record[Batch]]:
        """Yield batches that have not ended, the oldest first."""
        return (one for one in self.batches.all() if one.thing.status in LIVE)

    def delete_file(self, name: str) -> None:
        """Remove a file; with a batch's answers goes what its job has kept of them."""
        with self.lock:
            for one in self.batches.all():
                folder = self.batches.folder(one.thing.id)
                if name in (one.thing.output_file_id, one.thing.error_file_id):
                    shutil.rmtree(folder / "out", ignore_errors=True)
                if name == one.thing.input_file_id and one.thing.errors is not None:
                    self.update(one.thing.id, errors=None)  # They quote its lines.
                    (folder / "checked.json").unlink(missing_ok=True)
            self.files.remove(name)

    def sweep(self) -> None:
        """Remove files whose time is over, unless a batch still reads them."""
        now = time.time()
        for one in self.files.all():
            end = one.thing.expires_at
            with self.lock:
                if end is not None and end <= now and not self.is_needed(one.thing.id):
                    self.delete_file(one.thing.id)


def new_id(prefix: str) -> str:
    """Make a name that nobody guesses."""
    return prefix + secrets.token_hex(12)


def number_now() -> tuple[int, int]:
    """Return a number for a record, and the second that it was made in."""
    number = time.time_ns()
    return number, number // _SECOND_NS


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file at once, durably: a reader, also after a crash, finds the old or the new."""
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temp.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
