"""Job files: what is read, where paths point, and the text of every kind of mistake."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from batchgen.core.errors import ConfigError
from batchgen.job.load import json_schema, load_job, parse_job
from batchgen.job.model import JobConfig
from batchgen.job.recipe import make_recipe
from batchgen.pipeline.prepare import frozen_job, prepare
from tests.fakes import tables_of_job

MINIMAL = """
[input]
path = "rows.jsonl"
[prompt]
user = "{{ text }}"
[model]
name = "org/model"
[sampling]
max_tokens = 10
[output]
path = "out"
"""


@pytest.fixture
def job_file(tmp_path):
    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "job.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(tmp_path, tables, *overrides):
    with pytest.raises(ConfigError) as caught:
        parse_job(tables, base=tmp_path, where="job.toml", overrides=overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def test_labels_are_listed_where_there_is_a_choice_and_an_engine_here(make_job):
    labels, choice = {"logprobs": "labels"}, {"choice": ["a", "b"]}
    assert make_job(output=choice, sampling=labels).sampling.logprobs == "labels"
    server = {"backend": "openai", "name": "m", "base_url": "http://gpu1:8000/v1"}
    for wrong in ({}, {"output": choice, "model": server}):
        with pytest.raises(ConfigError, match=r"sampling\.logprobs = 'labels' goes with"):
            make_job(sampling=labels, **wrong)


def test_a_minimal_job_has_these_values(job_file, tmp_path):
    job = load_job(job_file())
    assert job.input.path == [str(tmp_path / "rows.jsonl")]
    assert job.output.path == str(tmp_path / "out")
    assert job.model.name == "org/model"
    assert (job.model.backend, job.model.revision, job.model.engine) == ("vllm", None, {})
    assert (job.sampling.max_tokens, job.sampling.seed, job.sampling.temperature) == (10, 0, None)
    assert (job.output.prefix, job.output.compression) == ("gen_", "zstd")
    assert job.output.rows_per_file == 1_000_000
    assert (job.run.flush_s, job.run.flush_rows, job.run.flush_mib) == (30.0, 20_000, 64)
    assert (job.run.max_in_flight, job.gate.max_error_rate) == (None, 0.1)
    assert (job.run.grace_s, job.run.stats_s) == (20.0, 5.0)
    assert (job.input.where, job.input.limit, job.input.columns) == (None, None, None)


def test_a_minimal_job_runs_no_hook_and_keeps_every_snapshot(job_file):
    job = load_job(job_file())
    assert (job.run.dedupe, job.run.on_finish, job.run.metrics_file) == ("auto", [], None)
    assert (job.output.keep_snapshots, job.gate.max_shrink) == (None, None)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("notify.py", "notify.py"),
        ("./notify.py", "{base}/notify.py"),
        ("hooks/../notify.py", "{base}/notify.py"),
        ("/usr/bin/mail", "/usr/bin/mail"),
    ],
)
def test_a_hook_with_a_slash_is_beside_the_job_file(make_job, tmp_path, program, found):
    job = make_job(run={"on_finish": [program, "./an/argument"], "metrics_file": "m/x.prom"})
    assert job.run.on_finish == [found.format(base=tmp_path), "./an/argument"]
    assert job.run.metrics_file == f"{tmp_path}/m/x.prom"


PATHS = {
    "input.path": {"input": {"path": "HERE/in.jsonl"}},
    "output.path": {"output": {"path": "HERE/out"}},
    "output.schema": {"output": {"schema": "HERE/schema.json"}},
    "model.name": {"model": {"name": "HERE"}},
    "model.lora.a": {"model": {"lora": {"a": "HERE/a"}}},
    "prompt.user_file": {"prompt": {"user": None, "user_file": "HERE/user.j2"}},
    "prompt.system_file": {"prompt": {"system_file": "HERE/system.j2"}},
    "prompt.chat_template_file": {"prompt": {"chat_template_file": "HERE/chat.j2"}},
    "prompt.examples_file": {"prompt": {"examples_file": "HERE/examples.jsonl"}},
    "prompt.tools_file": {"prompt": {"tools_file": "HERE/tools.json"}},
    "prompt.images_folder": {"prompt": {"images": "image", "images_folder": "HERE/images"}},
    "run.on_finish": {"run": {"on_finish": ["HERE/notify"]}},
    "run.metrics_file": {"run": {"metrics_file": "HERE/x.prom"}},
}
"""Each key that holds a path -> tables with one, below a folder HERE."""
FILES = {
    "schema.json": "{}",
    "user.j2": "{{ text }}",
    "system.j2": "s",
    "chat.j2": "c",
    "examples.jsonl": '{"user": "q", "assistant": "a"}',
    "tools.json": "[]",
}


def below(here: str, key: str) -> dict:
    return json.loads(json.dumps(PATHS[key]).replace("HERE", here))


@pytest.fixture
def a_folder(tmp_path):
    folder = tmp_path / "$HERE" / "b"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("written", ["$BATCHGEN_TEST_A/b", "${BATCHGEN_TEST_A}/b", "$HERE/b"])
def test_a_variable_in_any_path_is_put_in_and_what_exists_as_written_is_meant_so(
    make_job, a_folder, monkeypatch, key, written
):
    monkeypatch.setenv("BATCHGEN_TEST_A", str(a_folder.parent))
    monkeypatch.setenv("HERE", "/nowhere")
    assert make_job(**below(written, key)) == make_job(**below(str(a_folder), key))


@pytest.mark.parametrize("key", PATHS)
def test_a_variable_that_is_not_set_is_refused_in_any_path(tmp_path, job_tables, monkeypatch, key):
    monkeypatch.setenv("EMPTY", "")
    for written in ("$BATCHGEN_NOT_SET/b", "a${BATCHGEN_NOT_SET}", "$EMPTY"):
        (found,) = problems(tmp_path, job_tables(**below(written, key)))
        assert found.startswith(f"{key}: '{written}")
        assert "the environment has no variable $" in found


def test_a_dollar_that_begins_no_name_and_one_of_a_url_stay(make_job, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    job = make_job(input={"path": ["a$/5$.jsonl", "$$/{$", "s3://bucket/$HOME/*.jsonl"]})
    assert job.input.path == [
        f"{tmp_path}/a$/5$.jsonl", f"{tmp_path}/$$/{{$", "s3://bucket/$HOME/*.jsonl"
    ]  # fmt: skip


def test_a_pattern_with_a_dollar_that_matches_is_meant_as_it_is_written(
    make_job, tmp_path, monkeypatch
):
    monkeypatch.setenv("b", "/nowhere")
    (tmp_path / "a$b1.jsonl").write_text("{}")
    assert make_job(input={"path": "a$b*.jsonl"}).input.path == [f"{tmp_path}/a$b*.jsonl"]


@pytest.mark.parametrize(
    "key",
    [key for key in PATHS if key.startswith("prompt.") and key.endswith("_file")]
    + ["output.schema"],
)
def test_a_pipe_where_a_file_is_expected_is_refused_and_not_waited_for(tmp_path, job_tables, key):
    os.mkfifo(tmp_path / "pipe")
    tables = json.loads(re.sub(r"HERE/[\w.]+", "pipe", json.dumps(PATHS[key])))
    (found,) = problems(tmp_path, job_tables(**tables))
    assert found.startswith(f"{key}: '{tmp_path}/pipe' cannot be read")
    assert found.endswith("is a pipe, expected a file")


def test_a_job_file_that_is_a_pipe_or_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match="is a pipe, expected a file"):
        load_job(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match="is a device, expected a file"):
        load_job(Path("/dev/zero"))


def test_paths_of_the_hook_and_the_metrics_are_checked_as_others(tmp_path, job_tables):
    run = {"on_finish": ["~no-such-user/x"], "metrics_file": "x" * 300}
    hook, metrics = problems(tmp_path, job_tables(run=run))
    assert hook == "run.on_finish: '~no-such-user/x': there is no such user"
    assert metrics.endswith("is too long for a path (300 bytes)")


def test_how_nights_are_run_is_neither_recipe_nor_frozen(make_job):
    plain = make_job()
    nightly = make_job(
        run={"dedupe": "never", "on_finish": ["x"], "metrics_file": "x.prom"},
        output={"keep_snapshots": 7},
        gate={"max_shrink": 0.1},
    )
    recipe = make_recipe(plain, {})
    assert make_recipe(nightly, {}) == recipe
    assert frozen_job(nightly, recipe) == frozen_job(plain, recipe)


def test_a_loaded_job_cannot_be_changed(make_job):
    with pytest.raises(ValueError, match="frozen"):
        make_job().run.flush_s = 1.0


MISTAKES = {
    "unknown key with a near one": (
        {"sampling": {"max_token": 5}},
        "sampling.max_token: unknown key, did you mean 'max_tokens'?",
    ),
    "a key of another table": (
        {"prompt": {"temperature": 0.5}},
        "prompt.temperature: unknown key, did you mean 'sampling.temperature'?",
    ),
    "a sampling parameter of vLLM's without a key": (
        {"sampling": {"logit_bias": {"42": -5.0}}},
        "sampling.logit_bias: unknown key; vLLM's other sampling parameters go in [sampling.extra]",
    ),
    "log probabilities of the prompt": (
        {"sampling": {"prompt_logprobs": 1}},
        "sampling.prompt_logprobs: unknown key, did you mean 'task = \"loglikelihood\"'?",
    ),
    "unknown table": ({"inputs": {"path": "x"}}, "inputs: unknown key, did you mean 'input'?"),
    "a key at the top": ({"limit": 5}, "limit: unknown key, did you mean 'input.limit'?"),
    "a vLLM option in [model]": (
        {"model": {"kv_cache_dtype": "fp8"}},
        "model.kv_cache_dtype: unknown key; vLLM's other options go in [model.engine]",
    ),
    "nothing near": (
        {"output": {"zzz": 1}},
        "output.zzz: unknown key, expected one of: path, prefix, schema, schema_column, "
        "choice, regex, grammar, json_object, flatten, label_probability, with_seed, "
        "samples, openai, compression, "
        "rows_per_file, "
        "keep_snapshots",
    ),
    "wrong type": (
        {"sampling": {"max_tokens": "5"}},
        "sampling.max_tokens: '5' is wrong, expected: a valid integer",
    ),
    "a float is no integer": (
        {"sampling": {"max_tokens": 5.0}},
        "sampling.max_tokens: 5.0 is wrong, expected: a valid integer",
    ),
    "a boolean is no integer": (
        {"run": {"flush_rows": True}},
        "run.flush_rows: True is wrong, expected: a valid integer",
    ),
    "out of bounds": (
        {"run": {"flush_rows": 0}},
        "run.flush_rows: 0 is wrong, expected: greater than 0",
    ),
    "over the top": (
        {"gate": {"max_error_rate": 1.5}},
        "gate.max_error_rate: 1.5 is wrong, expected: less than or equal to 1",
    ),
    "not one of": (
        {"output": {"compression": "brotli"}},
        "output.compression: 'brotli' is wrong, expected: 'zstd', 'snappy', 'lz4', 'gzip' or "
        "'none'",
    ),
    "two forms of prompt": (
        {"prompt": {"text": "t"}},
        "prompt: found user and text, "
        "expected exactly one of user, messages, text, template, query",
    ),
    "system beside a raw text": (
        {"prompt": {"user": None, "text": "t", "system": "s"}},
        "prompt: system goes with user, not with text",
    ),
    "two forms of answer": (
        {"output": {"choice": ["a"], "regex": "a"}},
        "output: choice and regex are given, expected one of them",
    ),
    "flatten without a schema": (
        {"output": {"flatten": True}},
        "output: flatten is given without schema",
    ),
    "a key of a list of tables": (
        {"retry": [{"max_tokens": 4}, {"max_token": 5}]},
        "retry.1.max_token: unknown key, did you mean 'max_tokens'?",
    ),
    "a verdict that does not exist": (
        {"retry": [{"on": ["bad"]}]},
        "retry.0.on.0: 'bad' is wrong, expected: 'truncated', 'invalid_json', "
        "'schema_violation' or 'refused'",
    ),
    "examples beside a chat": (
        {"prompt": {"user": None, "messages": "m", "examples": [{"user": "a", "assistant": "b"}]}},
        "prompt: examples go with user, not with messages",
    ),
    "images beside a raw text": (
        {"prompt": {"user": None, "text": "t", "images": "i"}},
        "prompt: images goes with user or messages, not with text",
    ),
    "a column of adapters without adapters": (
        {"model": {"lora_column": "a"}},
        "model: lora_column is given without adapters, expected [model.lora] name = folder",
    ),
    "adapters without a column": (
        {"model": {"lora": {"a": "x", "b": "y"}}},
        "model: 2 lora adapters, expected lora_column to say which row has which",
    ),
    "user twice": (
        {"prompt": {"user_file": "u.txt"}},
        "prompt: both user and user_file are given, expected one",
    ),
    "no prompt": (
        {"prompt": {"user": None}},
        "prompt: found none of them, expected exactly one of user, messages, text, template, query",
    ),
    "a model without a name": (
        {"model": {"backend": "vllm"}},
        "model: name is missing, expected the model's folder or hub id",
    ),
    "an engine option with a key of its own": (
        {"model": {"backend": "vllm", "name": "m", "engine": {"dtype": "float16"}}},
        "model: engine.dtype has a key of its own, set model.dtype",
    ),
    "a schema that is neither": (
        {"output": {"schema": 5}},
        "output.schema: 5 is wrong, expected: a path or a table",
    ),
    "stops that are neither": (
        {"sampling": {"stop": 5}},
        "sampling.stop: 5 is wrong, expected: a text or a list of texts",
    ),
    "an empty stop": (
        {"sampling": {"stop": ["\n", ""]}},
        "sampling: stop has an empty text, which ends every answer, expected at least 1 character",
    ),
    "no stop": (
        {"sampling": {"stop": ""}},
        "sampling: stop has an empty text, which ends every answer, expected at least 1 character",
    ),
    "an empty word": (
        {"sampling": {"bad_words": ["x", ""]}},
        "sampling.bad_words.1: '' is wrong, expected: at least 1 character",
    ),
    "a token that is none": (
        {"sampling": {"stop_token_ids": [-4]}},
        "sampling.stop_token_ids.0: -4 is wrong, expected: greater than or equal to 0",
    ),
    "answers that must be longer than they may": (
        {"sampling": {"min_tokens": 65, "max_tokens": 64}},
        "sampling: min_tokens = 65 is over max_tokens = 64: no answer could be both",
    ),
    "an example's answer that is neither": (
        {"prompt": {"examples": [{"user": "q", "assistant": 5}]}},
        "prompt.examples.0.assistant: 5 is wrong, expected: a text or a table",
    ),
    "one table for a list of them": (
        {"retry": {"temperature": 1.0}},
        "retry: {'temperature': 1.0} is wrong, expected: [[retry]], a list of tables",
    ),
    "no labels": (
        {"output": {"choice": []}},
        "output.choice: [] is wrong, expected: at least one label",
    ),
    "no verdicts": (
        {"retry": [{"on": []}]},
        "retry.0.on: [] is wrong, expected: at least one verdict",
    ),
    "no number of JSON": (
        {"output": {"schema": {"minimum": float("nan")}}},
        "output.schema.minimum: holds nan, expected a finite number",
    ),
    "an infinite example": (
        {"prompt": {"examples": [{"user": "q", "assistant": {"x": [float("inf")]}}]}},
        "prompt.examples[0].assistant.x[0]: holds inf, expected a finite number",
    ),
    "a way of deduplication that does not exist": (
        {"run": {"dedupe": "sometimes"}},
        "run.dedupe: 'sometimes' is wrong, expected: 'auto', 'always' or 'never'",
    ),
    "a command that is a text": (
        {"run": {"on_finish": "mail -s done"}},
        "run.on_finish: 'mail -s done' is wrong, expected: a list: [program, arguments...]",
    ),
    "a command without a program": (
        {"run": {"on_finish": ["", "x"]}},
        "run.on_finish.0: '' is wrong, expected: at least 1 character",
    ),
    "no name of a file": (
        {"run": {"metrics_file": ""}},
        "run.metrics_file: '' is wrong, expected: at least 1 character",
    ),
    "metrics to a URL": (
        {"run": {"metrics_file": "https://host/x.prom"}},
        "run.metrics_file: 'https://host/x.prom' is a URL, expected a file on this machine",
    ),
    "output in a whole bucket": (
        {"output": {"path": "s3://bucket/"}},
        "output.path: is a whole bucket, expected a prefix in it, such as s3://BUCKET/labels",
    ),
    "output in a bucket for workers": (
        {"output": {"path": "s3://bucket/out"}, "run": {"replicas": 2}},
        "output.path: is in an object store, which is not supported with run.replicas yet, "
        "expected a folder",
    ),
    "output at a chained URL": (
        {"output": {"path": "simplecache::memory://out"}},
        "output.path: simplecache::memory:// is not supported, expected a folder or "
        "s3://BUCKET/PREFIX",
    ),
    "output at a URL of a file": (
        {"output": {"path": "file:///srv/out"}},
        "output.path: file:// is not supported, expected a folder or s3://BUCKET/PREFIX, such as "
        "/srv/out",
    ),
    "a key of its own": (
        {"sampling": {"extra": {"top_k": 3}}},
        "sampling: extra.top_k has a place of its own, see sampling.top_k",
    ),
    "not for a job to set": (
        {"sampling": {"extra": {"structured_outputs": {}}}},
        "sampling: extra.structured_outputs has a place of its own, see [output]",
    ),
    "no snapshot to keep": (
        {"output": {"keep_snapshots": -1}},
        "output.keep_snapshots: -1 is wrong, expected: greater than or equal to 0",
    ),
    "to shrink by more than all": (
        {"gate": {"max_shrink": 2.0}},
        "gate.max_shrink: 2.0 is wrong, expected: less than or equal to 1",
    ),
    "no replicas": (
        {"run": {"replicas": 0}},
        "run.replicas: 0 is wrong, expected: at least 1, or 'auto'",
    ),
    "replicas mistyped": (
        {"run": {"replicas": "atuo"}},
        "run.replicas: 'atuo' is wrong, expected: at least 1, or 'auto'",
    ),
    "no path": (
        {"input": {"path": []}},
        "input.path: [] is wrong, expected: at least one path",
    ),
    "seed of 63 bits": (
        {"sampling": {"seed": 2**62}},
        "sampling.seed: 4611686018427387904 is wrong, expected: less than 4611686018427387904",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_each_mistake_has_its_text(tmp_path, job_tables, case):
    tables, problem = MISTAKES[case]
    made = job_tables()
    for name, table in tables.items():
        if isinstance(table, dict):
            made[name] = {**made.get(name, {}), **table}
        else:
            made[name] = table
    assert problems(tmp_path, made) == [problem]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("input", "input: missing, expected the table [input]"),
        ("sampling", "sampling: missing, expected the table [sampling]"),
        (
            "sampling.max_tokens",
            "sampling.max_tokens: missing; it is: Longest answer, in tokens. No default: it "
            "bounds the time that a row can take.",
        ),
        (
            "output.path",
            "output.path: missing; it is: Folder of the published Parquet files and of the "
            "job's state (`_batchgen/`).",
        ),
    ],
)
def test_what_is_missing_is_said_with_its_meaning(tmp_path, job_tables, key, problem):
    tables = job_tables()
    name, _, last = key.partition(".")
    if last:
        del tables[name][last]
    else:
        del tables[name]
    assert problems(tmp_path, tables) == [problem]


def test_a_value_where_a_table_is_expected_says_so(tmp_path, job_tables):
    tables = job_tables() | {"sampling": 5}
    (problem,) = problems(tmp_path, tables)
    assert "table" in problem
    assert "SamplingConfig" not in problem


def test_a_path_of_the_wrong_type_is_one_problem(tmp_path, job_tables):
    assert len(problems(tmp_path, job_tables(input={"path": 5}))) == 1


@pytest.mark.parametrize("path", ["", []])
def test_an_empty_input_path_is_refused(tmp_path, job_tables, path):
    assert any(
        "input.path" in text for text in problems(tmp_path, job_tables(input={"path": path}))
    )


@pytest.mark.parametrize("key", ["temperature", "repetition_penalty"])
def test_an_infinite_sampling_value_is_refused(tmp_path, job_tables, key):
    problems(tmp_path, job_tables(sampling={key: float("inf")}))


def test_all_mistakes_are_told_at_once(tmp_path, job_tables):
    tables = job_tables(
        input={"limit": 0}, sampling={"max_tokens": "x", "topp": 1.0}, run={"flush_s": -1.0}
    )
    del tables["output"]["path"]
    found = problems(tmp_path, tables, "nonsense", "run.grace_s=-1", "input.path.x=1")
    assert [text.partition(": ")[0] for text in found] == [
        "--set 'nonsense'",
        "--set 'input.path.x=1'",
        "input.limit",
        "sampling.max_tokens",
        "sampling.topp",
        "output.path",
        "run.flush_s",
        "run.grace_s",
    ]


def test_one_problem_is_one_line_and_more_are_a_list():
    assert str(ConfigError("job.toml", ["a: b"])) == "job.toml: a: b"
    assert str(ConfigError("job.toml", ["a", "b"])) == "job.toml: 2 problems\n  a\n  b"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("run.flush_s=10", lambda job: job.run.flush_s == 10.0),
        ("run.flush_s = 2.5 ", lambda job: job.run.flush_s == 2.5),
        ("input.limit=5", lambda job: job.input.limit == 5),
        ("input.where=n > 3 and s = 'x'", lambda job: job.input.where == "n > 3 and s = 'x'"),
        ('input.columns=["a", "b"]', lambda job: job.input.columns == ["a", "b"]),
        ("prompt.user={{ a }} = {{ b }}", lambda job: job.prompt.user == "{{ a }} = {{ b }}"),
        ('prompt.user="5"', lambda job: job.prompt.user == "5"),
        ("model.engine.step_s=0.5", lambda job: job.model.engine == {"step_s": 0.5}),
        ("model.engine={a = true}", lambda job: job.model.engine == {"a": True}),
        ("output.path=/abs/x", lambda job: job.output.path == "/abs/x"),
        ("run.max_in_flight=7", lambda job: job.run.max_in_flight == 7),
    ],
)
def test_set_takes_toml_or_plain_text(tmp_path, job_tables, override, read):
    job = parse_job(job_tables(), base=tmp_path, where="job.toml", overrides=[override])
    assert read(job)


def test_the_last_set_of_a_key_wins_and_the_callers_tables_stay(tmp_path, job_tables):
    tables = job_tables(run={"flush_s": 1.0})
    job = parse_job(
        tables, base=tmp_path, where="job.toml", overrides=["run.flush_s=2", "run.flush_s=3"]
    )
    assert job.run.flush_s == 3.0
    assert tables["run"] == {"flush_s": 1.0}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("limit", "--set 'limit': expected table.key=value, for example run.flush_s=10"),
        ("limit=5", "--set 'limit=5': expected table.key=value, for example run.flush_s=10"),
        ("run.=5", "--set 'run.=5': expected table.key=value, for example run.flush_s=10"),
        ("=5", "--set '=5': expected table.key=value, for example run.flush_s=10"),
        ("input.path.x=5", "--set 'input.path.x=5': 'path' is a value, expected a table"),
        ("run.flush=5", "run.flush: unknown key, did you mean 'flush_s'?"),
        ("run.flush_s=soon", "run.flush_s: 'soon' is wrong, expected: a valid number"),
        ("runs.flush_s=5", "runs: unknown key, did you mean 'run'?"),
    ],
)
def test_a_wrong_set_is_told(tmp_path, job_tables, override, problem):
    assert problems(tmp_path, job_tables(), override) == [problem]


def test_paths_are_relative_to_the_job_file(tmp_path, job_file):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    text = MINIMAL.replace('"rows.jsonl"', '["data/*.jsonl", "/abs/x.jsonl", "s3://b/y.jsonl"]')
    text = text.replace("org/model", "models/tiny").replace('"out"', '"../elsewhere"')
    job = load_job(job_file(text))
    assert job.input.path == [str(tmp_path / "data/*.jsonl"), "/abs/x.jsonl", "s3://b/y.jsonl"]
    assert job.output.path == str(tmp_path.parent / "elsewhere")
    assert job.model.name == str(tmp_path / "models" / "tiny")


def test_home_is_home(tmp_path, make_job):
    assert make_job(output={"path": "~/x"}).output.path == str(Path("~/x").expanduser())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/model", "org/model"),
        ("model", "model"),
        ("./model", "{base}/model"),
        ("../model", "{parent}/model"),
        ("/abs/model", "/abs/model"),
        ("here", "{base}/here"),
    ],
)
def test_a_model_is_a_folder_if_it_is_one_or_looks_like_one(tmp_path, make_job, name, wanted):
    (tmp_path / "here").mkdir()
    job = make_job(model={"name": name})
    assert job.model.name == wanted.format(base=tmp_path, parent=tmp_path.parent)


def test_template_files_are_read_relative_to_the_job_file(tmp_path, make_job):
    (tmp_path / "user.j2").write_text("Say {{ text }}\n", encoding="utf-8")
    (tmp_path / "system.j2").write_text("Be \u00e9.", encoding="utf-8")
    (tmp_path / "chat.jinja").write_text("{{ messages }}", encoding="utf-8")
    prompt = {
        "user_file": "user.j2",
        "system_file": "system.j2",
        "chat_template_file": "chat.jinja",
    }
    job = make_job(prompt={"user": None, **prompt})
    assert job.prompt.user == "Say {{ text }}\n"
    assert job.prompt.system == "Be \u00e9."
    assert (job.prompt.user_file, job.prompt.system_file) == (None, None)
    assert job.prompt.chat_template_file == str(tmp_path / "chat.jinja")


def test_template_files_that_cannot_be_read_are_all_told(tmp_path, job_tables):
    (tmp_path / "latin.j2").write_bytes(b"\xe9")
    tables = job_tables(prompt={"user": None, "user_file": "no.j2", "system_file": "latin.j2"})
    first, second = problems(tmp_path, tables)
    assert first.startswith(f"prompt.user_file: '{tmp_path}/no.j2' cannot be read: ")
    assert second.startswith(f"prompt.system_file: '{tmp_path}/latin.j2' cannot be read: ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "job.toml: does not exist, expected a job file"),
        (b"[input\n", "job.toml: is not TOML: "),
        (b"a = 1\na = 2\n", "job.toml: is not TOML: Cannot overwrite a value"),
        (b"\xff\xfe", "job.toml: cannot be read as UTF-8 text: "),
    ],
)
def test_a_file_that_is_no_job_is_told(tmp_path, content, problem):
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert str(caught.value).startswith(f"{tmp_path}/{problem}")


def test_a_folder_is_no_job_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read as UTF-8 text: .*directory"):
        load_job(tmp_path)


def test_numbers_of_any_size_never_end_in_a_traceback(job_file):
    with pytest.raises(ConfigError, match=r"sampling\.seed: 9999"):
        load_job(job_file(), overrides=["sampling.seed=" + "9" * 40])


def test_a_toml_date_is_text_where_text_is_expected(job_file):
    assert load_job(job_file(MINIMAL + 'prefix = "2024-01-01_"\n')).output.prefix == "2024-01-01_"


def test_the_json_schema_describes_every_key():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == {"input", "prompt", "model", "output"}
    for name, table in schema["$defs"].items():
        assert table["additionalProperties"] is False
        for key, value in table["properties"].items():
            assert value.get("description"), f"{name}.{key}"
    json.dumps(schema)


@pytest.mark.parametrize("path", sorted(Path("jobs").glob("*.toml")), ids=str)
def test_every_job_that_comes_along_is_loaded(path):
    assert isinstance(load_job(path), JobConfig)


HUB = {"name": "org/model", "trust_remote_code": True}


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc123", "A" * 40, "g" * 40])
def test_code_from_the_hub_needs_the_commit_that_was_read(tmp_path, job_tables, revision):
    model = {**HUB, "backend": "vllm", **({"revision": revision} if revision else {})}
    (problem,) = problems(tmp_path, job_tables(model=model))
    assert problem == (
        "model.trust_remote_code: runs code from the hub, so model.revision has to be the commit "
        f"that you have read (40 hex digits), found {revision!r}"
    )


def test_code_at_a_commit_or_in_a_folder_may_be_trusted(tmp_path, job_tables):
    pinned = job_tables(model={**HUB, "backend": "vllm", "revision": "0a" * 20})
    assert parse_job(pinned, base=tmp_path, where="job.toml").model.trust_remote_code
    (tmp_path / "org" / "model").mkdir(parents=True)
    local = job_tables(model={**HUB, "backend": "vllm"})
    assert parse_job(local, base=tmp_path, where="job.toml").model.trust_remote_code


@pytest.mark.parametrize("load_format", ["pt", "npcache"])
def test_a_load_format_that_unpickles_needs_leave(tmp_path, job_tables, load_format):
    model = {"backend": "vllm", "name": "org/model", "engine": {"load_format": load_format}}
    (problem,) = problems(tmp_path, job_tables(model=model))
    assert "unpickles weights, set allow_pickle = true" in problem
    allowed = job_tables(model={**model, "allow_pickle": True})
    assert parse_job(allowed, base=tmp_path, where="job.toml").model.allow_pickle


@pytest.mark.parametrize("load_format", [["x"], {}, 5])
def test_a_load_format_is_a_text(tmp_path, job_tables, load_format):
    model = {"backend": "vllm", "name": "org/model", "engine": {"load_format": load_format}}
    (problem,) = problems(tmp_path, job_tables(model=model))
    assert f"engine.load_format = {load_format!r}, expected a text" in problem


SECRET = "canary0123456789canary0123456789canary"


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("input.path", f"s3://me:{SECRET}@bucket/in.jsonl", "AWS_SECRET_ACCESS_KEY"),
        ("input.path", ["ok.jsonl", f"https://me:{SECRET}@host/in.jsonl"], "fsspec"),
        ("input.path", f"https://b.s3.amazonaws.com/x?a=b&X-Amz-Signature={SECRET}", "fsspec"),
        ("input.path", f"https://storage.googleapis.com/x?X-Goog-Signature={SECRET}", "fsspec"),
        ("input.path", f"abfs://c@a.dfs.core.windows.net/x?sv=1&sig={SECRET}", "AZURE_STORAGE"),
        ("input.path", f"https://host/x?token={SECRET}", "fsspec"),
        ("input.path", f"https://host/x?access_key={SECRET}", "fsspec"),
        ("input.path", f"gs://b/x?access_token={SECRET}", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("output.path", f"s3a://me:{SECRET}@bucket/out", "AWS_SECRET_ACCESS_KEY"),
        ("model.engine", {"hf_token": f"x{SECRET}"}, "HF_TOKEN"),
        ("model.engine", {"token": SECRET}, "HF_TOKEN"),
        ("model.engine", {"api_key": SECRET}, "environment variable"),
        ("model.engine", {"a": {"password": SECRET}}, "environment variable"),
        ("model.engine", {"aws_secret_access_key": SECRET}, "environment variable"),
        ("model.engine", {"client_secret": SECRET}, "environment variable"),
        ("model.engine", {"x": [f"hf_{SECRET}"]}, "HF_TOKEN"),
        ("model.name", f"hf_{SECRET}", "HF_TOKEN"),
        ("prompt.user", f"{{{{ text }}}} sk-{SECRET}", "environment variable"),
    ],
)
@pytest.mark.parametrize("by_set", [False, True])
def test_a_credential_in_a_job_is_refused_and_not_repeated(
    tmp_path, job_tables, key, value, instead, by_set
):
    tables = job_tables()
    table, name = key.split(".")
    overrides = []
    if by_set and isinstance(value, str):
        overrides = [f"{key}={value}"]
    else:
        tables[table][name] = value
    tables["run"] = {"flush_rows": "wrong as well, which must wait"}
    (problem,) = problems(tmp_path, tables, *overrides)
    assert problem.startswith(key)
    assert instead in problem
    assert SECRET[:12] not in problem


@pytest.mark.parametrize(
    "override", [f"hf_token={SECRET}", f"https://me:{SECRET}@host", f"input.path.token={SECRET}"]
)
def test_a_wrong_set_does_not_repeat_a_credential(tmp_path, job_tables, override):
    for problem in problems(tmp_path, job_tables(), override):
        assert SECRET[:12] not in problem


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        ("input", {"types": {"password": "string", "token": "string"}}),
        ("input", {"path": ["abfs://container@account.dfs.core.windows.net/x.jsonl"]}),
        ("input", {"path": ["https://host/x.jsonl?version=2&page=3"]}),
        ("prompt", {"user": "Mail me@example.org: what is a token=? {{ text }}"}),
        ("prompt", {"chat_template_kwargs": {"bos_token": "<s>", "enable_thinking": False}}),
        ("sampling", {"min_tokens": 1, "stop_token_ids": [1], "skip_special_tokens": True}),
        ("model", {"engine": {"max_num_batched_tokens": 8192, "token": False}}),
    ],
)
def test_what_only_sounds_like_a_credential_is_accepted(tmp_path, job_tables, table, keys):
    parse_job(job_tables(**{table: keys}), base=tmp_path, where="job.toml")


@pytest.mark.parametrize(
    ("table", "key", "value", "problem"),
    [
        ("input", "path", "a\0b", "input.path: holds a NUL character, expected text"),
        ("prompt", "user", "\ud800", "prompt.user: holds a lone surrogate, expected text"),
        ("output", "path", "x" * 300, "is too long for a path (300 bytes)"),
        ("input", "path", ["a/" * 3000], "is too long for a path (6000 bytes)"),
        ("input", "path", "~no-such-user/x", "there is no such user"),
        ("run", "flush_rows", 10**30, "run.flush_rows: "),
    ],
)
def test_what_no_file_system_takes_is_told_before_one_is_asked(
    tmp_path, job_tables, table, key, value, problem
):
    (found,) = problems(tmp_path, job_tables(**{table: {key: value}}))
    assert found.startswith(f"{table}.{key}: ")
    assert problem in found


def nested(levels, *, is_list=False):
    value = 1
    for _ in range(levels):
        value = [value] if is_list else {"a": value}
    return value


@pytest.mark.parametrize("is_list", [True, False])
@pytest.mark.parametrize("levels", [110, 900, 100_000])
@pytest.mark.parametrize("table", ["prompt.chat_template_kwargs", "model.engine", "output.schema"])
def test_tables_far_inside_each_other_are_refused_wherever_they_stand(
    tmp_path, job_tables, table, levels, is_list
):
    name, key = table.split(".")
    value = nested(levels, is_list=is_list)
    (found,) = problems(tmp_path, job_tables(**{name: {key: {"x": value}}}))
    assert "inside each other" in found or "maximum recursion depth" in found
    assert len(found) < 300


def test_files_that_nest_far_are_refused(tmp_path, job_tables):
    for levels in (110, 100_000):
        (tmp_path / "s.json").write_text('{"a":' * levels + "1" + "}" * levels)
        (tmp_path / "t.json").write_text("[" * levels + "]" * levels)
        tables = job_tables(output={"schema": "s.json"}, prompt={"tools_file": "t.json"})
        schema, tools = problems(tmp_path, tables)
        assert schema.startswith("output.schema")
        assert tools.startswith("prompt.tools_file")


@pytest.mark.parametrize(
    "text",
    ["a = " + "9" * 5000, "a = " + "[" * 5000, "a = 1979-13-99", "\ufeff= 1", 'a = "\\ud800"'],
)
def test_toml_that_breaks_the_parser_is_refused(job_file, text):
    with pytest.raises(ConfigError, match="is not TOML"):
        load_job(job_file(text))


def test_files_that_answers_depend_on_are_read(make_job, tmp_path):
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"a": {}}}')
    (tmp_path / "e.jsonl").write_text('{"user": "q", "assistant": {"a": 1}}\n\n')
    (tmp_path / "t.json").write_text('[{"type": "function"}]')
    made = make_job(
        output={"schema": "s.json"},
        prompt={"examples_file": "e.jsonl", "tools_file": "t.json"},
        model={"lora": {"x": "adapters/x"}},
    )
    assert made.output.json_schema == {"type": "object", "properties": {"a": {}}}
    (example,) = made.prompt.examples
    assert (example.user, example.assistant) == ("q", {"a": 1})
    assert (made.prompt.examples_file, made.prompt.tools) == (None, [{"type": "function"}])
    assert made.model.lora == {"x": str(tmp_path / "adapters/x")}


def test_files_that_cannot_be_used_are_all_named(make_job, tmp_path):
    (tmp_path / "s.json").write_text("[]")
    (tmp_path / "e.jsonl").write_text('{"user": "q"}\n')
    with pytest.raises(ConfigError) as caught:
        make_job(
            output={"schema": "s.json"},
            prompt={"examples_file": "e.jsonl", "tools_file": "none.json"},
        )
    schema, tools, examples = caught.value.problems
    assert schema == "output.schema: expected a JSON object that is a JSON Schema"
    assert tools.startswith("prompt.tools_file: ")
    assert "e.jsonl:1: Field required; expected" in examples


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (r'"\ud800"', "holds a lone surrogate, expected text"),
        (r'"a\u0000"', "holds a NUL character, expected text"),
        ("NaN", "holds nan, expected a finite number"),
        ("-1e999", "holds -inf, expected a finite number"),
    ],
)
def test_what_files_hold_is_checked_as_the_job_file_is(make_job, tmp_path, text, why):
    (tmp_path / "s.json").write_text(f'{{"properties": {{"a": {{"enum": [1, {text}]}}}}}}')
    (tmp_path / "t.json").write_text(f'[{{}}, {{"function": {text}}}]')
    (tmp_path / "e.jsonl").write_text(
        f'{{"user": "q", "assistant": "a"}}\n{{"user": "q", "assistant": {{"x": {text}}}}}\n'
    )
    with pytest.raises(ConfigError) as caught:
        make_job(
            output={"schema": "s.json"},
            prompt={"examples_file": "e.jsonl", "tools_file": "t.json"},
        )
    schema, tools, examples = caught.value.problems
    assert schema == f"output.schema.properties.a.enum[1]: {why}"
    assert tools == f"prompt.tools_file[1].function: {why}"
    assert examples.startswith(f"prompt.examples_file: {tmp_path}/e.jsonl:2: ")
    if "surrogate" not in why:  # The parser has words of its own for these.
        assert examples.endswith(f": assistant.x: {why}")


def test_keys_of_a_file_are_checked_too(make_job, tmp_path):
    (tmp_path / "s.json").write_text(r'{"properties": {"\ud800": {}}}')
    with pytest.raises(
        ConfigError, match=r"output\.schema\.properties\.'.*': holds a lone surrogate"
    ):
        make_job(output={"schema": "s.json"})


def test_a_template_file_that_holds_a_nul_is_refused(make_job, tmp_path):
    (tmp_path / "p.txt").write_text("{{ text }}\0")
    with pytest.raises(ConfigError, match=r"prompt\.user_file: holds a NUL character"):
        make_job(prompt={"user": None, "user_file": "p.txt"})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_examples_end_at_line_feeds_alone(make_job, tmp_path, end):
    texts = ["a\u2028b", "c\x85d", "e"]
    lines = [f'{{"user": "{text}", "assistant": "x"}}{end}' for text in texts]
    (tmp_path / "e.jsonl").write_bytes("".join(lines).encode())
    made = make_job(prompt={"examples_file": "e.jsonl"})
    assert [example.user for example in made.prompt.examples] == texts


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "path = tickets.jsonl",
            r"'path = tickets.jsonl'; a text needs quotes: path = \"tickets.jsonl\"",
        ),
        ("path = a b # why", r"'path = a b # why'; a text needs quotes: path = \"a b\""),
        ('path = "x', "'path = \"x'"),
        ("api_key = hf_abcdefghijklmnopqrstuvwxyz0123456789", r"\(not shown\)"),
    ],
)
def test_a_line_that_is_no_toml_is_shown(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f"[input]\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"is not TOML: .*\(at line 2, .*\): {told}$") as caught:
        load_job(path)
    assert "hf_abc" not in str(caught.value)


def test_a_schema_that_is_json_text_is_told(tmp_path: Path) -> None:
    tables = {"output": {"path": "out", "schema": ' {"type": "object"}'}}
    with pytest.raises(ConfigError, match=r"output\.schema: looks like JSON text"):
        parse_job(tables_of_job(**tables), base=tmp_path, where="job.toml")


@pytest.mark.parametrize(
    ("key", "meant"),
    [("output.dir", "path"), ("model.model", "name"), ("sampling.temp", "temperature")],
)
def test_a_key_that_others_call_so_is_known(tmp_path: Path, key: str, meant: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{re.escape(key)}: unknown key, did you mean '{meant}'"
    ):
        parse_job(tables_of_job(), base=tmp_path, where="job.toml", overrides=[f"{key}=x"])


def test_a_model_that_is_a_url_is_told_of_servers(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    model = {"backend": "vllm", "name": "http://10.0.0.5:8000/v1"}
    job = parse_job(tables_of_job(model=model), base=tmp_path, where="job.toml")
    with pytest.raises(ConfigError, match=r"model\.backend = 'openai' and model\.base_url"):
        prepare(job)
