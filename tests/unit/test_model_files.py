"""Where a model is and what tells it from another, on small real folders."""

from __future__ import annotations

import hashlib

import pytest

from batchgen.core.errors import ConfigError
from batchgen.pipeline.model_files import resolve_model

MIB = 2**20


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(3 * MIB))
    (folder / "README.md").write_text("read me", encoding="utf-8")
    return folder


def identity(folder):
    return resolve_model(str(folder), None).identity


def poke(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_folder_is_its_own_path_and_the_hashes_of_what_the_engine_reads(model):
    found = resolve_model(str(model), None)
    assert found.path == str(model)
    assert list(found.identity) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    wanted = hashlib.blake2b(b'8{"a": 1}', digest_size=16).hexdigest()
    assert found.identity["config.json"] == wanted


def test_a_copy_elsewhere_is_the_same_model(model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert identity(copy) == identity(model)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("config.json", 2),
        ("tokenizer.json", 0),
        ("chat_template.jinja", 5),
        ("model.safetensors", 0),
        ("model.safetensors", MIB - 1),
        ("model.safetensors", -1),
        ("model.safetensors", -MIB),
    ],
)
def test_a_changed_byte_that_is_looked_at_is_another_model(model, name, at):
    before = identity(model)
    poke(model / name, at)
    after = identity(model)
    assert {file for file in before if before[file] != after[file]} == {name}


def test_a_size_alone_is_another_model(model):
    before = identity(model)
    (model / "model.safetensors").write_bytes(bytes(3 * MIB + 1))
    assert identity(model) != before


def test_what_the_engine_does_not_read_is_no_other_model(model):
    before = identity(model)
    (model / "README.md").write_text("other", encoding="utf-8")
    (model / "sub.json").mkdir()
    assert identity(model) == before


def test_a_file_more_is_another_model(model):
    before = identity(model)
    (model / "generation_config.json").write_text("{}", encoding="utf-8")
    assert set(identity(model)) - set(before) == {"generation_config.json"}


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.name: '.*' has no config.json, expected a model"):
        resolve_model(str(tmp_path), None)


@pytest.mark.parametrize("name", ["/no/such/model", "no/such/model"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(name):
    with pytest.raises(ConfigError) as caught:
        resolve_model(name, None)
    assert caught.value.problems == (
        f"{name!r} does not exist, expected a model's folder or hub id",
    )


PICKLES = ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"]


@pytest.mark.parametrize("name", PICKLES)
def test_a_folder_of_pickles_alone_is_refused_unless_asked_for(model, name):
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(ConfigError, match=f"only {name}; pickled weights can run any code"):
        resolve_model(str(model), None)
    assert name in resolve_model(str(model), None, allow_pickle=True).identity


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_beside_safetensors_is_not_what_the_engine_loads(model, name):
    (model / name).write_bytes(b"x")
    assert name in identity(model)


def test_a_folder_without_any_weights_is_for_dummy_ones(model):
    (model / "model.safetensors").unlink()
    assert resolve_model(str(model), None).path == str(model)
