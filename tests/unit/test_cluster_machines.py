"""What a replica takes, who is refused, what goes into a pack, what crosses to another machine."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from typing import Any

import pytest

from batchgen.cluster.leases import PACK_ROWS, LeaseBook, Packer, rows_of
from batchgen.cluster.machines import Resources, resources_of, share_gpu
from batchgen.core import errors
from batchgen.core.errors import BatchgenError, ConfigError, GateError, RecipeChangedError
from batchgen.core.records import Ranges, Request, RowError
from batchgen.pipeline.runner import FeedBatch, Feeder
from tests import fakes


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ({}, False),
        ({"replicas": 2}, True),
        ({"replicas": "auto"}, True),
        ({"ray_address": "auto"}, True),
    ],
)
def test_one_replica_needs_no_fleet_unless_a_cluster_is_named(
    run: dict[str, Any], told: bool
) -> None:
    assert fakes.job(run=run).run.is_cluster is told


@pytest.mark.parametrize(
    ("run", "model", "needs"),
    [
        ({}, {}, Resources(1.0, 0.0)),
        ({"cpus_per_replica": 0.5}, {}, Resources(0.5, 0.0)),
        ({"gpus_per_replica": 0.5}, {}, Resources(1.0, 0.5)),
        ({"gpus_per_replica": 8}, {"tensor_parallel_size": 8}, Resources(1.0, 8.0)),
    ],
)
def test_what_a_replica_takes(run: dict[str, Any], model: dict[str, Any], needs: Resources) -> None:
    assert resources_of(fakes.job(run=run, model=model)) == needs


@pytest.mark.parametrize(
    ("gpus", "model", "told"),
    [
        (1.5, {}, "gpus_per_replica = 1.5, expected a whole number, or less than 1"),
        (1, {"tensor_parallel_size": 2}, "gpus_per_replica = 1, expected 2"),
        (2, {"tensor_parallel_size": 2, "engine": {"pipeline_parallel_size": 2}}, "expected 4"),
    ],
)
def test_gpus_that_cannot_be_had_so_are_refused(
    gpus: float, model: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        resources_of(fakes.job(run={"gpus_per_replica": gpus}, model=model))


def test_replicas_that_share_a_gpu_cannot_have_most_of_its_memory_each() -> None:
    model = {"backend": "vllm", "name": "m", "gpu_memory_utilization": 0.9}
    job = fakes.job(run={"gpus_per_replica": 0.5, "replicas": 2}, model=model)
    with pytest.raises(ConfigError, match=r"each takes 0\.9 of a GPU's memory; leave it out"):
        resources_of(job)
    alone = fakes.job(run={"gpus_per_replica": 0.5, "replicas": 1}, model=model)
    assert resources_of(alone).num_gpus == 0.5
    half = fakes.job(
        run={"gpus_per_replica": 0.5, "replicas": 2}, model={**model, "gpu_memory_utilization": 0.4}
    )
    assert resources_of(half).num_gpus == 0.5


def test_replicas_that_share_a_gpu_share_its_memory() -> None:
    made = fakes.job()
    assert share_gpu(made, Resources(1, 0.5)).model.gpu_memory_utilization == 0.45
    assert share_gpu(made, Resources(1, 1)) == made
    chosen = fakes.job(model={"gpu_memory_utilization": 0.3})
    assert share_gpu(chosen, Resources(1, 0.5)).model.gpu_memory_utilization == 0.3


def test_without_ray_replicas_are_refused_with_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from batchgen.cluster.ray import ray_cluster\n"
        "from tests import fakes\n"
        "ray_cluster(fakes.job(run={'replicas': 8}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "[run]: replicas = 8 needs Ray: pip install ray" in done.stderr


def all_errors() -> list[BatchgenError]:
    made: dict[type[BatchgenError], tuple[Any, ...]] = {
        ConfigError: ("job.toml", ["a is wrong", "b is wrong"]),
        errors.SourceError: ("in.jsonl", "is gone"),
        errors.InputChangedError: ("in.jsonl", "has other content"),
        RecipeChangedError: ("out", ["model.name: a -> b"]),
        errors.StorageError: ("out/part", "no space"),
        errors.StoreAwayError: ("s3://bucket/part", "503"),
        errors.DamagedPartError: ("part", "torn"),
        errors.ProcessDiedError: (-9,),
        GateError: ("2 % errors", [{"name": "max_error_rate"}]),
    }
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, BatchgenError)
    ]
    return [kind(*made.get(kind, ("what happened",))) for kind in kinds]


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: type(error).__name__)
def test_every_error_survives_the_way_to_another_machine(error: BatchgenError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert there.__dict__ == error.__dict__
    assert there.exit_code == error.exit_code


def requests(texts: list[str]) -> list[Request]:
    given = fakes.batch(range(len(texts)))
    made = [one for one in fakes.request_builder().of(given) if isinstance(one, Request)]
    return [one._replace(prompt=text) for one, text in zip(made, texts, strict=True)]


def test_a_packer_packs_every_row_once() -> None:
    many = requests([f"prompt {number:05d}" for number in range(3 * PACK_ROWS + 5)])
    last = len(many)
    ended = fakes.results(fakes.batch([last]), errors={last: RowError("bad_json", "not an object")})
    feds = [
        FeedBatch(many[:2000], ended, 0, Ranges([(last + 1, last + 4)]), 0),
        FeedBatch(many[2000:], (), 0, Ranges(), 0),
    ]
    put: list[FeedBatch] = []
    book = LeaseBook({})
    packer = Packer(Feeder(feds), put.extend, last + 4)
    deadline = time.monotonic() + 40
    while not packer.is_done:
        packer.fill(book, 1 << 20)
        assert time.monotonic() < deadline
    packer.close()
    assert sorted(row for fed in put for row in rows_of(fed).get(0, ())) == list(range(last + 4))
    assert book.num_pending == last + 4
    assert packer.num_left == 0


def test_packs_of_large_rows_are_small_and_few() -> None:
    many = requests(["x" * (1 << 20) for _ in range(40)])
    put: list[FeedBatch] = []
    book = LeaseBook({})
    packer = Packer(
        Feeder([FeedBatch(many, (), 0, Ranges(), 0), FeedBatch(many, (), 0, Ranges(), 0)]),
        put.extend,
        80,
    )
    deadline = time.monotonic() + 40
    while book.num_pending < 40 and time.monotonic() < deadline:
        packer.fill(book, PACK_ROWS)
    for _ in range(20):
        packer.fill(book, PACK_ROWS)
    packer.close()
    assert book.num_pending == 40
    assert max(len(fed.requests) for fed in put) <= 4
