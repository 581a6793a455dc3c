"""Proof 3: power losses, on a disk that forgets whatever was not synced.

`Platter` is hostile within POSIX. Since the last `sync` of a file, its content may be the old one,
the new one, cut, or zeroed from anywhere on. Since the last `sync_folder` of a folder, each of its
names may be at any binding that it had meanwhile, independently of the others. A folder whose name
was lost is lost with all that is in it. Folders and files that were made past the `Disk` are names
that were never synced.

A process may also die alone: then what it did stays in the page cache, unsynced, and the next
run builds on it, until a later loss takes it away.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from batchgen.storage import Disk
from batchgen.views.status import status_of as views
from tests.torture.harness import main
from tests.torture.support import (
    Job,
    ProofError,
    check_snapshot,
    expected_of,
    first_day,
    make_job,
    manifest_of,
    next_day,
    replayable,
    run_here,
    whole_run,
)

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 60
KILL_SHARE = 0.25
LOSS_AFTER_SUCCESS_SHARE = 0.4
NIGHT_SHARE = 0.4
BEGINNINGS = ("a new job", "--retry-errors", "a second night")
Rows = list[dict[str, Any]]
GONE, FOLDER = 0, -1
"""Bindings of a name that are no file's inode number."""


class PowerLost(BaseException):
    """The process is no more."""


class Platter:
    """What is durable of one folder tree, beside the real tree, which is what is visible."""

    def __init__(self, root: Path, morgue: Path) -> None:
        self.root = root
        self._morgue = morgue
        morgue.mkdir()
        root.mkdir(exist_ok=True)
        self._durable: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int]] = {root: {}}
        self._history: dict[Path, dict[str, list[int]]] = {}
        for folder, _, names in os.walk(root):
            self.saw_sync_folder(Path(folder))
            for name in names:
                self.saw_create(Path(folder, name))
                self.saw_sync(Path(folder, name))
        self._history.clear()

    def _binding(self, path: Path) -> int:
        try:
            return FOLDER if path.is_dir() else path.stat().st_ino
        except FileNotFoundError:
            return GONE

    def saw_create(self, path: Path) -> None:
        """A file came to be; a link keeps its inode number from being used again."""
        with suppress(FileExistsError):  # Another name of a file that is known.
            os.link(path, self._morgue / str(path.stat().st_ino))
        self.saw_name(path)

    def saw_name(self, path: Path) -> None:
        """A name was bound, or unbound."""
        history = self._history.setdefault(path.parent, {}).setdefault(path.name, [])
        history.append(self._binding(path))

    def saw_sync(self, path: Path) -> None:
        """A file's content is durable."""
        number = path.stat().st_ino
        self._durable[number] = (self._morgue / str(number)).read_bytes()

    def saw_sync_folder(self, path: Path) -> None:
        """A folder's names are durable: those that it has right now."""
        self._names[path] = {name: self._binding(path / name) for name in _names_in(path)}
        self._history.pop(path, None)

    def lose(self, target: Path, chance: random.Random, *, is_worst: bool = False) -> None:
        """Write what is left after a power loss to a new folder; at worst nothing unsynced is."""
        self._is_worst = is_worst
        self._kept: dict[int, Path] = {}
        target.mkdir()
        self._lose_folder(self.root, target, chance)

    def _lose_folder(self, folder: Path, target: Path, chance: random.Random) -> None:
        durable = self._names.get(folder, {})
        history = self._history.get(folder, {})
        visible = set(_names_in(folder)) if folder.is_dir() else set()
        for name in sorted(visible | durable.keys() | history.keys()):
            now = [self._binding(folder / name)]
            bindings = [durable.get(name, GONE), *history.get(name, []), *now]
            if name in durable and name not in history:
                bindings = [durable[name]]
            binding = bindings[0] if self._is_worst else chance.choice(bindings)
            if binding == FOLDER:
                (target / name).mkdir()
                self._lose_folder(folder / name, target / name, chance)
            elif binding != GONE:
                self._keep_file(binding, folder / name, target / name, chance)

    def _keep_file(self, number: int, path: Path, target: Path, chance: random.Random) -> None:
        """One file may have several names; it has one content."""
        if number in self._kept:
            target.hardlink_to(self._kept[number])
            return
        target.write_bytes(self._content(number, path, chance))
        self._kept[number] = target

    def _content(self, number: int, path: Path, chance: random.Random) -> bytes:
        kept = self._morgue / str(number)
        now = kept.read_bytes() if kept.exists() else path.read_bytes()
        durable = self._durable.get(number)
        if durable == now:
            return now
        cut = chance.randrange(len(now) + 1)
        zeroed = now[:cut] + bytes(len(now) - cut)
        whole = durable or b""
        return whole if self._is_worst else chance.choice([whole, now, now[:cut], zeroed])


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


class PowerLossDisk(Disk):
    """A disk on a platter; at call `at` the process dies, alone or with the power."""

    def __init__(self, platter: Platter, at: int, on_death: Callable[[], None]) -> None:
        self._platter = platter
        self._at = at
        self._on_death = on_death
        self._num_calls = 0
        self._lock = threading.RLock()
        self.is_dead = False

    def _call(self, really: Callable[[], Any], saw: Callable[[], None] | None) -> Any:
        with self._lock:
            if self.is_dead:
                raise PowerLost
            is_last = self._num_calls == self._at
            self._num_calls += 1
            if is_last:
                self.is_dead = True
                self._on_death()
                raise PowerLost
            result = really()
            if saw is not None:
                saw()
            return result

    def die(self) -> None:
        """From now on no call does anything."""
        with self._lock:
            self.is_dead = True

    def create(self, path: Path) -> IO[bytes]:
        return self._call(lambda: Disk.create(self, path), lambda: self._platter.saw_create(path))

    def write(self, file: IO[bytes], data: bytes) -> None:
        def really() -> None:
            file.write(data)
            file.flush()

        self._call(really, None)

    def sync(self, file: IO[bytes]) -> None:
        self._call(file.flush, lambda: self._platter.saw_sync(Path(file.name)))

    def sync_folder(self, path: Path) -> None:
        self._call(lambda: None, lambda: self._platter.saw_sync_folder(path))

    def link(self, source: Path, target: Path) -> None:
        self._call(lambda: Disk.link(self, source, target), lambda: self._platter.saw_name(target))

    def rename(self, source: Path, target: Path) -> None:
        def saw() -> None:
            self._platter.saw_name(source)
            self._platter.saw_name(target)

        self._call(lambda: Disk.rename(self, source, target), saw)

    def unlink(self, path: Path) -> None:
        self._call(lambda: Disk.unlink(self, path), lambda: self._platter.saw_name(path))

    def make_folder(self, path: Path) -> None:
        self._call(lambda: Disk.make_folder(self, path), lambda: self._platter.saw_name(path))

    def chmod(self, path: Path, mode: int) -> None:
        self._call(lambda: Disk.chmod(self, path, mode), None)


class Machine:
    """A computer whose power fails; each loss begins a new folder."""

    def __init__(self, folder: Path, chance: random.Random, counts: Counter[str]) -> None:
        self._folder = folder
        self._chance = chance
        self._counts = counts
        self._num_disks = 0
        self._platter = Platter(folder / "disk-0", folder / "morgue-0")

    @property
    def out(self) -> Path:
        """The output folder on the disk of now."""
        return self._platter.root / "out"

    def lose_power(self, *, is_worst: bool = False) -> None:
        """Forget what is not durable."""
        self._counts["losses"] += 1
        self._num_disks += 1
        target = self._folder / f"disk-{self._num_disks}"
        self._platter.lose(target, self._chance, is_worst=is_worst)
        self._next = target

    def boot(self) -> None:
        """Go on with what is left."""
        shutil.rmtree(self._platter.root)
        self._platter = Platter(self._next, self._folder / f"morgue-{self._num_disks}")

    def run(self, job: Job, at: int, *, is_kill: bool, **options: bool) -> dict[str, Any] | None:
        """One run; None if it died at call `at`."""
        disk = PowerLossDisk(self._platter, at, (lambda: None) if is_kill else self.lose_power)
        try:
            return run_here(job, self.out, disk=disk, **options)
        except PowerLost:
            if is_kill:
                self._counts["killed, power on"] += 1
            else:
                self.boot()
            return None
        finally:
            disk.die()


def shard(folder: Path, seed: str, amount: int) -> Counter[str]:
    """Lose power until it was lost `amount` times, every job to its end.

    At first once for each call: a process dies there, another run reports success, power goes.
    """
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end
    job = make_job(folder / "job", ROWS)
    expected = expected_of(job, folder / "expected")
    next_day(job)
    days = expected, whole_run(job, folder / "expected-next")
    counts: Counter[str] = Counter()
    number = int(seed.rpartition(".")[2])
    for what in BEGINNINGS:
        for at in range(number, 10_000, 2):
            here = folder / f"call-{at}"
            here.mkdir()
            with replayable(f"{what} killed at call {at}, then a run, then the worst power loss"):
                is_reached = _kill_run_lose(job, days, here, at, counts, what=what)
            shutil.rmtree(here)
            if not is_reached:
                break
    number = 0
    while counts["losses"] < amount:
        here = folder / f"machine-{number}"
        here.mkdir()
        with replayable(f"seed {seed!r}, machine {number}"):
            _torture(job, days, here, random.Random(f"{seed}/{number}"), counts)
        shutil.rmtree(here)
        counts["jobs: 0 lost, 0 doubled, 0 wrong"] += 1
        number += 1
    return counts


def _kill_run_lose(
    job: Job, days: tuple[Rows, Rows], here: Path, at: int, counts: Counter[str], *, what: str
) -> bool:
    """False if the run ended before call `at`."""
    machine = Machine(here, random.Random(at), counts)
    first_day(job)
    if what == "--retry-errors":  # Of a job that was held back, or published: every other call.
        machine.run(job if at // 2 % 2 else job.strict(), -1, is_kill=True)
    if what == "a second night":
        machine.run(job, -1, is_kill=True)
        next_day(job)
    is_retry = what == "--retry-errors"
    if machine.run(job, at, is_kill=True, retry_errors=is_retry) is not None:
        return False
    told = machine.run(job, -1, is_kill=True)
    if told is None or told["error"] is not None:
        msg = f"a run after a kill ended so: {told}"
        raise ProofError(msg)
    machine.lose_power(is_worst=True)
    machine.boot()
    counts["losses after success was reported"] += 1
    expected = days[what == "a second night"]
    check_snapshot(machine.out, expected, "after a kill, a success and the worst power loss")
    return True


def _torture(
    job: Job, days: tuple[Rows, Rows], here: Path, chance: random.Random, counts: Counter[str]
) -> None:
    machine = Machine(here, chance, counts)
    first_day(job)
    expected = days[0]
    # Held back first, and then its errors tried again; or published at once.
    now = chance.choice([job, job, job.strict()])
    options: dict[str, bool] = {}
    for _ in range(1000):
        # Few calls make losses early and during recovery; many reach the end.
        at = chance.choice([chance.randrange(30), chance.randrange(220), chance.randrange(400)])
        told = machine.run(now, at, is_kill=chance.random() < KILL_SHARE, **options)
        if told is None:
            views.status(machine.out)  # Whatever is left, it can be looked at.
            # Each retry begins another plan where the last one only lacks its manifest.
            options = chance.choice([options, {}])
            continue
        if told["error"] == "GateError" and now is not job:
            counts["runs that the gate held back"] += 1
            now, options = job, {"retry_errors": True}
            if chance.random() < LOSS_AFTER_SUCCESS_SHARE:
                machine.lose_power()
                machine.boot()
            continue
        now, options = job, {}
        if told["error"] is not None:
            msg = f"a run after a power loss ended so: {told}"
            raise ProofError(msg)
        counts[f"runs that ended with {told['text']}"] += 1
        check_snapshot(machine.out, expected, "when success was reported")
        if chance.random() >= LOSS_AFTER_SUCCESS_SHARE:
            return
        manifest = manifest_of(machine.out)
        machine.lose_power()
        machine.boot()
        counts["losses after success was reported"] += 1
        check_snapshot(machine.out, expected, "after success was reported and power lost")
        if manifest_of(machine.out) != manifest:
            msg = "the manifest is another one after a loss"
            raise ProofError(msg)
        options = chance.choice([{}, {}, {"fresh": True}, {"retry_errors": True}])
        if expected is days[0] and chance.random() < NIGHT_SHARE:
            next_day(job)
            expected, options = days[1], {}
            counts["second nights"] += 1
    msg = "1,000 runs and no end"
    raise ProofError(msg)


if __name__ == "__main__":
    main("tests.torture.power", "losses", shard, 10_000, in_memory=True)
