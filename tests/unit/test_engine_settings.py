"""What batchgen chooses for an engine: for much work, for little, and never against the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.core.errors import ConfigError, EngineError
from batchgen.core.records import EngineSpec, WorkLeft
from batchgen.engine.death import may_be_by_settings
from batchgen.engine.process import _exit_text
from batchgen.engine.supervised import SupervisedEngine
from batchgen.engine.vllm.settings import (
    CAPTURED,
    NO_GRAPHS,
    OWN_CHOICE,
    READ_BYTES,
    capture_sizes,
    choose_settings,
    known_keywords,
    pays_to_compile,
    read_ahead,
    refuse_sampling,
    settings_text,
)
from batchgen.job.recipe import SPEED_OPTIONS, diff, fingerprint, without_speed
from tests.fakes import FakeEngine, ask

ROOT = Path(__file__).parents[2]
LONG = WorkLeft(1_000_000, 1024)
SHORT_NIGHT = WorkLeft(7_000, 256)
LITTLE = WorkLeft(200, 64)


def spec_of(work=None, defaults="batchgen", **kwargs):
    return EngineSpec("vllm", "model", kwargs, {}, defaults=defaults, work=work)


@given(st.integers(1, 5000))
def test_graphs_reach_all_rows_that_run_at_once(seqs):
    sizes = capture_sizes(seqs)
    assert sizes[-1] == seqs
    assert sizes == sorted(set(sizes))
    # A step of any size finds a graph that is not much larger.
    for low, high in pairwise(sizes):
        assert high - low <= max(8, low / 2)
    assert len(sizes) <= 27 + max(0, seqs - 1024) / 128


@pytest.mark.parametrize("work", [None, LONG, WorkLeft(500_000, 8, 4000)])
def test_long_work_is_compiled_with_graphs_for_what_vllm_runs_at_once(work):
    chosen = choose_settings(spec_of(work), 1024)
    assert chosen == {"cudagraph_capture_sizes": capture_sizes(1024)}
    assert settings_text(chosen) == "CUDA graphs for up to 1,024 rows at once"
    assert choose_settings(spec_of(work, max_num_seqs=768), 1024) == {
        "cudagraph_capture_sizes": capture_sizes(768)
    }


@pytest.mark.parametrize("task", ["embed", "classify", "score"])
def test_a_model_that_pools_has_no_graphs_unless_it_pays_to_compile(task):
    settings = [choose_settings(replace(spec_of(work), task=task), 1024) for work in (LITTLE, LONG)]
    assert settings == [{"compilation_config": NO_GRAPHS}, {}]
    assert "not compiled" in settings_text(settings[0])
    assert choose_settings(replace(spec_of(LITTLE, "vllm"), task=task), 1024) == {}


@pytest.mark.parametrize("usual", [None, 64, 256, CAPTURED])
def test_vllms_own_settings_stay_where_they_reach_far_enough_or_nothing_is_known(usual):
    assert choose_settings(spec_of(LONG), usual) == {}
    assert choose_settings(spec_of(LITTLE), None) == {}
    assert settings_text({}) == ""


@pytest.mark.parametrize(
    ("work", "at_once"),
    [(SHORT_NIGHT, 1024), (LITTLE, 200), (WorkLeft(1, 5), 1), (WorkLeft(0, 5), 1)],
)
def test_a_short_night_is_not_compiled_for_and_has_graphs_for_its_rows(work, at_once):
    chosen = choose_settings(spec_of(work), 1024)
    config = chosen["compilation_config"]
    assert list(chosen) == ["compilation_config"]
    assert (config["mode"], config["cudagraph_mode"]) == (0, "FULL_DECODE_ONLY")
    assert config["cudagraph_capture_sizes"] == capture_sizes(at_once)
    assert f"{at_once:,} rows at once; not compiled" in settings_text(chosen)


def test_several_answers_a_row_run_at_once():
    spec = replace(spec_of(WorkLeft(100, 64)), sampling_params={"n": 4})
    sizes = choose_settings(spec, 1024)["compilation_config"]["cudagraph_capture_sizes"]
    assert sizes[-1] == 400


def test_models_that_gain_more_by_compiling_are_compiled_sooner(tmp_path):
    work = WorkLeft(20_000, 512, rows_per_s=25.0)
    quantized = json.dumps({"quantization_config": {"quant_method": "fp8"}})
    (tmp_path / "config.json").write_text(quantized)
    for spec, is_compiled in [
        (spec_of(work), False),
        (spec_of(work, quantization="fp8"), True),
        (spec_of(work, tensor_parallel_size=2), True),
        (replace(spec_of(work), model=str(tmp_path)), True),
    ]:
        assert ("cudagraph_capture_sizes" in choose_settings(spec, 1024)) is is_compiled
    assert "compilation_config" in choose_settings(spec_of(LITTLE, tensor_parallel_size=2), 1024)


@given(
    st.integers(1, 10**7),
    st.integers(1, 4096),
    st.one_of(st.none(), st.integers(1, 10**5)),
    st.one_of(st.none(), st.floats(0.01, 10_000)),
)
def test_more_work_never_makes_the_start_lighter(num_rows, output_tokens, prompt_tokens, speed):
    work = WorkLeft(num_rows, output_tokens, prompt_tokens, speed)
    if pays_to_compile(work, 1):
        assert pays_to_compile(work._replace(num_rows=2 * num_rows), 1)
        assert pays_to_compile(work._replace(is_compiled=True), 1)
        # By a measured speed the work is as long as it is, whatever the answers.
        assert speed is not None or pays_to_compile(work, 2)


@pytest.mark.parametrize(
    ("hours", "is_compiled", "pays"),
    [(0.1, False, False), (0.1, True, False), (0.2, True, True), (0.5, False, False),
     (0.7, False, True)],
)  # fmt: skip
def test_the_last_runs_speed_says_how_long_the_work_is(hours, is_compiled, pays):
    work = WorkLeft(int(3600 * hours * 50), 1000, 100, 50.0, is_compiled)
    assert pays_to_compile(work, 1) is pays


@pytest.mark.parametrize("name", sorted(OWN_CHOICE))
def test_a_job_that_says_something_itself_is_left_alone(name):
    for work in (LONG, LITTLE):
        assert choose_settings(spec_of(work, **{name: None}), 1024) == {}


@pytest.mark.parametrize("work", [None, LONG, LITTLE])
def test_one_option_leaves_all_to_vllm(work):
    assert choose_settings(spec_of(work, defaults="vllm"), 1024) == {}


def test_what_is_chosen_is_no_part_of_the_recipe_and_known_to_vllm():
    chosen = {
        *choose_settings(spec_of(LONG), 1024),
        *choose_settings(spec_of(LITTLE), 1024),
    }
    assert chosen <= SPEED_OPTIONS
    assert OWN_CHOICE - {"speculative_config", "runner"} <= SPEED_OPTIONS
    known = known_keywords()
    assert known is None or known >= chosen


def test_a_field_that_vllms_sampling_params_lack_is_refused_before_a_start():
    refuse_sampling(["logit_bias", "allowed_token_ids"])
    refuse_sampling([])
    if known_keywords() is not None:
        with pytest.raises(ConfigError, match=r"extra\.logit_bais: .* did you mean 'logit_bias'"):
            refuse_sampling(["logit_bais"])


def test_a_recipe_that_holds_what_is_now_known_as_speed_is_the_same():
    new = {"prompt": {}, "model": {"backend": "vllm", "files": {}}}
    old = {**new, "model": {**new["model"], "engine": {"max_cudagraph_capture_size": 1024}}}
    both = {**new, "model": {**new["model"], "engine": {"seed": 1, "cudagraph_capture_sizes": [1]}}}
    assert without_speed(old) == without_speed(new) == new
    assert without_speed(both)["model"]["engine"] == {"seed": 1}
    assert diff(without_speed(old), new) == []
    assert fingerprint(old) != fingerprint(new)  # Which is why a plan keeps its own.


class Starting(FakeEngine):
    """Fails to start, as `EngineProcess` tells it."""

    def __init__(self, reason):
        super().__init__(facts=None)
        self.then(EngineError(reason))


SHORT = "the engine did not start: its log says: torch.OutOfMemoryError: CUDA out of memory."


def run_all(engine, num):
    engine.add([ask(number) for number in range(num)])
    done = []
    while engine.num_in_flight:
        done += [request.request_id for request, _ in engine.step(0.1)]
    return sorted(done)


def test_a_start_without_memory_is_tried_again_by_vllms_own_settings():
    built = []

    def build(spec):
        built.append(spec)
        return Starting(SHORT) if spec.defaults == "batchgen" else FakeEngine(capacity=8)

    engine = SupervisedEngine(build, spec_of)
    engine.expect(LITTLE)
    assert run_all(engine, 5) == [0, 1, 2, 3, 4]
    assert [spec.defaults for spec in built] == ["batchgen", "vllm"]
    assert built[0].work == LITTLE
    assert engine.num_deaths == 0
    assert "vLLM's own settings" in engine.warnings[0]
    assert "out of memory" in engine.warnings[0]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of(defaults="vllm"), SHORT),
        (spec_of(), "the engine did not start: no such model"),
        (spec_of(), f"the engine did not start: {_exit_text(-signal.SIGKILL)}"),
    ],
)
def test_any_other_failed_start_ends_the_run(spec, reason):
    engine = SupervisedEngine(lambda _: Starting(reason), lambda: spec)
    engine.add([ask(0)])
    with pytest.raises(EngineError, match=reason[:40]):
        engine.step(0.1)


def test_two_starts_without_memory_end_the_run():
    engine = SupervisedEngine(lambda _: Starting(SHORT), spec_of)
    engine.add([ask(0)])
    engine.step(0.1)
    with pytest.raises(EngineError, match="out of memory"):
        engine.step(0.1)


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: CUDA error: out of memory",
        "ValueError: CUDAGraphMode.FULL_DECODE_ONLY is not supported with some backend",
        "RuntimeError: CUDA error: operation failed due to a previous error during capture",
        "vLLM refuses compilation_config = {'mode': 0}: Input should be",
        "ValueError: No available memory for the cache blocks. Try increasing ...",
        "ValueError: To serve at least one request with the models's max seq len (40960), (5.62 "
        "GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB).",
    ],
)
def test_words_for_what_chosen_settings_may_have_done(line):
    assert may_be_by_settings(line)


def test_an_engine_that_is_up_or_does_not_care_is_told_too():
    class Hearing(FakeEngine):
        heard = None

        def expect(self, work):
            self.heard = work

    for made in (Hearing(), FakeEngine()):
        engine = SupervisedEngine(lambda _, made=made: made, lambda: replace(spec_of(), work=None))
        engine.start()
        engine.expect(LONG)
        assert getattr(made, "heard", LONG) == LONG


IMPORTS = """
import sys
from batchgen.engine.vllm.settings import keep_bytecode
keep_bytecode()
import vllm.module
print(vllm.module.__cached__)
"""


@pytest.mark.parametrize(
    ("environment", "has_some", "is_kept"),
    [
        ({"PYTHONDONTWRITEBYTECODE": "1"}, False, True),
        ({"PYTHONDONTWRITEBYTECODE": "1"}, True, False),
        ({"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "/nowhere"}, False, False),
        ({}, False, False),  # Python keeps it where it always does.
    ],
)
def test_bytecode_of_vllm_is_kept_where_nobody_else_does(tmp_path, environment, has_some, is_kept):
    package, cache = tmp_path / "site" / "vllm", tmp_path / "cache"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "module.py").touch()
    if has_some:
        (package / "__pycache__").mkdir()
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    inherited = {name: value for name, value in os.environ.items() if "BYTECODE" not in name}
    inherited.pop("PYTHONPYCACHEPREFIX", None)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env={**inherited, **environment, "PYTHONPATH": path, "VLLM_CACHE_ROOT": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (cache in Path(done.stdout.strip()).parents) is is_kept
    assert any(cache.rglob("module*.pyc")) is is_kept


def is_cached(path):
    """Whether a file's last page can be had without the disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size - 1, os.RWF_NOWAIT)
        except BlockingIOError:
            return False


def test_weights_are_read_into_the_page_cache(tmp_path):
    paths = [tmp_path / name for name in ("model-1.safetensors", "model-2.safetensors", "x.bin")]
    for path in paths:
        with path.open("wb") as file:
            file.write(bytes(READ_BYTES + 5))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(paths[0]):
        pytest.skip("this file system forgets nothing")
    read_ahead(tmp_path)
    assert [bool(is_cached(path)) for path in paths] == [True, True, False]
    read_ahead(tmp_path / "missing")


@pytest.mark.parametrize(("given", "found"), [(None, "0"), ("1", "1")])
def test_an_allowed_host_sends_to_no_other_unless_the_user_says_so(given, found):
    name = "VLLM_MEDIA_URL_ALLOW_REDIRECTS"
    code = f"""
import os
from batchgen.engine.vllm.settings import prepare_environment
prepare_environment(is_cpu=True)
print(os.environ[{name!r}])
"""
    env = {key: value for key, value in os.environ.items() if key != name}
    env |= {"PYTHONPATH": str(ROOT)} | ({} if given is None else {name: given})
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == found


FORKS = """
import os, sys, threading
from batchgen.engine.vllm.settings import forks_core, prepare_environment, set_when_forked
prepare_environment(is_cpu=sys.argv[1] == "cpu")
may_encode = threading.Event()
set_when_forked(may_encode)
before = may_encode.is_set()
core = os.fork()
if not core:
    os._exit(may_encode.is_set() and forks_core())
assert os.waitpid(core, 0)[1] == 0
print(forks_core(), before, may_encode.is_set())
"""


@pytest.mark.parametrize(
    ("device", "environment", "forks"),
    [
        ("gpu", {}, True),
        ("gpu", {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}, False),
        ("gpu", {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, False),
        ("cpu", {}, False),
        ("cpu", {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, False),
        (
            "cpu",
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"},
            True,
        ),
    ],
)
def test_vllm_forks_its_core_on_a_gpu_unless_the_user_says_otherwise(device, environment, forks):
    inherited = {name: value for name, value in os.environ.items() if "VLLM" not in name}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, device],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    # What tokenizes waits for the fork, and only where there is one.
    assert done.stdout == f"{forks} {not forks} True\n"
