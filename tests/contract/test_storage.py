"""What every storage promises: a local folder, and a bucket of a real S3 server."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time

import pytest

from batchgen.core.errors import OutputError, StorageError, StoreAwayError
from batchgen.core.places import Bucket, bucket_url, folder_of
from batchgen.storage import LocalStorage
from batchgen.storage.remote import RemoteStorage, storage_at
from tests import s3

NAME = "_batchgen/epochs/000001.json"
_SERIAL = iter(range(10**6))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with s3.s3_server(tmp_path_factory.mktemp("s3") / "data") as endpoint:
        yield endpoint


def bucket(endpoint=None, **how):
    return Bucket(f"s3://{s3.BUCKET}/out/{os.getpid()}-{next(_SERIAL)}", endpoint, **how)


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path):
    if request.param == "folder":
        return tmp_path / "out"
    request.getfixturevalue("endpoint")
    return bucket()


def test_a_name_is_put_once_and_read_as_it_was_put(root):
    one, other = storage_at(root), storage_at(root)
    assert one.read(NAME) is None
    assert one.list("_batchgen/epochs") == []
    assert one.put_if_absent(NAME, b"one")
    assert other.put_if_absent(NAME, b"one")  # Its own, doubled.
    assert not other.put_if_absent(NAME, b"two")
    assert one.read(NAME) == other.read(NAME) == b"one"
    assert other.path(NAME).read_bytes() == b"one"
    assert other.list("") == ["_batchgen"]
    assert other.list("_batchgen/epochs") == [NAME]
    assert other.num_bytes("_batchgen") == 3
    assert not other.path("_batchgen/none").exists()
    assert other.mark(NAME)[0] == 3
    assert other.mark("_batchgen/epochs")[0] == -1
    assert other.mark("_batchgen/epochs")[1] >= other.mark(NAME)[1]
    one.remove(NAME)
    one.remove(NAME)
    assert other.read(NAME) is None
    assert other.mark(NAME) is None  # Also where it has been read before.
    assert not one.path(NAME).exists()


def test_of_many_who_put_one_name_one_wins(root):
    wins, start = [], threading.Barrier(8)

    def put(number):
        storage = storage_at(root, temp_tag=f"run-{number}")
        start.wait()
        mine = [n for n in range(5) if storage.put_if_absent(f"a/{n}", b"%d" % number)]
        wins.extend((name, number) for name in mine)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage = storage_at(root)
    assert sorted(name for name, _ in wins) == [0, 1, 2, 3, 4]
    assert all(storage.read(f"a/{name}") == b"%d" % number for name, number in wins)


def test_a_file_that_is_written_in_pieces_is_there_as_a_whole_or_not(root):
    storage = storage_at(root)
    dropped, kept = storage.begin("files/a"), storage.begin("files/a")
    for file in (dropped, kept):
        file.write(b"one")
        file.write(b"two")
    dropped.discard()
    assert storage.list("files") == []
    assert kept.commit("b")
    assert storage.list("files") == ["files/b"]
    assert storage_at(root).path("files/b").read_bytes() == b"onetwo"
    assert not list(storage.root.rglob("*.tmp"))


def test_a_mark_changes_with_what_it_marks_and_a_replaced_name_is_the_new_one(root):
    storage = storage_at(root)
    assert storage.mark("live.json") is None
    storage.replace("live.json", b"1")
    first = storage.mark("live.json")
    assert first[0] == 1
    assert storage.mark("live.json") == first
    storage.replace("live.json", b"2")
    assert storage.mark("live.json") != first
    assert storage.read("live.json") == b"2"
    json.dumps(first)  # It is noted.


def test_folders_go_and_others_stay(root):
    storage = storage_at(root)
    for name in ("a/b/1", "a/2", "ab/3"):
        storage.put_if_absent(name, b"x")
    storage.remove_folder("a")
    assert [storage.read(name) for name in ("a/b/1", "a/2", "ab/3")] == [None, None, b"x"]
    storage.remove_folder("a")


WHO = {"run_id": "r", "host": socket.gethostname(), "pid": os.getpid()}


def lock(storage, run_id="r", **how):
    return storage.lock("_batchgen/lock", json.dumps({**WHO, "run_id": run_id}).encode(), **how)


def test_one_holds_a_lock_until_it_lets_go(root, monkeypatch):
    monkeypatch.setattr("batchgen.storage.remote._BEAT_S", 0.1)
    storage, other = storage_at(root), storage_at(root)
    assert not other.is_locked("_batchgen/lock")
    let_go = lock(storage)
    assert lock(other, "s") is None
    assert other.is_locked("_batchgen/lock")
    assert json.loads(other.read("_batchgen/lock"))["run_id"] == "r"
    let_go()
    assert not other.is_locked("_batchgen/lock")
    lock(other, "s")()


@pytest.mark.timeout(120)
def test_what_a_killed_process_held_is_free_at_once(root, monkeypatch):
    monkeypatch.setattr("batchgen.storage.remote._LOST_S", 600.0)
    told = f"import json, os, pickle; storage = pickle.loads({pickle.dumps(storage_at(root))!r})\n"
    told += f"who = json.dumps({{**{WHO!r}, 'pid': os.getpid()}}).encode()\n"
    told += "storage.lock('_batchgen/lock', who); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", told], check=False)
    assert not storage_at(root).is_locked("_batchgen/lock")
    lock(storage_at(root))()


def test_a_holder_that_gives_no_sign_of_life_loses_a_bucket(endpoint, monkeypatch):
    monkeypatch.setattr("batchgen.storage.remote._LOST_S", 1.0)
    root = bucket()
    elsewhere = {**WHO, "host": "elsewhere"}
    storage_at(root).put_if_absent("_batchgen/lock", json.dumps(elsewhere).encode())
    lock(storage_at(root), "s")()


def test_a_lock_that_was_stolen_is_not_taken_back(endpoint, monkeypatch):
    monkeypatch.setattr("batchgen.storage.remote._BEAT_S", 0.05)
    storage = storage_at(bucket())
    let_go = lock(storage)
    thief = lock(storage, "thief", steal=True)
    until_s = time.monotonic() + 60
    while sum(thread.name == "sign of life" for thread in threading.enumerate()) > 1:
        assert time.monotonic() < until_s, "it goes on to say that it lives"
        time.sleep(0.01)
    let_go()
    assert json.loads(storage.read("_batchgen/lock"))["run_id"] == "thief"
    thief()
    assert storage.read("_batchgen/lock") is None


@pytest.mark.parametrize("fault", s3.FAULTS)
def test_a_put_or_get_whose_reply_goes_wrong_is_settled(endpoint, fault):
    with s3.Proxy(endpoint, fault) as proxy:
        root = bucket(proxy.url)
        storage = storage_at(root)
        assert storage.put_if_absent("a", b"mine" * 1000)
        fresh = storage_at(root)
        assert fresh.path("a").read_bytes() == b"mine" * 1000
        assert not fresh.put_if_absent("a", b"theirs")
        storage.replace("live", b"1")
        assert fresh.read("live") == b"1"
        if fault != "cut":
            storage_at(Bucket(root.url, endpoint)).put_if_absent("b", b"theirs")
            assert not storage.put_if_absent("b", b"mine")
        assert proxy.spoilt


def test_a_store_that_is_away_is_a_storage_error(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as held:
        away = f"http://127.0.0.1:{held.getsockname()[1] ^ 1}"
    storage = storage_at(bucket(away))
    with pytest.raises(StorageError, match="does not answer"):
        storage.replace("a", b"x")


def test_a_run_waits_for_a_store_that_is_away_until_it_is_stopped(endpoint, monkeypatch):
    monkeypatch.setattr("batchgen.storage.remote._WAITS_S", (0.01, 0.01))
    told = []
    with s3.Proxy(endpoint, "away", 0) as proxy:
        storage = storage_at(bucket(proxy.url))
        with storage.patient(60, lambda: False, told.append):
            assert storage.put_if_absent("a", b"mine")
        assert "does not answer" in str(told[0])
        proxy.point = proxy.asked.total()
        with pytest.raises(StoreAwayError) as caught, storage.patient(60, lambda: True, id):
            storage.read("a")
        assert caught.value.exit_code == 75
        assert proxy.asked.total() - proxy.point <= 3


def test_a_key_goes_with_each_put():
    config = storage_at(bucket(kms_key="k", timeout_s=3))._store
    assert config.config["sse_kms_key_id"] == "k"
    assert config.config["server_side_encryption"] == "aws:kms"


def test_a_store_that_is_silent_is_waited_for_once(endpoint, monkeypatch):
    monkeypatch.setattr("batchgen.storage.remote._PATIENCE_S", 0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = f"http://127.0.0.1:{silent.getsockname()[1]}"
        storage = storage_at(bucket(there, timeout_s=0.2))
        with pytest.raises(StorageError, match="does not answer"):
            storage.read("a")
        silent.accept()[0].close()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_who_logs_in_again_is_seen(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
    storage = storage_at(bucket())
    with pytest.raises(StorageError, match="not valid, or not any more; log in again"):
        storage.put_if_absent("a", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET)
    assert storage.put_if_absent("a", b"1")


def test_a_folder_that_was_made_by_hand_is_empty(endpoint):
    root = bucket()
    s3.client_of(endpoint).put_object(Bucket=root.name, Key=f"{root.prefix}/", Body=b"")
    storage_at(root).check("_batchgen")


def test_a_region_is_that_of_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    regions = [
        storage_at(bucket(region=region))._store.config["region"] for region in (None, "local")
    ]
    assert regions == ["eu-central-1", "local"]


def test_a_store_that_ignores_conditions_is_refused(endpoint):
    with (
        s3.Proxy(endpoint, "ignore") as proxy,
        pytest.raises(OutputError, match="ignores If-None-Match"),
    ):
        storage_at(bucket(proxy.url)).check("_batchgen")


def test_what_cannot_work_is_refused_in_a_line(endpoint, monkeypatch):
    storage_at(bucket()).check("_batchgen")
    with pytest.raises(OutputError, match="no such bucket"):
        storage_at(Bucket("s3://no-such-bucket/a")).check("_batchgen")
    foreign = bucket()
    storage_at(foreign).put_if_absent("theirs", b"x")
    with pytest.raises(OutputError, match="not batchgen's"):
        storage_at(foreign).check("_batchgen")
    with pytest.raises(OutputError, match="expected a folder"):
        folder_of(bucket())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(OutputError, match=r"not valid.*SignatureDoesNotMatch"):
        storage_at(bucket()).check("_batchgen")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(OutputError, match="found no credentials"):
        storage_at(bucket())


def test_a_probe_leaves_nothing_and_a_dry_one_writes_nothing(endpoint):
    storage = storage_at(bucket())
    storage.check("_batchgen", is_dry=True)
    storage.check("_batchgen")
    assert storage.num_bytes("") == 0


def test_what_is_read_lies_here_as_long_as_the_storage(endpoint):
    storage = storage_at(bucket())
    storage.put_if_absent("a", b"x")
    killed = storage.root.with_name(f"{storage.root.name}-killed")
    killed.mkdir()
    again = RemoteStorage(bucket())
    storage_at(Bucket(storage.where)).replace("a", b"y")
    assert storage.path("a").read_bytes() == b"x"  # Not fetched again.
    assert not killed.exists()
    root = again.root
    del again
    assert not root.exists()


@pytest.mark.parametrize(
    ("url", "problem"),
    {
        "s3a://bucket/a": "s3://bucket/a",
        "gs://bucket/a": "is not supported",
        "s3://bucket": "a whole bucket",
        "s3://bucket/": "a whole bucket",
        "s3:///a": "no name of a bucket",
        "s3://Bucket/a": "no name of a bucket",
        "s3://user:secret@bucket/a": "credentials",
        "s3://bucket/a b": "cannot be in a prefix",
        "s3://bucket/a%20b": "cannot be in a prefix",
        "s3://bucket/a?x=1": "cannot be in a prefix",
        "s3://bucket/a//b": "cannot be in a prefix",
        "s3://bucket/../b": "cannot be in a prefix",
    }.items(),
)
def test_a_url_that_is_not_taken_has_its_reason(url, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        bucket_url(url)
    assert "secret" not in str(caught.value)


def test_a_url_is_kept_without_slashes_at_its_end(tmp_path):
    assert bucket_url("s3://bucket/a/b//") == "s3://bucket/a/b"
    assert type(storage_at(tmp_path)) is LocalStorage
