"""Models and chat templates that every row of a job would fail with: refused before any start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchgen.cli import look
from batchgen.core.errors import ConfigError
from batchgen.engine.vllm.encoder import ChatTemplate
from batchgen.job.load import parse_job
from batchgen.pipeline.prepare import check

SAMPLE = Path(__file__).parents[2] / "sample_data" / "model"
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURNS
)
STRICT_TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% endfor %}" + TURNS
)
ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('One turn only') }}{% endif %}" + TURNS
USER = {"user": "{{ text }}"}
EXAMPLES = {"examples": [{"user": "q", "assistant": "a"}]}


@pytest.fixture
def model(tmp_path):
    """A model's folder of one's own, with another chat template or none."""

    def make(template=None, *, config=None, tokenizer=None, **files):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in SAMPLE.iterdir():
            if not path.name.startswith("chat_template"):
                (folder / path.name).symlink_to(path)
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            if changes is not None:
                old = json.loads((folder / name).read_bytes())
                (folder / name).unlink()
                (folder / name).write_text(json.dumps({**old, **changes}))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(json.dumps(content))
        return folder

    return make


def job_of(folder, prompt=USER, **tables):
    tables = {
        "input": {"path": "in.jsonl"},
        "prompt": prompt,
        "model": {"name": str(folder), **tables.pop("model", {})},
        "sampling": {"max_tokens": 8},
        "output": {"path": "out"},
        **tables,
    }
    return parse_job(tables, base=folder.parent, where="job.toml")


def why_refused(folder, *args, **tables):
    with pytest.raises(ConfigError) as caught:
        check(job_of(folder, *args, **tables))
    assert int(caught.value.exit_code) == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "prompt", "why", "advice"),
    [
        (NO_SYSTEM, {**USER, "system": "S"}, "System role not supported", "prompt.system says"),
        (STRICT_TURNS, {**USER, "system": "S"}, "roles must alternate", "prompt.system says"),
        (
            STRICT_TURNS,
            {**USER, "system": "S", **EXAMPLES},
            "roles must alternate",
            "prompt.system says",
        ),
        (ONE_TURN, {**USER, **EXAMPLES}, "One turn only", "write prompt.examples"),
        ("{{ raise_exception('Never') }}", USER, "Never", "set prompt.chat_template_file"),
    ],
)
def test_a_template_that_refuses_the_jobs_roles(model, template, prompt, why, advice):
    text = why_refused(model(template), prompt)
    assert f"the model's chat template refuses every row: {why}" in text.replace(
        "Conversation ", ""
    )
    assert advice in text
    # The same from where else a template can stand.
    named = {"name": "default", "template": template}
    for place in (template, [named], {"default": template}):
        assert why in why_refused(model(tokenizer={"chat_template": place}), prompt)
    folder = model(TURNS)
    (folder.parent / "own.jinja").write_text(template)
    assert why in why_refused(folder, {**prompt, "chat_template_file": "own.jinja"})


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (NO_SYSTEM, USER),
        (NO_SYSTEM, {**USER, **EXAMPLES}),
        (STRICT_TURNS, {**USER, **EXAMPLES}),
        (NO_SYSTEM, {"messages": "chat"}),
        (TURNS, {**USER, "system": "S", **EXAMPLES}),
        (None, {"text": "text"}),
        # What transformers has beside Jinja.
        (
            "{% generation %}{{ messages|tojson(ensure_ascii=false) }}{%- endgeneration -%}"
            "{{ bos_token }}{{ strftime_now('%Y') }}{% for m in messages %}{% break %}{% endfor %}",
            USER,
        ),
        # Whether these are errors there, too, the engine says.
        ("{{ no.such.thing }}", USER),
        ("{% unknown_tag %}", USER),
    ],
)
def test_a_job_that_its_template_takes(model, template, prompt):
    check(job_of(model(template), prompt))


@pytest.mark.parametrize("prompt", [USER, {"messages": "chat"}, {**USER, "system": "S"}])
def test_a_base_model_without_a_template(model, prompt):
    text = why_refused(model(), prompt)
    assert "has no chat template (a base model?)" in text
    assert "set prompt.chat_template_file, or give whole prompts with prompt.text" in text
    folder = model()
    (folder.parent / "own.jinja").write_text(TURNS)
    check(job_of(folder, {**prompt, "chat_template_file": "own.jinja"}))


def test_a_tokenizer_of_another_kind_is_left_to_the_engine(model):
    for files in ({"tekken__json": {}}, {"chat_template__json": {"chat_template": TURNS}}):
        check(job_of(model(**files)))
    check(job_of(model(tokenizer={"auto_map": {"AutoTokenizer": ["x", None]}})))
    check(job_of(model(config={"vision_config": {}})))
    check(job_of(model(), model={"engine": {"tokenizer_mode": "mistral"}}))


def test_a_chat_template_file_that_is_no_template(model):
    folder = model(TURNS)
    (folder.parent / "own.jinja").write_text("\n{% for %}")
    text = why_refused(folder, {**USER, "chat_template_file": "own.jinja"})
    assert text.startswith("prompt.chat_template_file: line 2: ")


POOLING = {"modules__json": [{"idx": 1, "type": "sentence_transformers.models.Pooling"}]}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"architectures": ["XLMRobertaModel"]}, {}),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, {}),
        ({"architectures": ["BertForMaskedLM"]}, {}),
        ({"architectures": ["Qwen3ForCausalLM"]}, POOLING),
    ],
)
def test_a_model_that_generates_no_text(model, config, files):
    folder = model(TURNS, config=config, **files)
    assert "makes embeddings or scores and generates no text" in why_refused(folder)
    assert "generates no text" in why_refused(folder, {"text": "text"})
    check(job_of(folder, model={"engine": {"runner": "generate"}}))
    pooling = {"engine": {"runner": "pooling"}}
    assert "model.engine.runner: 'pooling' generates" in why_refused(folder, model=pooling)


@pytest.mark.parametrize(
    "names",
    [["Qwen3ForCausalLM"], ["ChatGLMModel"], ["InternVLChatModel"], ["GPT2LMHeadModel"], []],
)
def test_a_model_that_generates(model, names):
    check(job_of(model(TURNS, config={"architectures": names})))


JOB = """
[input]
path = "in.jsonl"
[prompt]
messages = "chat"
[model]
name = "model"
[sampling]
max_tokens = 8
[output]
path = "out"
"""


def test_check_tells_rows_that_a_template_refuses_from_jobs(model, tmp_path):
    model(NO_SYSTEM)
    good = [{"role": "user", "content": "hi"}]
    bad = [{"role": "system", "content": "S"}, *good]
    (tmp_path / "job.toml").write_text(JOB)

    def checked(*chats):
        lines = [json.dumps({"chat": chat}) for chat in chats]
        (tmp_path / "in.jsonl").write_text("\n".join(lines))
        found = CliRunner().invoke(look.check, [str(tmp_path / "job.toml")])
        error = found.exception
        return int(error.exit_code) if error else 0, f"{found.output}{error}"

    code, text = checked(bad, good)
    assert code == 0
    assert "chat_template_error: System role not supported" in text
    code, text = checked(bad, bad)
    assert code == 2
    assert "none of the 2 row(s) shown has a prompt" in text


def test_templates_see_what_transformers_gives_them():
    seen = "{% if tools is none and documents is none and add_generation_prompt and x == 1 %}"
    seen += "{{ raise_exception(messages[0].content|tojson) }}{% endif %}"
    variables = {"tools": None, "documents": None, "add_generation_prompt": True, "x": 1}
    chat = [{"role": "user", "content": [{"type": "text", "text": "é<"}]}]
    assert ChatTemplate(seen, variables).refusal(chat) == '"é<"'
