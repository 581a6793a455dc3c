"""Readers of `part-*.parquet` in processes of their own, while its names are switched."""

from __future__ import annotations

import json
import multiprocessing
import random
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchgen.storage import LocalStorage
from batchgen.store.books import STATE, Manifest, PublishedFile
from batchgen.store.ledger import Ledger
from batchgen.store.visible import expose
from tests.e2e.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Rows = frozenset[tuple[int, int]]
"""What somebody has read: place and version of each file."""


class Turning(Ledger):
    """A ledger whose newest snapshot is the one that the test says."""

    turn: Manifest

    def latest_manifest(self) -> Manifest | None:
        return self.turn


class World(NamedTuple):
    """Snapshots that share files."""

    ledger: Turning
    manifests: list[Manifest]

    @property
    def seen_by_readers(self) -> list[Rows]:
        """What there is to be read of each snapshot."""
        return [rows_of(manifest) for manifest in self.manifests]

    def show(self, at: int) -> None:
        """Switch to a snapshot."""
        self.ledger.turn = self.manifests[at]
        expose(self.ledger, self.manifests[at])


def rows_of(manifest: Manifest) -> Rows:
    """What there is to be read of a snapshot."""
    found = (file.name.rpartition("/")[2].removesuffix(".parquet") for file in manifest.files)
    return frozenset((int(name[:4]), int(name[5:])) for name in found)


def make_world(root: Path, num_snapshots: int, seed: int, *, num_places: int = 12) -> World:
    """Make snapshots of which each has changed, new and removed files against the one before."""
    dice = random.Random(seed)
    storage = LocalStorage(root)
    versions: dict[int, int] = dict.fromkeys(range(0, num_places, 2), 0)
    manifests: list[Manifest] = []
    for number in range(1, num_snapshots + 1):
        for place in dice.sample(range(num_places), dice.randint(1, num_places // 2)):
            if place in versions and len(versions) > 2 and dice.random() < 0.3:
                del versions[place]
            else:
                versions[place] = number
        files = [_file(storage, place, versions[place]) for place in sorted(versions)]
        manifests.append(_manifest(number, files))
    return World(Turning(storage), manifests)


def _file(storage: LocalStorage, place: int, version: int) -> PublishedFile:
    name = f"{STATE}/snapshots/e000001/{place:04d}-{version:04d}.parquet"
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"place": [place], "version": [version]}), out)
    data = out.getvalue().to_pybytes()
    storage.put_if_absent(name, data)
    # Whether it is the right hash is nobody's question here, only that no two files have one.
    return PublishedFile(name, 1, len(data), f"{place:04x}{version:04x}", order=1000 * (place + 1))


def _manifest(number: int, files: list[PublishedFile]) -> Manifest:
    num = len(files)
    return Manifest(number, f"plan-{number}", 1, "run", "2026-01-01", files, num, num, 0, 0)


def _by_polars(root: str) -> Any:
    return pl.read_parquet(f"{root}/part-*.parquet").rows()


def _by_polars_lazily(root: str) -> Any:
    return pl.scan_parquet(f"{root}/part-*.parquet").collect().rows()


def _listed(root: str) -> list[Path]:
    return sorted(Path(root).glob("part-*.parquet"))


def _by_pyarrow(root: str) -> Any:
    table = ds.dataset(list(map(str, _listed(root)))).to_table()
    return zip(*(table.column(name).to_pylist() for name in ("place", "version")), strict=True)


def _by_hand(root: str) -> Any:
    for path in _listed(root):
        with path.open("rb") as file:
            table = pq.read_table(file)
        yield table.column("place")[0].as_py(), table.column("version")[0].as_py()


READERS: Mapping[str, Callable[[str], Any]] = {
    "polars": _by_polars,
    "polars, lazily": _by_polars_lazily,
    "pyarrow": _by_pyarrow,
    "glob and open": _by_hand,
}


def _read_on(root: str, how: str, stop: Any, count: Any) -> None:
    """Read until told to stop; leave what was seen beside the output folder."""
    seen: dict[Rows, int] = {}
    num_errors = 0
    while not stop.is_set():
        try:
            rows = frozenset(READERS[how](root))
        except Exception:  # noqa: BLE001 - any error is a refusal, which is what readers may get
            num_errors += 1
        else:
            seen[rows] = seen.get(rows, 0) + 1
            count.value += 1
    found = {"errors": num_errors, "seen": [[sorted(rows), n] for rows, n in seen.items()]}
    Path(f"{root}.{how}.json").write_text(json.dumps(found), encoding="ascii")


class Readers:
    """Readers at work, one process for each way to read."""

    def __init__(self, root: Path) -> None:
        """Start them."""
        spawn = multiprocessing.get_context("spawn")
        self.root = root
        self.stop = spawn.Event()
        self.counts = {how: spawn.Value("q", 0) for how in READERS}
        self.processes = [
            spawn.Process(target=_read_on, args=(str(root), how, self.stop, self.counts[how]))
            for how in READERS
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> None:
        """Until each has read once more."""
        before = {how: count.value for how, count in self.counts.items()}
        wait_until(lambda: all(self.counts[how].value > before[how] for how in READERS), 300)

    def end(self) -> dict[str, tuple[set[Rows], int]]:
        """Stop them; way to read -> what was seen, and how many errors there were."""
        self.stop.set()
        for process in self.processes:
            process.join()
        found = {}
        for how in READERS:
            told = json.loads(self.root.with_name(f"{self.root.name}.{how}.json").read_text())
            seen = {
                frozenset((place, version) for place, version in rows) for rows, _ in told["seen"]
            }
            found[how] = seen, told["errors"]
        return found


@contextmanager
def readers(root: Path) -> Iterator[Readers]:
    """Readers that are gone at the end, whatever happens."""
    found = Readers(root)
    try:
        yield found
    finally:
        found.stop.set()
        for process in found.processes:
            process.join()


def switch(root: Path, num_switches: int, *, seed: int = 1) -> dict[str, tuple[set[Rows], int]]:
    """Switch at random between snapshots while all kinds of readers read.

    Raises:
        AssertionError: Somebody has read what no snapshot has.
    """
    world = make_world(root, 20, seed)
    dice = random.Random(seed)
    world.show(0)
    allowed = set(world.seen_by_readers)
    with readers(root) as at_work:
        for number in range(num_switches):
            if number % 10 == 0:  # Else nobody would ever find the folder at rest.
                at_work.wait()
            world.show(dice.randrange(len(world.manifests)))
        found = at_work.end()
    for how, (seen, _) in found.items():
        assert seen <= allowed, f"{how} has read {sorted(map(sorted, seen - allowed))}"
    return found
