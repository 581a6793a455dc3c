"""What is durable and what is missing: plans, epochs, accepted parts, manifests.

The part file is the commit record of its rows; everything here is derived from part footers and
from some kinds of small files, each put once and never changed:

    _batchgen/plan/NNNNNN.json       the frozen input and recipe; the highest one is the job's
    _batchgen/epochs/NNNNNN.json     one run's claim: which parts of earlier epochs it accepts
    _batchgen/seals/eNNNNNN-wNN.json a worker that was given up: which of its parts count
    _batchgen/footers/               what parts said that were opened: a cache, see `footers`
    _batchgen/rejected/PART.json     a part whose footer is whole and whose rows are not
    _batchgen/manifests/NNNNNN.json  the snapshot of plan NNNNNN, put last: its commit point
    _batchgen/lists/eNNNNNN-SHA.json some of a manifest's files, up to 500; by run and content

Lists are cut by what is in them, so that manifests of snapshots that share most of their files
share most of their lists.

Fencing needs no clock and no lock: a run that was frozen and wakes up writes parts that the
later claim does not name, so nobody accepts them. Of a worker that its run has given up, likewise:
what it writes later its seal does not name.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from batchgen.core.data import parse_state
from batchgen.core.errors import AccountingError, FencedError, OutputError, StorageError
from batchgen.core.records import RowSet
from batchgen.core.runtime import command
from batchgen.store.books import (
    FILES,
    LISTS,
    STATE,
    Base,
    Durable,
    Epoch,
    Kept,
    Manifest,
    Part,
    PartFooter,
    Places,
    Plan,
    PublishedFile,
    Segment,
    disjoint,
    epoch_of,
    is_numbered,
    number_of,
    numbered,
    rejection_of,
    seal_of,
    worker_of,
)
from batchgen.store.footers import FOOTERS, RollUp, Same, read_footer, rolled_up
from batchgen.store.keys import KEYS, keys_of
from batchgen.store.matching import DIGESTS
from batchgen.store.runs import RunLock

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from batchgen.storage import LocalStorage
    from batchgen.store.footers import Told

FORMAT = 2
_READABLE = {1, FORMAT}
_LIST_FILES, _CUT_ONE_IN = 500, 256
_NOTHING_KEPT = Durable()
_MAX_CLAIM_TRIES = 100
_LONG = 10_000


class Ledger:
    """The job's books under one output folder."""

    def __init__(self, storage: LocalStorage) -> None:
        """Bind; nothing is read or written yet."""
        self.storage = storage
        self._lists: dict[str, Sequence[PublishedFile]] = {}
        """Name -> content, of those that were read or written."""

    def latest_plan(self) -> Plan | None:
        """The plan that the output is at, None for a new job.

        Raises:
            OutputError: The file is not one that this version understands.
        """
        names = self._numbered_files("plan")
        return self._read_plan(names[-1]) if names else None

    def latest_plan_number(self) -> int:
        """0 for a new job."""
        names = self._numbered_files("plan")
        return number_of(names[-1]) if names else 0

    def why_no_plan(self) -> str | None:
        """What to tell of a job that has no plan yet; None if it has one."""
        if self.latest_plan_number():
            return None
        if RunLock(self.storage).is_held():
            return "its first run is at work and has not planned it yet"
        if STATE in self.storage.list(""):
            return f"no run has planned the job yet; start one with `{command('run')}`"
        return f"the job has not been run yet; start it with `{command('run')}`"

    def plan(self, number: int) -> Plan:
        """A plan by number.

        Raises:
            OutputError: It is absent or not understood.
        """
        return self._read_plan(numbered("plan", number))

    def _read_plan(self, name: str) -> Plan:
        fields = self._read_json(name)
        try:
            segments = [Segment(**segment) for segment in fields.pop("segments")]
            fields.pop("base", None)  # As it was before there could be several.
            bases = _bases(fields.pop("bases", ()))
            continues = _bases(fields.pop("continues", ()))
            keys = tuple(fields.pop("keys", ()))
            kept = tuple((first, stop, start) for first, stop, start in fields.pop("kept", ()))
            return Plan(
                **fields,
                segments=segments,
                bases=bases,
                continues=continues,
                keys=keys,
                kept=kept,
            )
        except (KeyError, TypeError) as error:
            raise self._not_understood(name, str(error)) from error

    def put_plan(self, plan: Plan) -> None:
        """Freeze a plan.

        Raises:
            FencedError: Another run froze that number first.
        """
        name = numbered("plan", plan.number)
        if not self.storage.put_if_absent(name, _dumps(asdict(plan))):
            msg = f"{self.storage.where}: another run has just planned this job; run again"
            raise FencedError(msg)

    def manifest(self, number: int) -> Manifest | None:
        """The snapshot of plan `number`, None while it is unpublished."""
        name = numbered("manifests", number)
        if self.storage.read(name) is None:
            return None
        fields = self._read_json(name)
        try:
            index = fields.pop("index", None)
            lists = fields.pop("lists", None)
            if lists is None:
                files = [PublishedFile(**file) for file in fields.pop("files")]
            else:
                files = [file for one in lists for file in self._list(one)]
            return Manifest(
                **fields, files=files, index=None if index is None else PublishedFile(**index)
            )
        except (KeyError, TypeError) as error:
            raise self._not_understood(name, str(error)) from error

    def lists_of(self, number: int) -> Sequence[str]:
        """Names of the lists of a manifest; none if it is absent, or of version 1."""
        name = numbered("manifests", number)
        is_there = self.storage.read(name) is not None
        return self._read_json(name).get("lists", ()) if is_there else ()

    def _list(self, name: str) -> Sequence[PublishedFile]:
        if name not in self._lists:
            fields = self._read_json(name)
            if not name.endswith(_digest_of_list(self.storage.read(name) or b"")):
                raise self._not_understood(name, "its bytes are not those that were published")
            self._lists[name] = [PublishedFile(**file) for file in fields["files"]]
        return self._lists[name]

    def _put_lists(self, manifest: Manifest, shares_with: int) -> Iterator[str]:
        """Yield the names of a manifest's lists, those of another manifest where they are equal."""
        known = {name.rpartition("-")[2]: name for name in self.lists_of(shares_with)}
        for some in _cut(manifest.files):
            data = _dumps({"files": [_fields_of(file) for file in some]})
            digest = _digest_of_list(data)
            name = known.get(digest) or f"{LISTS}/e{manifest.epoch:06d}-{digest}"
            if name not in self._lists and not self.storage.put_if_absent(name, data):
                raise self._not_understood(name, "its bytes are not those that were published")
            self._lists[name] = some
            yield name

    def manifests(self) -> list[Manifest]:
        """Every published snapshot that was not pruned since, oldest first.

        Raises:
            OutputError: One is not what this version understands.
        """
        numbers = [number_of(name) for name in self._numbered_files("manifests")]
        return [found for number in numbers if (found := self.manifest(number)) is not None]

    def latest_manifest(self) -> Manifest | None:
        """The newest published snapshot, None if nothing was ever published."""
        return self.manifest_before(None)

    def manifest_before(self, number: int | None) -> Manifest | None:
        """The newest snapshot of a plan before plan `number`; None: of all plans."""
        numbers = [number_of(name) for name in self._numbered_files("manifests")]
        earlier = [found for found in numbers if number is None or found < number]
        return self.manifest(earlier[-1]) if earlier else None

    def put_manifest(self, manifest: Manifest, shares_with: int = 0) -> Manifest:
        """Publish; return the manifest that holds, which may be another run's equal one.

        Args:
            manifest: Of files that are durable.
            shares_with: Number of a manifest that has some of them and that nobody prunes now.

        Raises:
            AccountingError: The counts do not balance; nothing is published.
            FencedError: A newer snapshot is published, and what this one needs is removed.
        """
        if imbalance := manifest.imbalance():
            raise AccountingError(f"{self.storage.where}: {imbalance}; not published")
        fields = asdict(replace(manifest, files=()))
        for name in ("files", "index"):
            del fields[name]
        fields["lists"] = list(self._put_lists(manifest, shares_with))
        name = numbered("manifests", manifest.number)
        self.storage.put_if_absent(name, _dumps(fields))
        held = self.manifest(manifest.number)
        # Who slept before the put may find that a newer snapshot is there, and that what only this
        # one names, or its plan, has been removed meanwhile: then it is taken back.
        is_newest = self._numbered_files("manifests")[-1:] == [name]
        if held is None or not (is_newest or self._is_whole(held)):
            if held is not None and held.run_id == manifest.run_id:
                self.storage.remove(name)
            raise FencedError(f"{self.storage.where}: another run has published a newer snapshot")
        return held

    def _is_whole(self, manifest: Manifest) -> bool:
        """Whether a snapshot's plan and files are there."""
        names = [numbered("plan", manifest.number), *(file.name for file in manifest.files)]
        return all(self.storage.mark(name) is not None for name in names)

    def at_work(self) -> Collection[str]:
        """Return the names of what tells who was at work so far: claims and manifests."""
        return {name for kind in ("epochs", "manifests") for name in self._numbered_files(kind)}

    @contextmanager
    def telling_late(self, run_id: str, before: Collection[str]) -> Iterator[None]:
        """Tell a run that has slept what it is, where it misses what others have removed meanwhile.

        Args:
            run_id: The run's.
            before: `at_work` when it began. If others have claimed the job, published it or pruned
                it since, what is missing is no damage; where it is, the next run tells so.

        Raises:
            FencedError: Others were at work; in place of another error of the output.
        """
        try:
            yield
        except FencedError:
            raise
        except (OutputError, StorageError) as error:
            now, own = self.at_work(), run_id.encode()
            others = (name for name in now if own not in (self.storage.read(name) or b""))
            if set(before) == {*others}:
                raise
            msg = f"{self.storage.where}: another run has taken this job over; run again ({error})"
            raise FencedError(msg) from error

    def settle(self) -> None:
        """Make durable the records that this run found and builds on, or reports.

        Raises:
            StorageError: They cannot be synced.
        """
        for kind in ("plan", "epochs", "manifests"):
            self.storage.settle(f"{STATE}/{kind}")

    def latest_epoch(self) -> tuple[int, Mapping[str, Any]]:
        """Number and content of the newest claim; (0, {}) before the first."""
        number = self.latest_epoch_number()
        return number, self._read_json(numbered("epochs", number)) if number else {}

    def latest_epoch_number(self) -> int:
        """0 before the first claim."""
        names = self._numbered_files("epochs")
        return number_of(names[-1]) if names else 0

    def durable(self, plan: Plan, on_opened: Callable[[Told], object] = id) -> Durable:
        """What counts right now, as the next claim would accept it. Reads footers only."""
        number, claim = self.latest_epoch()
        names: Sequence[str] = ()
        if number and claim["plan_id"] == plan.plan_id:
            names = [*claim["accepted"], *self._parts_of(number)]
        return self.parts(plan, names, on_opened, self._kept(plan))

    def _kept(self, plan: Plan) -> Durable:
        """The files that a plan keeps, but for those that a mark leaves out."""
        manifest = self.manifest(plan.kept_of) if plan.kept else None
        if manifest is None:  # Or a faster run has published the plan, and pruned its base.
            return Durable()
        found = []
        for first, stop, start in plan.kept:
            for file in manifest.files[first:stop]:
                found.append(Kept(file, start))
                start = found[-1].stop  # noqa: PLW2901 - of the next
        rejected = self._rejected([one.file.name for one in found], plan.number)
        kept = [one for one in found if one.file.name not in rejected]
        places = Places(plan)
        rows = RowSet.of_spans(span for one in kept for span in places.spans(one.start, one.stop))
        return Durable((), rejected, kept, rows)

    def parts(
        self,
        plan: Plan,
        names: Collection[str],
        on_opened: Callable[[Told], object] = id,
        kept: Durable = _NOTHING_KEPT,
    ) -> Durable:
        """Accept those of the named parts that are whole and fit the plan.

        Args:
            plan: Whose parts they are.
            names: Of the parts.
            on_opened: Called with what each part says that had to be opened.
            kept: The files that the plan keeps.
        """
        rejected = self._rejected(names)
        left = {name: name for name in names if name not in rejected}
        rejected |= kept.rejected
        parts: list[Part] = []
        same = Same()
        for told in rolled_up(self.storage, left):
            _accept(told, plan, same, parts, rejected)
        for name in sorted(left):
            try:
                told = read_footer(self.storage, name)
            except ValueError as error:
                rejected[name] = str(error)
            else:
                on_opened(told)
                _accept(told, plan, same, parts, rejected)
        parts.sort()
        return replace(kept, parts=disjoint(parts, rejected, kept.kept_rows), rejected=rejected)

    def seal(self, epoch: Epoch, worker: int) -> Sequence[str]:
        """Let nothing count that a worker writes from now on; return which of its parts do.

        Its other rows may be given to another worker once this returns.

        Raises:
            StorageError: The seal may not hold; to be asked again.
        """
        mine = [name for name in self._parts_of(epoch.number) if worker_of(name) == worker]
        name = seal_of(epoch.number, worker)
        self.storage.put_if_absent(name, _dumps({"parts": mine}))
        return list(self._read_json(name)["parts"])

    def check_seal(self, epoch: Epoch, worker: int) -> None:
        """Notice that this worker was given up. Politeness only, as `check_fence`.

        Raises:
            FencedError: It was.
        """
        if self.storage.read(seal_of(epoch.number, worker)) is not None:
            msg = f"{self.storage.where}: worker {worker} was given up; its rows are others' now"
            raise FencedError(msg)

    def reject(self, name: str, why: str, plan: int = 0) -> None:
        """Leave a part out of every later claim; for damage that its footer does not show.

        Args:
            name: Of the part; or of a file that a plan keeps, which counts in other plans still.
            why: For people.
            plan: That plan's number.
        """
        self.storage.put_if_absent(rejection_of(name, plan), _dumps({"why": why}))

    def _rejected(self, names: Collection[str], plan: int = 0) -> dict[str, str]:
        marks = set(self.storage.list(f"{STATE}/rejected"))
        return {
            name: str(self._read_json(mark)["why"])
            for name in names
            if (mark := rejection_of(name, plan)) in marks
        }

    def _numbered_files(self, kind: str) -> list[str]:
        names = self.storage.list(f"{STATE}/{kind}")
        return [name for name in names if is_numbered(name)]

    def _parts_of(self, epoch: int) -> list[str]:
        """What an epoch's workers have written, but for what came after their seals."""
        prefix = f"{STATE}/parts/e{epoch:06d}-"
        # In this order: a part that a seal made later leaves out is not listed yet, or counts.
        names = [name for name in self.storage.list(f"{STATE}/parts") if name.startswith(prefix)]
        for seal in self.storage.list(f"{STATE}/seals"):
            if epoch_of(seal) == epoch:
                worker, counted = worker_of(seal), set(self._read_json(seal)["parts"])
                names = [name for name in names if worker_of(name) != worker or name in counted]
        return names

    def claim(self, plan: Plan, run_id: str, facts: Mapping[str, Any]) -> Epoch:
        """Claim the next epoch; from here on, what earlier runs write does not count.

        Args:
            plan: The plan that the run works on.
            run_id: Of this run.
            facts: For people: host, pid, start time.

        Raises:
            FencedError: The plan is not the newest any more.
            OutputError: Other runs kept winning the claim.
        """
        for _ in range(_MAX_CLAIM_TRIES):
            number = self.latest_epoch()[0] + 1
            # A run that was slow to get here must not fence off a newer plan's.
            if plan.number < self.latest_plan_number():
                raise FencedError(f"{self.storage.where}: another run has begun a newer plan")
            opened = RollUp()
            durable = self.durable(plan, opened.add)
            claim = {
                "plan": plan.number,
                "plan_id": plan.plan_id,
                "run_id": run_id,
                **facts,
                "accepted": [part.name for part in durable.parts],
            }
            # Of a run that slept since it looked, the number may have been used and pruned: then it
            # wins, and the first look at the fence ends it.
            if self.storage.put_if_absent(numbered("epochs", number), _dumps(claim)):
                opened.keep(self.storage, number)
                return Epoch(number, plan, run_id, durable)
        msg = f"{self.storage.where}: other runs keep claiming this job; let one of them run"
        raise OutputError(msg)

    def check_fence(self, epoch: Epoch) -> None:
        """Notice a later claim. Politeness only: correctness rests on what the claim names.

        Raises:
            FencedError: A later run has taken over, or the plan is published.
        """
        if (manifest := self.manifest(epoch.plan.number)) is not None:
            raise FencedError(f"{self.storage.where}: run {manifest.run_id} has published this job")
        if self.latest_epoch_number() > epoch.number:
            _, claim = self.latest_epoch()
            raise FencedError(
                f"{self.storage.where}: run {claim.get('run_id')} on {claim.get('host')} has "
                "taken this job over; what this run committed before counts"
            )

    def tidy(self, manifest: Manifest) -> None:
        """Remove what no claim can name again now that a plan is published. Idempotent.

        Later epochs are left alone: they may belong to a live run of the next plan. Snapshots
        that a manifest names are kept.
        """
        folders = (f"{STATE}/parts", f"{STATE}/seals", FOOTERS)
        names = [name for folder in folders for name in self.storage.list(folder)]
        names += self._unnamed()
        for folder in (*folders, DIGESTS, FILES, LISTS, KEYS, ""):
            names += self.storage.temps(folder)
        wanted = self._wanted_parts(manifest)
        for name in names:
            if epoch_of(name) <= manifest.epoch and name not in wanted:
                self.storage.remove(name)
        named = {file.name.rpartition("/")[0] for one in self.manifests() for file in one.files}
        for name in self.storage.list(f"{STATE}/snapshots"):
            if epoch_of(name) <= manifest.epoch and name not in named:
                self.storage.remove_folder(name)

    def _wanted_parts(self, manifest: Manifest) -> set[str]:
        """Parts that the next plan takes rows over from, though a rollback came between."""
        plan = self.latest_plan()
        if plan is None:
            return set()
        in_work = plan.bases if plan.number > manifest.number else ()
        return {name for base in (*plan.continues, *in_work) for name in base.parts}

    def _unnamed(self) -> Iterator[str]:
        """Yield files and lists that no manifest names."""
        names = [number_of(name) for name in self._numbered_files("manifests")]
        lists = {name for number in names for name in self.lists_of(number)}
        files = {file.name for name in lists for file in self._list(name)}
        keys = set(map(keys_of, files))
        for folder, named in ((FILES, files), (LISTS, lists), (KEYS, keys)):
            yield from (name for name in self.storage.list(folder) if name not in named)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.storage.path(name)
        if not path.is_file():
            raise self._not_understood(name, "it is no file" if path.exists() else "it is gone")
        try:
            fields = parse_state(self.storage.read(name) or b"")
            found = fields.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._not_understood(name, str(error)) from error
        if found not in _READABLE:
            raise self._not_understood(name, f"format {found}, this batchgen reads {FORMAT}")
        return dict(fields)

    def _not_understood(self, name: str, why: str) -> OutputError:
        return OutputError(
            f"{self.storage.where}/{name}: not a batchgen file of this version ({why}); "
            "use the batchgen that began the job, or another output.path"
        )


def _accept(
    told: Told, plan: Plan, same: Same, parts: list[Part], rejected: dict[str, str]
) -> None:
    try:
        parts.append(Part(told.name, _footer(told, plan, same)))
    except ValueError as error:
        rejected[told.name] = str(error)


def _footer(told: Told, plan: Plan, same: Same) -> PartFooter:
    """A part's own books, checked against the plan and the file.

    Raises:
        ValueError: The part does not count.
    """
    footer = same.footer(told.footer)
    if footer.plan != plan.plan_id:
        raise ValueError("belongs to another plan")
    if told.num_rows != footer.num_results:
        raise ValueError(f"holds {told.num_rows} rows, its footer says {footer.num_results}")
    for segment, rows in footer.done.items():
        planned = plan.segments[segment].num_rows if segment < len(plan.segments) else 0
        if rows and rows.spans[-1][1] > planned:
            msg = f"names row {rows.spans[-1][1] - 1} of segment {segment}, which has {planned}"
            raise ValueError(msg)
    if not set(plan.carried) <= set(json.loads(told.columns)):
        raise ValueError("lacks columns of the plan")
    return footer


def _cut(files: Sequence[PublishedFile]) -> Iterator[Sequence[PublishedFile]]:
    """Yield runs of files, each a list's."""
    first = 0
    for at, file in enumerate(files, 1):
        is_cut = int(file.sha256[:8] or "0", 16) % _CUT_ONE_IN == 0
        if is_cut or at - first == _LIST_FILES or at == len(files):
            yield files[first:at]
            first = at


def _fields_of(file: PublishedFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in file.__slots__}


def _digest_of_list(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()[:32]}.json"


def _bases(found: Sequence[Mapping[str, Any]]) -> tuple[Base, ...]:
    return tuple(Base(**{**one, "parts": tuple(one.get("parts", ()))}) for one in found)


def _dumps(fields: dict[str, Any]) -> bytes:
    # For people, but for what nobody reads: a million lines would take their size in memory twice.
    is_long = any(isinstance(value, list) and len(value) > _LONG for value in fields.values())
    return json.dumps({"format": FORMAT, **fields}, indent=None if is_long else 1).encode() + b"\n"
