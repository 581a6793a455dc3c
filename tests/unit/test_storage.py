"""Put-if-absent, read, list on a local folder; and opening, looking at and finding inputs."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from batchgen.core.errors import OutputError, StorageError
from batchgen.storage import Disk, LocalStorage

NAME = "_batchgen/epochs/000001.json"


def everything(storage):
    return sorted(
        str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file()
    )


def test_nothing_is_created_before_the_first_put(storage):
    assert storage.list("_batchgen/epochs") == []
    assert storage.read(NAME) is None
    storage.remove(NAME)
    assert not storage.root.exists()
    assert storage.where == str(storage.root)


def test_put_makes_a_name_exist_with_its_bytes_and_leaves_no_temp(storage):
    assert storage.put_if_absent(NAME, b"one") is True
    assert storage.read(NAME) == b"one"
    assert everything(storage) == [NAME]


def test_a_second_put_of_other_bytes_loses_and_changes_nothing(storage):
    storage.put_if_absent(NAME, b"one")
    assert storage.put_if_absent(NAME, b"two") is False
    assert storage.read(NAME) == b"one"
    assert everything(storage) == [NAME]


def test_a_second_put_of_the_same_bytes_is_the_first_one_come_true(storage):
    storage.put_if_absent(NAME, b"one")
    other = LocalStorage(storage.root, temp_tag="run-b")
    assert other.put_if_absent(NAME, b"one") is True
    assert everything(storage) == [NAME]


def test_what_was_put_is_read_only(storage):
    storage.put_if_absent(NAME, b"one")
    storage.replace("_batchgen/runs/live.json", b"{}")
    for name in (NAME, "_batchgen/runs/live.json"):
        assert not storage.path(name).stat().st_mode & 0o222


def test_an_alias_is_left_as_it_is_if_the_file_is_not_wanted(storage):
    storage.put_if_absent("a/new", b"new")
    storage.put_if_absent("b/old", b"old")
    assert storage.expose("a/new", "b/old", lambda path: path.read_bytes() == b"other") is False
    assert storage.read("b/old") == b"old"
    assert everything(storage) == ["a/new", "b/old"]
    assert storage.expose("a/new", "b/old", lambda path: path.read_bytes() == b"new") is True
    assert storage.read("b/old") == b"new"


def test_an_empty_file_is_a_name_too(storage):
    assert storage.put_if_absent(NAME, b"") is True
    assert storage.read(NAME) == b""
    assert storage.put_if_absent(NAME, b"x") is False


def test_of_many_puts_at_once_one_wins_and_its_bytes_hold(storage):
    barrier = threading.Barrier(8)
    won = []

    def race(data):
        mine = LocalStorage(storage.root, temp_tag=data.decode())
        barrier.wait()
        if mine.put_if_absent(NAME, data):
            won.append(data)

    threads = [threading.Thread(target=race, args=(b"run-%d" % at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [storage.read(NAME)]
    assert everything(storage) == [NAME]


def test_temp_names_are_hidden_tagged_and_never_the_same(storage):
    first, second = storage.temp_for(NAME), storage.temp_for(NAME)
    assert first == storage.root / "_batchgen/epochs/.000001.json.run-a-1.tmp"
    assert second == storage.root / "_batchgen/epochs/.000001.json.run-a-2.tmp"
    assert not first.exists()


def test_without_a_tag_temp_names_have_the_process(tmp_path):
    temp = LocalStorage(tmp_path).temp_for("x")
    assert temp.name == f".x.p{os.getpid()}-1.tmp"


def test_a_pending_file_gets_its_name_once(storage):
    for content, won in [(b"one", True), (b"two", False)]:
        pending = storage.begin(NAME)
        pending.write(content)
        assert pending.commit() is won
        assert not storage.temps("_batchgen/epochs")
    assert storage.read(NAME) == b"one"


def test_a_pending_file_whose_temp_is_gone_is_a_storage_error(storage):
    pending = storage.begin(NAME)
    for temp in storage.temps("_batchgen/epochs"):
        storage.remove(temp)
    with pytest.raises(StorageError, match=r"000001\.json: No such file or directory; what was"):
        pending.commit()
    assert storage.read(NAME) is None


def test_list_gives_full_names_sorted_without_temps(storage):
    for name in ("b", "a", "c/d"):
        storage.put_if_absent(f"x/{name}", b"")
    storage.temp_for("x/e").write_bytes(b"half")
    storage.put_if_absent("y", b"")
    assert storage.list("x") == ["x/a", "x/b", "x/c"]
    assert storage.list("") == ["x", "y"]
    assert storage.temps("x") == ["x/.e.run-a-4.tmp"]


def test_remove_is_fine_with_what_is_absent(storage):
    storage.put_if_absent(NAME, b"one")
    storage.remove(NAME)
    storage.remove(NAME)
    assert storage.read(NAME) is None
    assert storage.put_if_absent(NAME, b"two") is True


def test_replace_overwrites_and_leaves_no_temp(storage):
    for content in (b"one", b"two"):
        storage.replace("live.json", content)
        assert storage.read("live.json") == content
    assert everything(storage) == ["live.json"]


def test_expose_makes_a_second_name_of_the_same_file(storage):
    storage.put_if_absent("snapshots/e1/part-0", b"one")
    storage.expose("snapshots/e1/part-0", "part-0")
    assert storage.read("part-0") == b"one"
    assert storage.path("part-0").samefile(storage.path("snapshots/e1/part-0"))


def test_expose_replaces_what_the_name_was_before(storage):
    for epoch, content in [(1, b"one"), (2, b"two")]:
        storage.put_if_absent(f"snapshots/e{epoch}/part-0", content)
        storage.expose(f"snapshots/e{epoch}/part-0", "part-0")
    assert storage.read("part-0") == b"two"
    assert storage.read("snapshots/e1/part-0") == b"one"


def test_expose_again_changes_nothing_and_leaves_no_temp(storage):
    storage.put_if_absent("a", b"one")
    for _ in range(3):
        storage.expose("a", "b")
    assert everything(storage) == ["a", "b"]


def test_expose_of_what_is_absent_leaves_the_alias_as_it_was(storage):
    storage.put_if_absent("part-0", b"old")
    with pytest.raises(StorageError, match="part-0: No such file or directory"):
        storage.expose("snapshots/e1/part-0", "part-0")
    assert everything(storage) == ["part-0"]
    assert storage.read("part-0") == b"old"


def test_a_reader_of_an_exposed_name_never_finds_it_gone(storage):
    for at in range(2):
        storage.put_if_absent(f"v{at}", b"%d" % at)
    storage.expose("v0", "alias")
    stop = threading.Event()
    seen = set()

    def read():
        while not stop.is_set():
            seen.add(storage.read("alias"))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(100):
        storage.expose(f"v{turn % 2}", "alias")
    stop.set()
    reader.join()
    assert seen <= {b"0", b"1"}


class FullDisk(Disk):
    """No file can be begun on it."""

    def create(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("verb", ["put_if_absent", "replace"])
def test_a_full_disk_says_so_and_makes_no_name(tmp_path, verb):
    storage = LocalStorage(tmp_path / "out", disk=FullDisk())
    with pytest.raises(StorageError, match="No space left on device; free space; what was") as it:
        getattr(storage, verb)(NAME, b"one")
    assert it.value.exit_code == 1
    assert LocalStorage(tmp_path / "out").read(NAME) is None


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot be created \(.*\); choose another output.path"):
        LocalStorage(tmp_path / "out").put_if_absent(NAME, b"one")


@pytest.mark.parametrize("verb", ["read", "list"])
def test_reading_what_is_not_the_kind_is_a_storage_error(storage, verb):
    storage.put_if_absent("folder/file", b"")
    name = {"read": "folder", "list": "folder/file"}[verb]
    with pytest.raises(StorageError, match=f"{name}: (Is a|Not a) directory; what was committed"):
        getattr(storage, verb)(name)


def test_removing_a_folder_is_a_storage_error(storage):
    storage.put_if_absent("folder/file", b"")
    with pytest.raises(StorageError, match="folder: "):
        storage.remove("folder")


def test_working_state_is_private_and_published_files_are_not(storage):
    storage.put_if_absent("_batchgen/plan/000001.json", b"{}")
    storage.expose("_batchgen/plan/000001.json", "part-00000.parquet")
    storage.put_if_absent("_batchgen/parts/e000001-w00-s000000.parquet", b"rows")
    assert (storage.root / "_batchgen/parts").stat().st_mode & 0o777 == 0o700
    assert storage.root.stat().st_mode & 0o007
    assert (storage.root / "part-00000.parquet").stat().st_mode & 0o004
