"""What every engine owes its caller; run on the echo engine, on a hosted one, and on real vLLM."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from batchgen.core.errors import ConfigError, EngineDeadError, EngineError
from batchgen.core.records import Completion, EngineSpec, EngineStats, WorkLeft
from batchgen.engine.base import HostedRequest
from batchgen.engine.echo import EchoEngine
from batchgen.engine.group import supervise
from batchgen.engine.process import EngineProcess, build_engine
from batchgen.engine.supervised import SupervisedEngine
from tests import fakes
from tests.fakes import AsEngine

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "sample_data" / "model"
MAX_TOKENS = 12
MAX_MODEL_LEN = 128
WAIT_S = 120.0

ids = itertools.count()


def make_spec(kind, log_path, **sampling_params):
    options = {"max_num_seqs": 16, "max_model_len": MAX_MODEL_LEN}
    if kind == "vllm":
        options |= {"kv_cache_memory_bytes": 32 << 20}
    else:
        options |= {"max_steps": 7, "step_s": 0.001}
    return EngineSpec(
        backend="vllm" if kind == "vllm" else "echo",
        model=str(MODEL),
        model_kwargs=options,
        sampling_params={"max_tokens": MAX_TOKENS, "temperature": 1.0, **sampling_params},
        log_path=str(log_path),
        # A quick start for little work, as a run gives it to vLLM on a GPU.
        defaults="batchgen",
        work=WorkLeft(num_rows=1, output_tokens=MAX_TOKENS),
    )


def start(kind, log_path, **sampling_params):
    spec = make_spec(kind, log_path, **sampling_params)
    if kind.startswith("supervised"):
        if kind == "supervised-process":
            spec = replace(spec, model_kwargs={**spec.model_kwargs, "in_process": False})
        engine = AsEngine(SupervisedEngine(build_engine, lambda: spec))
        engine.start()
        return engine
    if kind.startswith("two"):
        engine = AsEngine(two_engines(make_spec(kind.removeprefix("two-"), log_path)))
        engine.start()
        return engine
    return EchoEngine(spec) if kind == "echo" else EngineProcess(spec)


def two_engines(spec, on_death=lambda death, whose: None, **options):
    """A group of two, each in processes of its own."""
    specs = [lambda: spec, lambda: replace(spec, log_path=f"{spec.log_path}-2")]
    options = {"stall_s": WAIT_S, **options}
    return supervise(options.pop("build", build_engine), specs, on_death=on_death, **options)


KINDS = ["two-echo", "echo", "echo-process", "supervised", "supervised-process"]
KINDS += [pytest.param(kind, marks=pytest.mark.vllm) for kind in ("vllm", "two-vllm")]


@pytest.fixture(scope="module", params=KINDS)
def engine(request, tmp_path_factory):
    with closing(start(request.param, tmp_path_factory.mktemp("engine") / "engine.log")) as engine:
        wait_until_up(engine)
        yield engine


def wait_until_up(engine):
    deadline = time.monotonic() + WAIT_S
    while engine.facts is None and time.monotonic() < deadline:
        assert engine.step(0.5) == []
    assert engine.facts is not None


def ask(prompt, seed=7):
    return HostedRequest(next(ids), prompt, seed)


def chat(text):
    return [{"role": "user", "content": text}]


def collect(engine, requests):
    """Step until every request is back; fail on one too many, twice, unknown or too late."""
    expected = {request.request_id for request in requests}
    completions = {}
    deadline = time.monotonic() + WAIT_S
    while engine.num_in_flight and time.monotonic() < deadline:
        for completion in engine.step(0.5):
            assert completion.request_id in expected
            assert completion.request_id not in completions
            completions[completion.request_id] = completion
    assert completions.keys() == expected
    return [completions[request.request_id] for request in requests]


def run(engine, requests):
    engine.add(requests)
    return collect(engine, requests)


def step_until_dead(engine, completions, step_s=5.0):
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        completions += engine.step(step_s)


def group_members(pgid):
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == pgid and process.info["status"] != "zombie":
                members.append(process)
        except ProcessLookupError:
            continue
    return members


def assert_group_ends(pgid, within_s):
    deadline = time.monotonic() + within_s
    while group_members(pgid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert group_members(pgid) == []


def test_every_request_comes_back_exactly_once_with_an_answer(engine):
    requests = [ask(f"row {number}") for number in range(50)]
    for completion in run(engine, requests):
        assert completion.error is None
        assert completion.text
        assert completion.finish_reason in ("stop", "length")
        assert 1 <= completion.num_output_tokens <= MAX_TOKENS
        assert completion.num_prompt_tokens >= 1
        assert 0 < completion.latency_s < WAIT_S
    assert engine.step(0) == []


def test_requests_are_topped_up_while_others_run(engine):
    requests = [ask(f"row {number} " + "x" * (number % 13)) for number in range(400)]
    finished, added = [], 0
    while len(finished) < len(requests):
        chunk = requests[added : added + 37]
        if chunk and engine.num_in_flight < 60:
            engine.add(chunk)
            added += len(chunk)
        finished += engine.step(5.0)
        assert engine.num_in_flight == added - len(finished)
    assert sorted(c.request_id for c in finished) == [r.request_id for r in requests]


def test_more_requests_than_its_capacity_are_taken_all_the_same(engine):
    requests = [ask(f"{number}") for number in range(engine.capacity + 10)]
    assert all(completion.error is None for completion in run(engine, requests))


def test_request_ids_need_not_ascend(engine):
    requests = [ask(f"row {number}") for number in range(20)][::-1]
    assert [c.request_id for c in run(engine, requests)] == [r.request_id for r in requests]


def test_chats_and_raw_texts_mix(engine):
    raw, rendered = run(engine, [ask("hello there"), ask(chat("hello there"))])
    assert raw.error is None
    assert rendered.error is None


def test_text_parts_reach_the_model_like_a_plain_text(engine):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}]
    plain, in_parts = run(engine, [ask(chat("hello there")), ask(parts)])
    assert in_parts.error is None
    assert (in_parts.text, in_parts.num_prompt_tokens) == (plain.text, plain.num_prompt_tokens)


@pytest.mark.parametrize(
    ("prompt", "error_type", "text"),
    [
        ("long " * 400, "prompt_too_long", f"fewer than {MAX_MODEL_LEN}"),
        ("", "empty_prompt", "no tokens"),
        ([{"role": "user"}], "chat_template_error", "content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "chat_template_error", "image"),
        ("lone \ud800 surrogate", "tokenizer_error", ""),
    ],
    ids=["too long", "empty", "no content", "image", "bad unicode"],
)
def test_a_bad_request_is_its_own_error_and_no_one_elses(engine, prompt, error_type, text):
    before, bad, after = run(engine, [ask("before"), ask(prompt), ask("after")])
    assert bad.error.error_type == error_type
    assert text in bad.error.error
    assert "\n" not in bad.error.error
    assert bad.text is None
    assert before.error is None
    assert after.error is None


def test_too_long_names_both_numbers(engine):
    (bad,) = run(engine, [ask("x y " * 300)])
    number = int(bad.error.error.split()[3])
    assert number >= 300
    assert str(MAX_MODEL_LEN) in bad.error.error


def test_equal_prompts_with_equal_seeds_get_equal_answers(engine):
    texts = {c.text for c in run(engine, [ask("tell me", seed=1234) for _ in range(8)])}
    assert len(texts) == 1


def test_a_request_may_have_its_own_max_tokens(engine):
    alone = HostedRequest(next(ids), "row " * 20, 7, {"max_tokens": 3})
    before, short, after = run(engine, [ask("row " * 20), alone, ask("row " * 20)])
    assert short.num_output_tokens <= 3
    assert len(short.text) < len(before.text)
    assert before.text == after.text


def test_a_request_may_have_several_answers(engine):
    several = HostedRequest(next(ids), "tell me", 7, {"n": 3})
    (completion,) = run(engine, [several])
    assert len(completion.samples) == 3
    assert completion.text == completion.samples[0].text
    assert completion.num_output_tokens >= 3


@pytest.mark.parametrize("params", [{"max_tokens": -1}, {"n": "many"}], ids=str)
def test_a_bad_parameter_is_that_rows_error(engine, params):
    bad = HostedRequest(next(ids), "row", 7, params)
    refused, answered = run(engine, [bad, ask("row")])
    assert refused.error.error_type == "bad_request"
    assert "\n" not in refused.error.error
    assert answered.error is None


def test_an_adapter_that_the_job_lacks_is_that_rows_error(engine):
    refused, answered = run(engine, [HostedRequest(next(ids), "row", 7, None, "x"), ask("row")])
    assert refused.error.error_type == "unknown_adapter"
    assert "'x'" in refused.error.error
    assert answered.error is None


def test_facts_say_what_the_engine_is(engine):
    facts = engine.facts
    assert facts.max_model_len == MAX_MODEL_LEN
    assert facts.max_num_seqs == 16
    assert facts.name
    assert facts.version
    assert facts.device
    assert 0 <= facts.startup_s < WAIT_S
    assert engine.capacity >= 2 * facts.max_num_seqs
    if facts.name == "vllm":
        assert facts.settings["compilation_config"]["mode"] == 0
    else:
        assert facts.settings.keys() <= {"engines_per_gpu"}


def test_stats_show_running_requests_and_then_none(engine):
    # Long enough for a hosted engine to report twice.
    num_requests = 500 if engine.facts.name == "vllm" else 3000
    engine.add([ask(f"row {number}") for number in range(num_requests)])
    seen, completions = [], []
    while engine.num_in_flight:
        completions += engine.step(0.5)
        seen.append(engine.stats)
    assert len(completions) == num_requests
    assert max(stats.num_running or 0 for stats in seen) > 0
    deadline = time.monotonic() + WAIT_S
    while engine.stats.num_running and time.monotonic() < deadline:
        engine.step(0.1)
    assert (engine.stats.num_running, engine.stats.num_waiting) == (0, 0)


def test_tokens_are_counted_as_they_are_worked_off(engine):
    def counted():
        stats = engine.stats
        return stats.num_prompt_tokens or 0, stats.num_generated_tokens or 0

    before = counted()
    answers = run(engine, [ask(f"count these tokens {number}") for number in range(5)])
    prompt = before[0] + sum(answer.num_prompt_tokens for answer in answers)
    generated = before[1] + sum(answer.num_output_tokens for answer in answers)
    deadline = time.monotonic() + WAIT_S
    while counted() != (prompt, generated) and time.monotonic() < deadline:
        engine.step(0.1)
    assert counted() == (prompt, generated)


@pytest.mark.parametrize("kind", ["echo", "echo-process"])
def test_the_answer_is_the_beginning_of_the_prompt(kind, tmp_path):
    with closing(start(kind, tmp_path / "log")) as engine:
        short, long, cut = run(engine, [ask("short"), ask("a" * 50), ask("a" * 11 + "éé")])
    assert (short.text, short.finish_reason, short.num_output_tokens) == ("short", "stop", 5)
    assert (long.text, long.finish_reason, long.num_output_tokens) == ("a" * 12, "length", 12)
    assert (cut.text, cut.finish_reason, cut.num_output_tokens) == ("a" * 11, "length", 11)


@pytest.mark.parametrize("kind", ["echo", "echo-process"])
def test_requests_finish_out_of_order(kind, tmp_path):
    with closing(start(kind, tmp_path / "log")) as engine:
        requests = [ask(f"row {number}") for number in range(100)]
        engine.add(requests)
        order = []
        while engine.num_in_flight:
            order += [completion.request_id for completion in engine.step(1.0)]
    assert sorted(order) == [request.request_id for request in requests]
    assert order != sorted(order)


def test_echo_is_built__right_here_and_vllm_in_a_process_of_its_own(tmp_path):
    assert isinstance(build_engine(make_spec("echo", tmp_path / "log")), EchoEngine)
    started = time.monotonic()
    with closing(build_engine(make_spec("vllm", tmp_path / "log"))) as engine:
        assert isinstance(engine, EngineProcess)
        assert time.monotonic() - started < 5.0
        assert engine.facts is None
        assert engine.stats == EngineStats()


def test_whoever_waits_for_several_hears_that_one_has_news(tmp_path):
    news = threading.Event()
    spec = make_spec("echo", tmp_path / "log")
    with closing(EngineProcess(spec, news.set)) as engine:
        assert news.wait(WAIT_S)
        engine.add([ask("hello")])
        finished = []
        while not finished:
            assert news.wait(WAIT_S)
            news.clear()
            finished = engine.step(0)
        news.clear()
        os.kill(engine.pid, signal.SIGKILL)
        assert news.wait(WAIT_S)


def test_requests_added_before_the_engine_is_up_are_answered(tmp_path):
    with closing(start("echo-process", tmp_path / "log")) as engine:
        assert engine.facts is None
        assert len(run(engine, [ask(f"{number}") for number in range(100)])) == 100


def test_close_leaves_no_process_and_is_idempotent(tmp_path):
    engine = start("echo-process", tmp_path / "log")
    wait_until_up(engine)
    guard = engine._child.guard
    assert group_members(engine.pid)
    started = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - started < 10.0
    assert group_members(engine.pid) == []
    assert guard.returncode == 0
    with pytest.raises(EngineDeadError, match="closed"):
        engine.step(0)


def test_close_while_vllm_is_loading_leaves_no_process(tmp_path):
    engine = start("vllm", tmp_path / "log")
    time.sleep(1.0)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 10.0
    assert group_members(engine.pid) == []


def test_a_forgotten_engine_is_stopped(tmp_path):
    engine = start("echo-process", tmp_path / "log")
    wait_until_up(engine)
    pid = engine.pid
    del engine
    assert_group_ends(pid, within_s=2.0)


def test_a_killed_engine_hands_out_what_it_finished_and_then_raises(tmp_path):
    with closing(start("echo-process", tmp_path / "log")) as engine:
        wait_until_up(engine)
        finished = [ask(f"row {number}") for number in range(50)]
        engine.add(finished)
        time.sleep(1.0)
        os.kill(engine.pid, signal.SIGKILL)
        engine.add([ask("too late")])
        completions = []
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            step_until_dead(engine, completions)
        assert {c.request_id for c in completions} == {r.request_id for r in finished}
        assert all(isinstance(completion, Completion) for completion in completions)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            engine.add([ask("after the news")])
        assert group_members(engine.pid) == []


def test_a_silent_engine_with_work_counts_as_dead(tmp_path):
    built, deaths = [], []

    def build(spec):
        built.append(EngineProcess(spec))
        return built[-1]

    spec = make_spec("echo-process", tmp_path / "log")
    engine = SupervisedEngine(build, lambda: spec, on_death=deaths.append, stall_s=1.0)
    with closing(AsEngine(engine)) as engine:
        engine.start()
        wait_until_up(engine)
        os.kill(built[0].pid, signal.SIGSTOP)
        (answer,) = run(engine, [fakes.ask(0, "hello")])
        assert answer.text == "hello"
        assert group_members(built[0].pid) == []
    assert len(built) == 2
    assert "the engine hangs: no row finished" in deaths[0].reason


def test_a_hosted_engine_hears_what_is_left_to_do(tmp_path):
    spec = EngineSpec("tests.faulty:HearingEngine", "x", {}, {}, log_path=str(tmp_path / "log"))
    work = WorkLeft(700, 8, rows_per_s=3.5)
    engine = SupervisedEngine(build_engine, lambda: spec)
    with closing(engine):
        engine.start()
        assert engine.step(0.1) == []
        assert engine.facts is None
        engine.expect(work)
        wait_until_up(engine)
        assert engine.facts.settings == work._asdict()


def test_a_killed_host_is_told_at_once_though_what_it_forked_lives(tmp_path):
    spec = EngineSpec("tests.faulty:ForkingEngine", "x", {}, {}, log_path=str(tmp_path / "log"))
    with closing(EngineProcess(spec)) as engine:
        wait_until_up(engine)
        assert len(group_members(engine.pid)) == 2
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            engine.step(WAIT_S)
        pgid = engine.pid
    assert_group_ends(pgid, within_s=3.0)


def test_an_unknown_option_of_a_hosted_engine_names_itself(tmp_path):
    spec = EngineSpec("echo", "x", {"max_num_seq": 3}, {}, log_path=str(tmp_path / "log"))
    with (
        closing(EngineProcess(spec)) as engine,
        pytest.raises(ConfigError, match=r"'max_num_seq'.* 'max_num_seqs'"),
    ):
        engine.step(20.0)


def test_a_log_that_cannot_be_written_is_an_engine_error(tmp_path):
    with pytest.raises(EngineError, match="cannot be written: No such file"):
        start("echo-process", tmp_path / "missing" / "log")


PARENT = """
import json, sys, time
from batchgen.engine.process import EngineProcess
from batchgen.core.records import EngineSpec, WorkLeft
fields = json.loads(sys.argv[1])
engine = EngineProcess(EngineSpec(**{**fields, "work": WorkLeft(*fields["work"])}))
print(engine.pid, flush=True)
while engine.facts is None and sys.argv[2] == "up":
    engine.step(0.5)
print("up", flush=True)
time.sleep(600)
"""


def kill_parent(spec, when, environment=None, first=lambda pgid: None):
    """Start an engine in another process, kill -9 that one, return the engine's group."""
    fields = {name: getattr(spec, name) for name in spec.__slots__}
    command = [sys.executable, "-c", PARENT, json.dumps(fields), when]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        pgid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "up\n"
        num_members = len(group_members(pgid))
        assert num_members > 0
        first(pgid)
        parent.kill()
    return pgid, num_members


@pytest.mark.parametrize("kind", ["echo-process", "vllm"])
def test_nothing_survives_a_killed_parent_even_while_loading(kind, tmp_path):
    pgid, _ = kill_parent(make_spec(kind, tmp_path / "log"), when="at once")
    assert_group_ends(pgid, within_s=3.0)


def test_nothing_survives_a_killed_parent_though_the_engine_hangs(tmp_path):
    def hang(pgid):
        os.killpg(pgid, signal.SIGSTOP)  # It cannot end itself: the guard has to.

    pgid, _ = kill_parent(make_spec("echo-process", tmp_path / "log"), when="up", first=hang)
    assert_group_ends(pgid, within_s=3.0)


@pytest.mark.vllm
def test_greedy_vllm_repeats_itself_and_its_death_is_told(tmp_path):
    with closing(start("vllm", tmp_path / "log", temperature=0.0)) as engine:
        answers = run(engine, [ask(chat("My parcel is late."), seed=None) for _ in range(20)])
        assert len({answer.text for answer in answers}) == 1
        assert engine.facts.name == "vllm"
        assert engine.stats.kv_cache_usage is not None
        assert engine.stats.num_preemptions == 0
        os.kill(engine.pid, signal.SIGSEGV)
        with pytest.raises(EngineDeadError, match="SIGSEGV"):
            engine.step(10.0)


@pytest.mark.vllm
def test_different_seeds_sample_different_answers(tmp_path):
    with closing(start("vllm", tmp_path / "log", temperature=2.0)) as engine:
        first, again, other = (
            [c.text for c in run(engine, [ask("hello", seed + n) for n in range(10)])]
            for seed in (100, 100, 900)
        )
    assert first == again
    assert len({*first, *other}) > 10


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("options", "sampling", "error", "cause"),
    [
        ({"max_model_len": 10**7}, {}, ConfigError, "refuses the settings: User-.* max_model_len"),
        ({"max_num_seq": 1}, {}, ConfigError, r"engine\.max_num_seq: .* mean 'max_num_seqs'\?$"),
        ({}, {"temperature": -1.0}, EngineError, "temperature"),
    ],
    ids=["model length", "unknown option", "bad sampling"],
)
def test_what_vllm_refuses_is_told_in_one_line(tmp_path, options, sampling, error, cause):
    good = make_spec("vllm", tmp_path / "log", **sampling)
    spec = EngineSpec(
        "vllm", good.model, {**good.model_kwargs, **options}, good.sampling_params,
        log_path=good.log_path,
    )  # fmt: skip
    with closing(EngineProcess(spec)) as engine, pytest.raises(error, match=cause) as caught:
        step_until_dead(engine, [])
    assert "\n" not in str(caught.value)
    if error is EngineError:
        assert str(tmp_path / "log") in str(caught.value)


SAME_AS_VLLM = """
import json, random, sys
from types import SimpleNamespace
from batchgen.engine.vllm.encoder import ChatStyle, encode
from batchgen.engine.base import HostedRequest
from batchgen.engine.vllm.engine import load_tokenizer
from batchgen.core.records import EngineSpec
from vllm import LLM
spec = EngineSpec("vllm", sys.argv[1], {}, {})
llm = LLM(spec.model, enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=32 << 20)
texts = ["hello", "Grüße 你好 \\U0001f600", " leading", "<|im_start|>user", "a\\n\\nb\\t"]
system = {"role": "system", "content": "Be brief."}
chats = [[system, {"role": "user", "content": text}] for text in texts]
requests = [HostedRequest(i, prompt, None) for i, prompt in enumerate(texts + chats)]
ours = [list(e.token_ids) for e in encode(load_tokenizer(spec), requests, ChatStyle(None, {}))]
theirs = [llm._preprocess_cmpl_one({"prompt": t})["prompt_token_ids"] for t in texts]
theirs += [llm._preprocess_chat_one(c)["prompt_token_ids"] for c in chats]

from batchgen.engine.vllm.answers import prime_with_prompt_ends
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
tokenizer, dice = llm.get_tokenizer(), random.Random(1)
prompts = [tokenizer.encode("Grüße 你好 \U0001f600 and so on " * 20) + ids for ids in theirs]
for prompt in prompts[:]:
    prompts += [prompt[:-n] for n in range(1, 6)] + [prompt + tokenizer.all_special_ids]
# A prompt that ends within a character is no text; vLLM gives it back with the answer.
prompts = [prompt for prompt in prompts if not tokenizer.decode(prompt).endswith("\ufffd")]
vocabulary = range(len(tokenizer))
answers = [
    tokenizer.encode(dice.choice(texts)) + dice.choices(vocabulary, k=12) for _ in prompts
]
def texts_of(params):
    found = []
    for prompt, answer in zip(prompts, answers):
        request = SimpleNamespace(
            request_id="r",
            prompt_token_ids=list(prompt),
            prompt_embeds=None,
            sampling_params=params,
        )
        detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        for token_id in answer:
            detokenizer.update([token_id], False)
        found.append(detokenizer.get_next_output_text(True, False))
        assert request.prompt_token_ids == list(prompt)
    return found
kinds = [SamplingParams(), SamplingParams(skip_special_tokens=False, stop=["zz"])]
whole = [texts_of(params) for params in kinds]
prime_with_prompt_ends()
prime_with_prompt_ends()
ends = [texts_of(params) for params in kinds]

import dataclasses, inspect
from batchgen.engine.vllm.settings import known_keywords
from vllm import EngineArgs
known = {field.name for field in dataclasses.fields(EngineArgs) if field.init}
known |= set(inspect.signature(LLM.__init__).parameters) - {"self", "kwargs"}
assert known_keywords() == known, known_keywords() ^ known
print(json.dumps([ours, [list(ids) for ids in theirs], whole, ends]))
"""


@pytest.mark.vllm
def test_token_ids_and_texts_are_vllms_own():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", SAME_AS_VLLM, str(MODEL)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ours, theirs, whole, ends = json.loads(output.stdout.splitlines()[-1])
    assert len(ours) == 10
    assert ours == theirs
    assert [len(texts) for texts in whole] == [67, 67]
    assert ends == whole


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("multiprocessing", ["0", "1"])
def test_no_vllm_process_survives_a_killed_parent(tmp_path, multiprocessing):
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing}
    pgid, num_members = kill_parent(make_spec("vllm", tmp_path / "log"), "up", environment)
    assert num_members >= (3 if multiprocessing == "1" else 1)
    assert_group_ends(pgid, within_s=3.0)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_killed_engine_core_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with closing(start("vllm", tmp_path / "log")) as engine:
        wait_until_up(engine)
        core = next(p for p in group_members(engine.pid) if "EngineCore" in " ".join(p.cmdline()))
        engine.add([ask(f"row {number}") for number in range(3000)])
        completions = engine.step(10.0)
        core.kill()
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match="engine core died"):
            step_until_dead(engine, completions)
        assert time.monotonic() - started < 10.0
        assert 0 < len({c.request_id for c in completions}) == len(completions) < 3000
        assert group_members(engine.pid) == []
