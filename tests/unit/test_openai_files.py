"""OpenAI's batch files, in and out: each line has one line of an answer, or of an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

import batchgen
from batchgen.cli.batch import _model
from batchgen.core.errors import ConfigError
from batchgen.job.load import parse_job
from batchgen.prompt.requests import RowOptions
from batchgen.views.batch_files import ERRORS, MARK, OUTPUT

WRITTEN = Path(__file__).parents[1] / "data" / "openai-batches"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SAID = [{"role": "user", "content": "hello"}]


def line(custom_id: str | None = "a", url: str = CHAT, **changes: Any) -> dict[str, Any]:
    body = {"messages": SAID} if url == CHAT else {"prompt": "Once upon"}
    body |= {"model": "tiny", "max_tokens": 64, "temperature": 0, **changes.pop("body", {})}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **changes}


def job_of(folder: Path, **tables: dict[str, Any]) -> dict[str, Any]:
    return {
        "input": {"path": str(folder / "in.jsonl"), "format": "openai"},
        "model": {"backend": "echo", "name": "models/tiny"},
        "output": {"path": str(folder / "out"), "openai": True},
        **tables,
    }


def answered(folder: Path, lines: list[Any], **tables: Any) -> tuple[list[Any], list[Any]]:
    """Run a batch file of these lines; return its answers and its errors."""
    texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
    (folder / "in.jsonl").write_text("\n".join(texts) + "\n")
    batchgen.run(job_of(folder, **tables))
    out = folder / "out"
    return tuple(
        [json.loads(row) for row in (out / n).read_text().splitlines()] for n in (OUTPUT, ERRORS)
    )


def test_answers_are_those_of_the_api(tmp_path: Path) -> None:
    lines = [
        line("a"),
        line("b", COMPLETION, body={"max_tokens": 4}),
        line("c", body={"user": "me"}),
    ]
    answers, errors = answered(tmp_path, lines)
    assert errors == []
    assert [one["custom_id"] for one in answers] == ["a", "b", "c"]
    assert len({one["id"] for one in answers}) == 3
    assert {one["response"]["status_code"] for one in answers} == {200}
    chat = ChatCompletion.model_validate(answers[0]["response"]["body"], strict=True)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("hello", "stop")
    assert (chat.model, chat.usage.total_tokens) == ("tiny", 10)
    cut = Completion.model_validate(answers[1]["response"]["body"], strict=True)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("Once", "length")


GUIDES = """
{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny", "messages": [{"role": "system", "content": "Be helpful."}, {"role": "user", "content": "Hello!"}], "max_tokens": 1000}}
{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny", "messages": [{"role": "system", "content": "Be of no help."}, {"role": "user", "content": "Hello!"}], "max_completion_tokens": 1000}}
"""  # noqa: E501 - a line each, of the forms that OpenAI's guide and vLLM's example have


def test_files_of_guides_and_of_other_tools_run(tmp_path: Path) -> None:
    # Of distilabel 1.5.3: OpenAILLM._create_jsonl_buffers, as offline_batch_generate calls it.
    written = (WRITTEN / "distilabel-1.5.3.jsonl").read_text().splitlines()
    answers, errors = answered(tmp_path, [*GUIDES.strip().splitlines(), *written])
    assert (len(answers), errors) == (4, [])
    for one in answers:
        ChatCompletion.model_validate(one["response"]["body"], strict=True)


def test_embeddings_are_those_of_the_api(tmp_path: Path) -> None:
    url = "/v1/embeddings"
    asked = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "tiny"}}
    lines = [
        {**asked, "body": {"model": "tiny", "input": "hello", "encoding_format": "float"}},
        {**asked, "custom_id": "b", "body": {"model": "tiny", "input": ["again"]}},
        {**asked, "custom_id": "c", "body": {"model": "tiny", "input": ["two", "texts"]}},
        {**asked, "custom_id": "d", "body": {"model": "tiny", "input": "x", "temperature": 0}},
        line("e"),
    ]
    answers, errors = answered(tmp_path, lines, task="embed")
    found = [CreateEmbeddingResponse.model_validate(one["response"]["body"]) for one in answers]
    assert [len(one.data[0].embedding) for one in found] == [384, 384]
    assert found[0].usage.total_tokens == 6
    codes = [one["response"]["body"]["error"]["code"] for one in errors]
    assert codes == ["invalid_type", "unknown_parameter", "invalid_url"]


def test_scores_and_ranks_are_those_of_vllms_server(tmp_path: Path) -> None:
    texts = ["Paris", "Rome", "Ulm"]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/score", {"text_1": "who?", "text_2": "me"}),
        ("/score", {"queries": "who?", "documents": ["me"]}),
        ("/v1/score", {"data_1": "who?", "data_2": texts}),
        ("/v1/rerank", {"query": "who?", "documents": texts, "top_n": 0}),
        ("/v2/rerank", {"query": "who?", "documents": ["Ulm"]}),
        ("/rerank", {"query": "who?", "documents": [{"text": "Ulm"}]}),
        ("/rerank", {"query": "who?", "documents": []}),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d"]}),
        ("/v1/rerank", {"query": "who?", "documents": texts, "top_n": 1}),
    ]
    asked = {"method": "POST"}
    lines = [
        {**asked, "custom_id": str(at), "url": url, "body": {"model": "tiny", **body}}
        for at, (url, body) in enumerate(bodies)
    ]
    answers, errors = answered(tmp_path, lines, task="score")
    found = [one["response"]["body"] for one in answers]
    assert found[0]["data"] == found[1]["data"]
    assert [(one["object"], type(one["score"])) for one in found[0]["data"]] == [("score", float)]
    assert [one["index"] for one in found[2]["data"]] == [0, 1, 2]
    ranked = found[3]["results"]
    scores = {one["index"]: one["relevance_score"] for one in ranked}
    assert [scores[at] for at in range(3)] == [one["score"] for one in found[2]["data"]]
    assert [one["index"] for one in ranked] == sorted(scores, key=lambda at: -scores[at])
    assert len(found[4]["results"]) == 1
    assert [one["custom_id"] for one in errors] == ["5", "6", "7", "8"]


WEATHER = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}}
WEATHER |= {"$defs": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


def of_tools(custom_id: str, text: str, choice: Any, **body: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": text}]
    return line(custom_id, body={"messages": said, "tools": TOOLS, "tool_choice": choice, **body})


def test_a_line_may_have_a_tool_called(tmp_path: Path) -> None:
    called = '[{"name": "weather", "parameters": {"city": "Ulm"}}]'
    named = {"type": "function", "function": {"name": "weather"}}
    lines = [
        of_tools("named", '{"city": "Ulm"}', named),
        of_tools("required", called, "required"),
        of_tools("several", called, "required", n=2),
        of_tools("cut", called, "required", max_tokens=3),
        of_tools("none", "hello", "none"),
        of_tools("auto", "hello", "auto"),
        of_tools("usual", "hello", None),
        of_tools("other", "hello", {"type": "function", "function": {"name": "time"}}),
        of_tools("both", "hello", named, response_format={"type": "json_object"}),
        of_tools("odd", "hello", "none", tools=[{"type": "web_search"}]),
        of_tools("one by one", "hello", "none", parallel_tool_calls=False),
        line("of nothing", body={"tool_choice": "required"}),
    ]
    answers, errors = answered(tmp_path, lines)
    found = [ChatCompletion.model_validate(one["response"]["body"]) for one in answers]
    choices = {a["custom_id"]: one.choices for a, one in zip(answers, found, strict=True)}
    assert list(choices) == ["named", "required", "several", "cut", "none"]
    (call,) = choices["named"][0].message.tool_calls or ()
    assert call.function.arguments == '{"city": "Ulm"}'
    assert choices["named"][0].finish_reason == "stop"
    calls = [one.message.tool_calls for one in [*choices["required"], *choices["several"]]]
    assert [one.function.name for several in calls for one in several or ()] == ["weather"] * 3
    assert len({one.id for several in calls for one in several or ()}) == 3
    assert {one.finish_reason for one in choices["several"]} == {"tool_calls"}
    cut, none = choices["cut"][0], choices["none"][0]
    told = (cut.message.content, cut.message.tool_calls, cut.finish_reason)
    assert told == ('[{"', None, "length")
    assert none.message.content == "hello"
    codes = [one["response"]["body"]["error"]["code"] for one in errors]
    assert codes == [
        *["unsupported_parameter"] * 2,
        "invalid_value",
        "unsupported_parameter",
        "invalid_value",
        "unsupported_parameter",
        "invalid_value",
    ]


def test_adapters_are_given_as_vllm_takes_them() -> None:
    form = json.dumps({"name": "b", "path": "/b"})
    words = ["--lora-modules", "a=/a", form, "--served-model-name=x", "--no-enable-log-requests"]
    model = _model("tiny", [*words, "--enable-auto-tool-choice", "--tool-call-parser", "hermes"])
    assert model["lora"] == {"a": "/a", "b": "/b"}
    assert (model["tool_call_parser"], model["name"]) == ("hermes", "tiny")
    assert model["engine"] == {"served_model_name": "x", "enable_log_requests": False}


def test_a_line_may_ask_for_several_answers(tmp_path: Path) -> None:
    lines = [
        line("chat", body={"n": 3, "temperature": 1}),
        line("text", COMPLETION, body={"n": 2, "temperature": 1, "max_tokens": 3}),
        line("one", body={"n": 1}),
        line("none", body={"n": 0}),
        line("odd", body={"top_logprobs": 2}),
    ]
    answers, errors = answered(tmp_path, lines)
    bodies = [one["response"]["body"] for one in answers]
    chat, text = ChatCompletion.model_validate(bodies[0]), Completion.model_validate(bodies[1])
    assert chat.choices[0].message.content == "hello"
    assert [one.index for one in chat.choices] == [0, 1, 2]
    assert [one.finish_reason for one in text.choices] == ["length", "length"]
    assert len(bodies[2]["choices"]) == 1
    codes = [one["response"]["body"]["error"]["code"] for one in errors]
    assert codes == ["invalid_value", "invalid_value"]


REFUSED = {
    "invalid_json_line": "not json",
    "missing_required_parameter": line(None),
    "invalid_method": line(method="GET"),
    "invalid_url": line(url="/v1/audio/speech", body={"prompt": "x"}),
    "invalid_type": line(body={"messages": "hello"}),
    "model_not_found": line(body={"model": "gpt-5"}),
    "unknown_parameter": line(body={"chat_template": "{{ 1 }}"}),
    "unsupported_parameter": line(body={"stream": True}),
    "invalid_response_format": line(body={"response_format": {"type": "json_schema"}}),
    "invalid_value": line(body={"temperature": -1}),
    "invalid_messages": line(body={"messages": [{"content": "hello"}]}),
    "invalid_schema": line(
        body={"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}
    ),
    "bad_image": line(
        body={
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                }
            ]
        }
    ),
}


def test_what_is_not_taken_is_that_lines_error(tmp_path: Path) -> None:
    lines = [line("good"), *REFUSED.values(), line("good"), "[1]", line("last")]
    answers, errors = answered(tmp_path, lines)
    assert [one["custom_id"] for one in answers] == ["good", "last"]
    codes = [one["response"]["body"]["error"]["code"] for one in errors]
    assert codes == [*REFUSED, "duplicate_custom_id", "invalid_json_line"]
    statuses = {one["response"]["status_code"] for one in errors}
    assert statuses == {400, 404}
    assert str(tmp_path) not in json.dumps(errors)


NOT_TAKEN = ("unknown_parameter", "unsupported_parameter", "invalid_value")
LOADS = (
    *("chat_template", "chat_template_kwargs", "mm_processor_kwargs", "vllm_xargs", "documents"),
    *("guided_json", "add_generation_prompt", "cache_salt", "kv_transfer_params", "tools"),
)


@pytest.mark.parametrize("name", LOADS)
def test_a_body_chooses_nothing_that_loads_or_runs(tmp_path: Path, name: str) -> None:
    answers, errors = answered(tmp_path, [line(body={name: {"x": "{{ cycler }}"}})])
    assert answers == []
    assert errors[0]["response"]["body"]["error"]["code"] in NOT_TAKEN


def test_a_line_has_its_own_seed_and_its_own_schema(tmp_path: Path) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    lines = [line(str(seed), body={"temperature": 1, "seed": seed}) for seed in (1, 1, 2)]
    lines += [line("form", body={"response_format": form}), line("text")]
    lines[1]["custom_id"] = "again"
    answered(
        tmp_path, lines, output={"path": str(tmp_path / "out"), "openai": True, "with_seed": True}
    )
    rows = batchgen.read(tmp_path / "out").collect()
    assert rows["gen_seed"].to_list() == [1, 1, 2, None, None]
    keys = rows["gen_request_key"].to_list()
    assert keys[0] == keys[1]
    assert len({*keys}) == 4


def test_a_line_names_one_of_several_adapters(tmp_path: Path) -> None:
    adapters = {"legal": str(tmp_path / "a"), "poem": str(tmp_path / "b")}
    model = {"backend": "echo", "name": "tiny", "lora": adapters}
    job = parse_job(job_of(tmp_path, model=model), base=tmp_path, where="job")
    own = RowOptions(job)
    asked = [own.of({"model": name}, str) for name in ("tiny", "legal", "poem", "other")]
    assert [one.lora for one in asked[:3]] == [None, "legal", "poem"]
    assert asked[3].error_type == "model_not_found"


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_files_as_windows_and_editors_leave_them(tmp_path: Path, begin: bytes) -> None:
    lines = [json.dumps(line("a")), "", json.dumps(line("b"))]
    (tmp_path / "in.jsonl").write_bytes(begin + "\r\n".join(lines).encode())
    batchgen.run(job_of(tmp_path))
    told = (tmp_path / "out" / OUTPUT).read_text().splitlines()
    assert [json.loads(one)["custom_id"] for one in told] == ["a", "b"]


def test_the_files_are_those_of_the_newest_snapshot(tmp_path: Path) -> None:
    answered(tmp_path, [line("a")])
    answers, _ = answered(tmp_path, [line("a"), line("b")])
    assert len(answers) == 2
    out = tmp_path / "out"
    for harm in ((out / ERRORS).unlink, (out / MARK).unlink):
        (out / OUTPUT).write_text("of an older night\n")
        harm()
        batchgen.run(job_of(tmp_path))  # Nothing to do but this.
        assert len((out / OUTPUT).read_text().splitlines()) == 2


def test_a_batch_file_is_told_by_its_first_line_where_a_job_has_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(line()).encode() + b"\n")
    tables = {key: value for key, value in job_of(tmp_path).items() if key != "input"}
    tables |= {"input": {"path": "in.jsonl"}}
    assert parse_job(tables, base=tmp_path, where="job").asks_by_line
    asked = {**tables, "prompt": {"user": "{{ body }}"}, "sampling": {"max_tokens": 9}}
    asked["output"] = {"path": "out"}
    assert parse_job(asked, base=tmp_path, where="job").input.format is None
    for text in ('{"custom_id": "a", "text": "b"}', "[1]", "not JSON", ""):
        path.write_text(text + "\n")
        with pytest.raises(ConfigError, match="prompt"):
            parse_job(tables, base=tmp_path, where="job")
    path.unlink()
    with pytest.raises(ConfigError, match="prompt"):
        parse_job({**tables, "input": {"path": [7]}}, base=tmp_path, where="job")


def test_the_output_is_for_such_a_file_only(tmp_path: Path, job_tables: Any) -> None:
    with pytest.raises(ConfigError, match=r"input\.format = 'openai'"):
        batchgen.run(job_tables(output={"openai": True}))
    (tmp_path / "in.jsonl").write_text(json.dumps(line()) + "\n")
    given = {"path": str(tmp_path / "in.jsonl"), "format": "openai", "types": {"x": "json"}}
    with pytest.raises(ConfigError, match=r"input\.types"):
        batchgen.run(job_of(tmp_path, input=given))
