"""The tuned file: what it adds to a job, and when it does not."""

from __future__ import annotations

import math
import tomllib
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen import api
from batchgen.core.errors import ConfigError, EngineError, OutputError
from batchgen.engine.process import build_engine
from batchgen.job.load import load_job
from batchgen.job.model import Tuned
from batchgen.job.recipe import fingerprint, make_recipe
from batchgen.job.tuned import PLACES, key_of, tuned_path, use_tuned, value_of, with_settings
from batchgen.pipeline.compute import OneEngine
from batchgen.pipeline.context import RunOptions, StopSwitch
from batchgen.pipeline.job_run import JobRun
from batchgen.preview.plan import PlanOptions, foresee
from batchgen.tuning.tune import check_writable, tuned_text
from tests.faulty import BACKEND

JOB = """
[input]
path = "rows.jsonl"
[prompt]
user = "{{ text }}"
[model]
name = "Qwen/Qwen3-8B"
revision = "main"
{model}
[model.engine]
enforce_eager = true
{engine}
[sampling]
max_tokens = 4
[output]
path = "out"
[run]
flush_s = 10
{run}
"""
ALL = {
    "max_num_seqs": 512,
    "gpu_memory_utilization": 0.95,
    "max_num_batched_tokens": 16384,
    "enable_prefix_caching": False,
    "async_scheduling": True,
    "max_in_flight": 2048,
}


@pytest.fixture
def job_file(tmp_path):
    """Writes a job file and its tuned file, made on an H100."""

    def write(settings=ALL, *, text=None, device="H100", model="", engine="", run=""):
        path = tmp_path / "label.toml"
        path.write_text(JOB.format(model=model, engine=engine, run=run))
        key = key_of(load_job(path), tmp_path, device) | {"vllm": "0.26.0"}
        text = tuned_text(["made by a test"], key, settings, []) if text is None else text
        (tmp_path / "label.tuned.toml").write_text(text)
        return path

    return write


def used(path, device="H100", overrides=()):
    return use_tuned(load_job(path, overrides), path, lambda: device)


def test_every_setting_reaches_its_place(job_file):
    job = used(job_file())
    assert {name: value_of(job, name) for name in PLACES} == ALL
    assert job.model.max_num_seqs == 512
    assert job.model.engine == {
        "enforce_eager": True,
        "max_num_batched_tokens": 16384,
        "enable_prefix_caching": False,
        "async_scheduling": True,
    }
    assert job.run.max_in_flight == 2048
    assert (job.tuned.settings, job.tuned.note) == (ALL, None)


def test_what_is_tuned_is_never_part_of_the_recipe(job_file):
    path = job_file()
    before, after = load_job(path), used(path)
    assert set(ALL) == set(PLACES)
    assert fingerprint(make_recipe(before, {})) == fingerprint(make_recipe(after, {}))
    changed = with_settings(before, {"kv_cache_dtype": "fp8"})
    assert fingerprint(make_recipe(before, {})) != fingerprint(make_recipe(changed, {}))


def test_the_job_file_and_set_win(job_file):
    path = job_file(
        model="max_num_seqs = 64", engine="max_num_batched_tokens = 4096", run="max_in_flight = 9"
    )
    job = used(path, overrides=["model.gpu_memory_utilization=0.5"])
    assert (job.model.max_num_seqs, job.run.max_in_flight) == (64, 9)
    assert job.model.engine["max_num_batched_tokens"] == 4096
    assert job.model.gpu_memory_utilization == 0.5
    assert set(job.tuned.settings) == {"enable_prefix_caching", "async_scheduling"}


def test_a_setting_given_among_the_engines_own_wins_too(job_file, tmp_path):
    path = job_file({"max_num_seqs": 512})
    echo = path.read_text().replace("[model]", '[model]\nbackend = "echo"')
    path.write_text(echo.replace("enforce_eager = true", "max_num_seqs = 3"))
    key = key_of(load_job(path), tmp_path, "H100")
    tuned_path(path).write_text(tuned_text([], key, {"max_num_seqs": 512}, []))
    job = used(path)
    assert (job.model.max_num_seqs, job.model.engine["max_num_seqs"]) == (None, 3)
    assert job.tuned.settings == {}
    assert with_settings(job, {"max_num_seqs": 7}).model.engine["max_num_seqs"] == 7


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"device": "A100"}, "device 'H100', here 'A100'"),
        ({"overrides": ["model.revision=v2"]}, "revision 'main', here 'v2'"),
        (
            {"overrides": ["model.name=Qwen/Qwen3-4B"]},
            "model 'Qwen/Qwen3-8B', here 'Qwen/Qwen3-4B'",
        ),
        ({"overrides": ["model.tensor_parallel_size=2"]}, "tensor_parallel_size 1, here 2"),
        ({"overrides": ["model.max_model_len=512"]}, "max_model_len by default, here 512"),
        ({"overrides": ["model.dtype=float16"]}, "dtype by default, here 'float16'"),
        ({"overrides": ["model.quantization=fp8"]}, "quantization by default, here 'fp8'"),
        ({"overrides": ["model.engine.kv_cache_dtype=fp8"]}, "kv_cache_dtype by default, here"),
        ({"overrides": ["model.engine.pipeline_parallel_size=2"]}, "pipeline_parallel_size by"),
        ({"overrides": ["model.engine.enable_lora=true"]}, "enable_lora by default, here True"),
        ({"overrides": ["model.lora.law=adapters/law"]}, "num_loras by default, here 1"),
    ],
)
def test_made_for_something_else_it_is_not_used(job_file, change, told):
    job = used(job_file(), **change)
    assert job.model.max_num_seqs is None
    assert job.tuned.settings == {}
    assert f"not used, it was made for {told}" in job.tuned.note
    assert job.tuned.note.endswith("; run `batchgen tune JOB` again")


def test_a_default_is_the_same_told_or_not(job_file):
    job = used(
        job_file(model='dtype = "auto"'), overrides=["model.engine.pipeline_parallel_size=1"]
    )
    assert job.tuned.settings == ALL


@pytest.mark.parametrize(
    ("settings", "own", "device", "told"),
    [
        (
            {"max_num_batched_tokens": 256},
            {"model": "max_model_len = 512"},
            "cpu",
            "max_num_batched_tokens = 256 is left out, it is below max_model_len = 512",
        ),
        ({"max_num_batched_tokens": 512}, {"model": "max_model_len = 512"}, "cpu", None),
        ({"max_num_batched_tokens": 256}, {"model": "max_model_len = 512"}, "H100", None),
        (
            {"max_num_batched_tokens": 256},
            {"model": "max_model_len = 512", "engine": "enable_chunked_prefill = false"},
            "H100",
            "max_num_batched_tokens = 256 is left out, it is below max_model_len = 512",
        ),
        (
            {"max_num_seqs": 512},
            {"engine": "max_num_batched_tokens = 256"},
            "H100",
            "max_num_seqs = 512 is left out, it is above max_num_batched_tokens = 256",
        ),
        (
            {"max_num_batched_tokens": 256},
            {"model": "max_num_seqs = 512"},
            "H100",
            "max_num_batched_tokens = 256 is left out, it is below max_num_seqs = 512",
        ),
        (
            {"max_num_batched_tokens": 256, "max_num_seqs": 512},
            {},
            "H100",
            "max_num_batched_tokens = 256 is left out, it is below max_num_seqs = 512",
        ),
    ],
)
def test_what_vllm_would_refuse_is_left_out_and_the_rest_used(
    job_file, settings, own, device, told
):
    given = {"async_scheduling": True, **settings}
    job = used(job_file(given, device=device, **own), device)
    left_out = told.partition(" ")[0] if told else None
    assert job.tuned.settings == {n: value for n, value in given.items() if n != left_out}
    if told is None:
        assert job.tuned.note is None
    else:
        assert f"{job.tuned.path}: {told}" in job.tuned.note


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[key", "cannot be read"),
        ("x = 1", "it has no [key]"),
        ("model = 1", "cannot be read"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_damaged_file_is_no_reason_not_to_run(job_file, text, told):
    path = job_file(text="")
    tuned_path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    job = used(path)
    assert told in job.tuned.note
    assert job.model.max_num_seqs is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": 1.5},
        {"max_num_seqs": True},
        {"gpu_memory_utilization": 1.2},
        {"enable_prefix_caching": 1},
        {"max_in_flight": "many"},
        {"max_in_flight": 1_000_001},
        {"max_num_seqs": 10**40},
    ],
)
def test_a_value_that_cannot_be_is_told(job_file, wrong):
    job = used(job_file({"async_scheduling": True, **wrong}))
    (name, value), = wrong.items()  # fmt: skip
    assert f"{name} = {value!r} cannot be" in job.tuned.note
    assert job.tuned.settings == {}


def test_only_speed_can_be_tuned(job_file):
    path = job_file({"max_num_seqs": 8})
    text = tuned_path(path).read_text()
    tuned_path(path).write_text(text + '\n[model.engine]\nkv_cache_dtype = "fp8"\nseed = 3\n')
    assert used(path).tuned.settings == {"max_num_seqs": 8}
    assert "kv_cache_dtype" not in used(path).model.engine


def test_a_job_loads_with_its_tuned_file_unless_told_not_to(job_file):
    path = job_file({"max_num_seqs": 8}, device="cpu")
    assert api.load(path, tuned=False).tuned is None
    assert api.load(path).tuned is not None


def test_a_run_says_what_it_used_and_why_it_did_not(make_job):
    note = "x.tuned.toml: not used, it has no [key]"
    for tuned, told in (
        (Tuned("x.tuned.toml", note=note), ({}, [note])),
        (
            Tuned("x.tuned.toml", {"max_num_seqs": 2}),
            ({"path": "x.tuned.toml", "settings": {"max_num_seqs": 2}}, []),
        ),
        (
            Tuned("x.tuned.toml", {"max_num_seqs": 2}, note="x is left out"),
            ({"path": "x.tuned.toml", "settings": {"max_num_seqs": 2}}, ["x is left out"]),
        ),
        (None, ({}, [])),
    ):
        job = make_job()
        job = job if tuned is None else job.tuned_by(tuned)
        summary = JobRun(job, stop=StopSwitch(), options=RunOptions(fresh=True)).run()
        assert (summary.tuned, summary.warnings) == told


def test_a_plan_says_why_a_tuned_file_is_not_used(make_job):
    job = make_job().tuned_by(Tuned("x.tuned.toml", note="x.tuned.toml: not used"))
    assert "x.tuned.toml: not used" in foresee(lambda: job, PlanOptions()).warnings


@pytest.mark.parametrize(
    ("settings", "fault", "told"),
    [
        ({"max_num_seqs": 2}, None, True),
        ({}, None, False),
        ({"max_num_seqs": 2}, "out_of_memory", True),
        ({"max_num_seqs": 2}, "die", False),
    ],
)
def test_an_engine_that_does_not_start_or_runs_out_of_memory_names_what_was_tuned(
    make_job, settings, fault, told
):
    faults = [{"kind": fault, "text": "say"}] if fault else []
    model = {"backend": BACKEND, "engine": {"faults": faults, "in_process": True}}
    job = make_job(model=model).tuned_by(Tuned("x.tuned.toml", settings))
    run = JobRun(
        job,
        stop=StopSwitch(),
        compute=partial(OneEngine, build=build_engine if fault else refuse_to_start),
    )
    with pytest.raises(EngineError) as caught:
        run.run()
    text = "; it had max_num_seqs = 2 from x.tuned.toml: --no-tuned runs without"
    assert (text in str(caught.value), text in run.summary.reason) == (told, told)


def refuse_to_start(spec):
    msg = "the engine did not start: max_num_batched_tokens (256) is smaller"
    raise EngineError(msg)


def test_model_folders_are_named_from_the_job_files_place(tmp_path):
    (tmp_path / "a" / "model").mkdir(parents=True)
    path = tmp_path / "a" / "job.toml"
    path.write_text(JOB.format(model="", engine="", run="").replace("Qwen/Qwen3-8B", "./model"))
    assert key_of(load_job(path), path.parent, "cpu")["model"] == "model"


def test_the_file_is_toml_for_people(tmp_path):
    path = tmp_path / "label.tuned.toml"
    trials = [{"settings": 'a "b"', "speed": 1.23456789, "failure": None}]
    path.write_text(tuned_text(["one", "two"], {"device": "H100"}, ALL, trials))
    tables = tomllib.loads(path.read_text())
    assert path.read_text().startswith("# one\n# two\n\n[key]\n")
    assert tables["trials"] == [{"settings": 'a "b"', "speed": 1.2346}]
    assert tables["model"]["engine"]["enable_prefix_caching"] is False


def test_where_it_cannot_be_written_is_told_before_any_trial(tmp_path):
    (tmp_path / "x.tuned.toml").mkdir()
    with pytest.raises(OutputError, match=r"x\.tuned\.toml: cannot be written"):
        check_writable(tmp_path / "x.tuned.toml")
    check_writable(tmp_path / "y.tuned.toml")


@given(
    head=st.lists(st.text(), max_size=3),
    values=st.lists(st.text(st.characters()) | st.floats() | st.booleans() | st.integers(0, 9)),
)
@example(head=["a\nmax_num_seqs = 1"], values=["./m\U0001f600", "\x7f", "\ud800", math.inf])
def test_whatever_is_told_the_file_can_be_read(head, values):
    trials = [{f"k{at}": value for at, value in enumerate(values)}]
    tables = tomllib.loads(tuned_text(head, {"model": "m"}, {}, trials))
    read = tables["trials"][0]
    for at, value in enumerate(values):
        if isinstance(value, str):
            assert read[f"k{at}"] == value.encode("utf-8", "replace").decode()
        elif not isinstance(value, float):
            assert read[f"k{at}"] == value
    assert set(tables) == {"key", "trials"}


def test_chunked_prefill_decides_which_settings_are_possible(job_file):
    path = job_file({"max_num_batched_tokens": 64})
    assert used(path).tuned.settings == {"max_num_batched_tokens": 64}
    job = used(path, overrides=["model.engine.enable_chunked_prefill=false"])
    assert "enable_chunked_prefill by default, here" in job.tuned.note


def test_the_echo_engine_gets_only_what_it_has(make_job, tmp_path):
    job = make_job(model={"max_num_seqs": None})
    settings = ALL | {"max_num_seqs": 7, "max_in_flight": 9}
    key = key_of(job, tmp_path, "cpu")
    tuned_path(tmp_path / "job.toml").write_text(tuned_text([], key, settings, []))
    tuned = use_tuned(job, tmp_path / "job.toml", lambda: "cpu").tuned
    assert tuned.settings == {"max_num_seqs": 7, "max_in_flight": 9}


def test_a_name_too_long_for_a_tuned_file_is_no_trouble_but_for_tuning(tmp_path, job_file):
    long = tmp_path / f"{'x' * 246}.toml"
    long.write_text(job_file().read_text())
    assert used(long).tuned is None
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(tuned_path(long))


@pytest.mark.parametrize(("where", "is_told"), [("[model]", True), ("output", False)])
def test_settings_that_the_engine_refuses_name_what_was_tuned(make_job, where, is_told):
    def refuse(spec):
        raise ConfigError(where, ["dtype is wrong", "max_num_seqs is wrong"])

    job = make_job().tuned_by(Tuned("x.tuned.toml", {"max_num_seqs": 2}))
    run = JobRun(job, stop=StopSwitch(), compute=partial(OneEngine, build=refuse))
    with pytest.raises(ConfigError) as caught:
        run.run()
    text = "max_num_seqs is wrong; it had max_num_seqs = 2 from x.tuned.toml: --no-tuned runs"
    assert (text in str(caught.value), text in run.summary.reason) == (is_told, is_told)
    assert run.summary.exit_code == 2
