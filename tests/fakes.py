"""Stand-ins behind the seams: an engine with scripted answers, a clock that only tests move.

Plus the few values that many tests need: batches, results, plans.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from dataclasses import asdict, astuple, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.answers.json_schema import row_validator
from batchgen.answers.output_format import answer_columns, make_format
from batchgen.answers.validate import Judge
from batchgen.core.records import (
    Completion,
    EngineFacts,
    EngineStats,
    Ordinal,
    Ranges,
    Request,
    Result,
    RowBatch,
    Sample,
    Verdict,
)
from batchgen.job.model import JobConfig
from batchgen.job.recipe import Seeds
from batchgen.prompt.builder import PromptBuilder
from batchgen.prompt.requests import RequestBuilder
from batchgen.source.columns import schema_text
from batchgen.store.books import STATE, Manifest, Plan, PublishedFile, Segment
from batchgen.store.parts import Parts
from batchgen.store.published import ORDINALS, PublishedRows, ordinals_of
from batchgen.store.result_files import GROUPS_KEY
from batchgen.store.snapshot import write_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from batchgen.core.records import RowError
    from batchgen.engine.supervised import SupervisedEngine
    from batchgen.storage import LocalStorage
    from batchgen.store.books import Kept, PartFooter
    from batchgen.store.ledger import Ledger
    from batchgen.store.snapshot import SnapshotFormat

ANSWER = (pa.field("text", pa.string()),)
"""The answer's columns of a job for free text."""
FACTS = EngineFacts("fake", "7", "none", None, 4, 0.0)


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


Act = "Callable[[FakeEngine], list[Completion]] | Exception"


class FakeEngine:
    """An `Engine` whose steps are queued: `then(...)` says what the next steps do.

    With nothing queued, a step finishes all that it holds, in the order of admission.
    """

    def __init__(self, capacity: int = 4, *, facts: EngineFacts | None = FACTS) -> None:
        self.facts = facts
        self.capacity = capacity
        self.stats = EngineStats()
        self.held: dict[int, Request] = {}
        self.added: list[Request] = []
        self.max_held = 0
        self.num_steps = 0
        self.is_closed = False
        self.on_step: Callable[[], None] = lambda: None
        self._acts: deque[Any] = deque()
        self._add_error: Exception | None = None

    @property
    def num_in_flight(self) -> int:
        return len(self.held)

    def then(self, *acts: Any) -> FakeEngine:
        """Queue steps: a function of the engine that returns completions, or what to raise."""
        self._acts.extend(acts)
        return self

    def refuse_add(self, error: Exception) -> None:
        """Be dead from the next `add` on."""
        self._add_error = error

    def add(self, requests: Sequence[Request]) -> None:
        if self._add_error is not None:
            raise self._add_error
        self.added.extend(requests)
        self.held.update((request.request_id, request) for request in requests)
        self.max_held = max(self.max_held, len(self.held))

    def step(self, timeout_s: float) -> list[Completion]:
        assert 0 <= timeout_s <= 0.2
        self.num_steps += 1
        self.on_step()
        act = self._acts.popleft() if self._acts else finish_all
        if isinstance(act, Exception):
            raise act
        return act(self)

    def close(self) -> None:
        self.is_closed = True
        self.held.clear()

    def finish(self, request_id: int, **changes: Any) -> Completion:
        """Take a request out and answer it."""
        self.held.pop(request_id, None)
        return completion(request_id, **changes)


class AsEngine:
    """A supervised engine as an `Engine`: completions without their requests."""

    def __init__(self, engine: SupervisedEngine) -> None:
        self.supervised = engine

    def step(self, timeout_s: float) -> list[Completion]:
        return [done for _, done in self.supervised.step(timeout_s)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.supervised, name)


def ask(request_id: int, prompt: str = "") -> Request:
    """A request for row `request_id` of segment 0."""
    return Request(
        request_id=request_id,
        ordinal=Ordinal(0, request_id),
        prompt=prompt or f"row {request_id}",
        request_key=f"{request_id:032x}",
        seed=None,
        batch=batch([request_id]),
        index=0,
    )


def finish_all(engine: FakeEngine) -> list[Completion]:
    return [engine.finish(request_id) for request_id in list(engine.held)]


def finish_newest(engine: FakeEngine) -> list[Completion]:
    return [engine.finish(max(engine.held))]


def finish_nothing(_: FakeEngine) -> list[Completion]:
    return []


def lose_all(engine: FakeEngine) -> list[Completion]:
    engine.held.clear()
    return []


def finish(*request_ids: int) -> Callable[[FakeEngine], list[Completion]]:
    """Answer these, in this order, held or not."""
    return lambda engine: [engine.finish(request_id) for request_id in request_ids]


def completion(request_id: int, **changes: Any) -> Completion:
    fields: dict[str, Any] = {
        "num_prompt_tokens": 10,
        "num_cached_tokens": 4,
        "num_output_tokens": 3,
        "latency_s": 0.5,
        **changes,
    }
    text = fields.pop("text", f"answer {request_id}")
    reason = fields.pop("finish_reason", "stop")
    return Completion(request_id, () if text is None else (Sample(text, reason),), **fields)


def batch(
    rows: Sequence[int],
    *,
    segment: int = 0,
    errors: Mapping[int, RowError] | None = None,
    skipped: Iterable[int] = (),
    carried: pa.RecordBatch | None = None,
) -> RowBatch:
    """Rows whose prompt is `prompt SEGMENT/ROW`; `errors` are by row number here."""
    bad = {rows.index(row): error for row, error in (errors or {}).items()}
    ids = [f"{segment}/{row}" for row in rows]
    return RowBatch(
        segment=segment,
        rows=list(rows),
        values=[None if at in bad else {"text": f"prompt {i}"} for at, i in enumerate(ids)],
        carried=carried if carried is not None else pa.record_batch({"id": ids}),
        errors=bad,
        skipped=Ranges.of(skipped),
    )


def results(given: RowBatch, *, errors: Mapping[int, RowError] | None = None) -> list[Result]:
    """One result a row of a batch; `errors` by row number."""
    failed = errors or {}
    return [
        Result(
            ordinal=Ordinal(given.segment, row),
            batch=given,
            index=index,
            request_key=None if row in failed else f"{given.segment:016x}{row:016x}",
            completion=None if row in failed else completion(row, text=f"{given.segment}:{row}"),
            error=failed.get(row),
            verdict=Verdict.ERROR if row in failed else Verdict.OK,
            values=None if row in failed else [f"{given.segment}:{row}"],
            attempts=0 if row in failed else 1,
        )
        for index, row in enumerate(given.rows)
    ]


def tables_of_job(**tables: Any) -> dict[str, Any]:
    """A job that asks for each row's `text`; keywords are tables whose keys replace or join."""
    given: dict[str, Any] = {
        "input": {"path": "rows.jsonl"},
        "prompt": {"user": "{{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 32, "temperature": 0.0},
        "output": {"path": "out"},
    }
    for name, table in tables.items():
        given[name] = {**given.get(name, {}), **table} if isinstance(table, dict) else table
    return given


def job(**tables: Any) -> JobConfig:
    """The same, checked; its files are not read."""
    return JobConfig.model_validate(tables_of_job(**tables))


def request_builder(
    made: JobConfig | None = None, *, recipe: str = "recipe", ids: Iterator[int] | None = None
) -> RequestBuilder:
    made = made or job()
    seeds, ids = Seeds(made.sampling), ids or itertools.count()
    return RequestBuilder(
        PromptBuilder(made.prompt), made, recipe, seeds=seeds, ids=ids, check_schema=row_validator
    )


def judge_of(made: JobConfig | None = None) -> Judge:
    made = made or job()
    form = make_format(made.output)
    return Judge(made, form, answer_columns(made, form))


def plan(*num_rows: int, plan_id: str = "plan-a", number: int = 1) -> Plan:
    """A plan of segments with so many rows each."""
    return Plan(
        number=number,
        plan_id=plan_id,
        created_at="2025-01-01T00:00:00+00:00",
        job={"recipe": {"prompt": {"user": "{{ text }}"}}, "input": {}, "output": {}},
        recipe_fingerprint="f" * 32,
        input_format="jsonl",
        columns=["id: string"],
        schema=schema_text(pa.schema([])),
        carried=["id"],
        segments=[
            Segment(f"/in/{at}.jsonl", 100 + at, "1", f"digest-{at}", rows)
            for at, rows in enumerate(num_rows)
        ],
    )


def manifest_of(files: Sequence[PublishedFile], **changes: Any) -> Manifest:
    """Of a snapshot, as if each of its rows were ok."""
    num_rows = sum(file.num_rows for file in files)
    whole = Manifest(
        number=1,
        plan_id="plan-a",
        epoch=1,
        run_id="run-1",
        created_at="2025-01-01T00:00:00+00:00",
        files=files,
        num_planned=num_rows,
        num_ok=num_rows,
        num_errors=0,
        num_skipped=0,
    )
    return replace(whole, **changes)


def write_parts(
    storage: LocalStorage,
    parts: Sequence[tuple[str, PartFooter]],
    made: Plan,
    form: SnapshotFormat,
    kept: Sequence[Kept] = (),
) -> list[PublishedFile]:
    """The entries of a snapshot of parts, written under `snap/`."""
    return write_snapshot(Parts(storage, parts, form.schema), made, kept, form, "snap/e1")


def as_version_1(storage: LocalStorage, manifest: Manifest, made: Plan) -> Manifest:
    """The same snapshot as 0.1 had it: an index of rows, and files that tell nothing."""
    ordinals, groups = [], []
    with PublishedRows(storage, manifest, made) as snapshot:
        for one in snapshot.files():
            ordinals += [ordinals_of(one.rows(group)) for group in range(one.num_groups)]
            told = (one.file.metadata or {})[GROUPS_KEY.encode()]
            groups.append([*json.loads(told), one.entry.chunks[-1]])
    folder = f"{STATE}/snapshots/e{manifest.epoch:06d}"
    storage.make_folder(storage.path(folder))
    path = storage.path(f"{folder}/index.parquet")
    schema = ORDINALS.with_metadata({GROUPS_KEY: json.dumps(groups)})
    with pq.ParquetWriter(path, schema) as index:
        for table in ordinals:
            index.write_table(table.cast(schema))
    data = path.read_bytes()
    files = []
    for at, file in enumerate(manifest.files):
        name = f"{folder}/part-{at:05d}.parquet"
        storage.path(name).hardlink_to(storage.path(file.name))
        files.append(PublishedFile(name, *astuple(file)[1:4]))
    digest, num_rows = hashlib.sha256(data).hexdigest(), sum(map(len, ordinals))
    entry = PublishedFile(f"{folder}/index.parquet", num_rows, len(data), digest)
    return replace(manifest, files=files, index=entry)


def put_version_1(ledger: Ledger, manifest: Manifest) -> None:
    """Publish a snapshot as 0.1 did."""
    fields = asdict(manifest)
    del fields["schema"]
    for file in (*fields["files"], fields["index"]):
        for name in [*file][4:]:
            del file[name]
    data = json.dumps({"format": 1, **fields}).encode()
    ledger.storage.remove(f"{STATE}/manifests/{manifest.number:06d}.json")
    ledger.storage.put_if_absent(f"{STATE}/manifests/{manifest.number:06d}.json", data)


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
