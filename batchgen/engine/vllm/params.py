"""What a job asks of vLLM, in vLLM's own objects: sampling, grammars, adapters, a tokenizer.

Only for `vllm.py`, in the engine's process, after it has prepared the environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from batchgen.core.errors import ConfigError, EngineError, one_line
from batchgen.core.records import EngineSpec
from batchgen.engine.vllm.settings import LABEL_TOKENS

MAX_VARIANTS = 64
"""Rungs of a retry ladder, say; each more than that is built anew when it comes again."""
BACKENDS = ("xgrammar", "guidance")
"""In the order tried. Both are in every vLLM wheel, and say beforehand what they cannot do."""
WHERE = "output"
WHERE_GIVEN = "model.engine"
SOURCE_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
"""What xgrammar writes before an error's text."""


def load_tokenizer(spec: EngineSpec) -> Any:
    """Load a tokenizer for us alone, the way that vLLM loads its own.

    vLLM's loader and not `AutoTokenizer`: it corrects the class for some model types
    (vllm/tokenizers/registry.py, 0.32) and knows `tokenizer_mode`.
    """
    from vllm.tokenizers import get_tokenizer

    kwargs = spec.model_kwargs
    tokenizer = get_tokenizer(
        kwargs.get("tokenizer") or spec.model,
        tokenizer_mode=kwargs.get("tokenizer_mode", "auto"),
        trust_remote_code=kwargs.get("trust_remote_code", False),
        revision=kwargs.get("tokenizer_revision"),
    )
    fast: Any = getattr(tokenizer, "_tokenizer", None)
    if hasattr(fast, "encode_batch_fast"):
        # tokenizer.json may switch both on; an offline prompt is never cut or filled silently.
        fast.no_truncation()
        fast.no_padding()
    return tokenizer


class Sampling:
    """The job's SamplingParams, and those of requests that want something else."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Build the job's.

        Args:
            fields: SamplingParams fields; `structured_outputs` may be a mapping.

        Raises:
            Exception: vLLM's own; a value is wrong.
        """
        self._fields = fields
        self.default = build_params(fields)
        self._variant = lru_cache(MAX_VARIANTS)(self._build)

    def of(self, params: Mapping[str, Any] | None) -> Any:
        """Return the job's with `params` over them; shared, so not to be changed.

        Raises:
            Exception: vLLM's own, or of JSON: a value is wrong.
        """
        if params is None:
            return self.default
        # Not sorted: a model answers in the order of the schema's properties.
        return self._variant(json.dumps(params))

    def _build(self, text: str) -> Any:
        return build_params({**self._fields, **json.loads(text)})


def job_fields(llm: Any, spec: EngineSpec) -> dict[str, Any]:
    """Overlay the job's sampling on the model's own (generation_config.json).

    Explicit `SamplingParams` inherit nothing of the model's but its end tokens
    (vllm/entrypoints/llm.py, get_default_sampling_params, 0.26 to 0.33).
    """
    return {**(llm.model_config.get_diff_sampling_param() or {}), **spec.sampling_params}


def build_params(fields: Mapping[str, Any]) -> Any:
    """Build SamplingParams; `structured_outputs` may be a mapping.

    Raises:
        Exception: vLLM's own; a value is wrong.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    fields = dict(fields)
    if isinstance(structured := fields.get("structured_outputs"), Mapping):
        if isinstance(schema := structured.get("json"), Mapping):
            # As the core will write it, for every request (structured_output/request.py).
            structured = {**structured, "json": json.dumps(schema)}
        fields["structured_outputs"] = StructuredOutputsParams(**structured)
    # FINAL_ONLY: `add_request` leaves it CUMULATIVE, which costs twice and returns every step.
    params = SamplingParams.from_optional(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
    # A shallow copy for each request: what vLLM adds to the sets that its copies then share, the
    # model's own end tokens, is the same every time (sampling_params.py, 0.26 to 0.33).
    params.skip_clone = True
    return params


def label_fields(spec: EngineSpec) -> dict[str, Any]:
    """SamplingParams fields for `logprobs = "labels"`: all tokens that a choice can begin with.

    Source:
        SamplingParams.logprob_token_ids, and `logprobs`, which has to be their number: vllm/
        sampling_params.py, _validate_logprobs, 0.32.

    Raises:
        ConfigError: There are too many.
    """
    if spec.sampling_params.get("logprobs") != "labels":
        return {}
    labels, tokenizer = spec.sampling_params["structured_outputs"]["choice"], load_tokenizer(spec)
    begun = {label[:stop] for label in labels for stop in range(1, len(label) + 1)}
    ids = [at for at in range(tokenizer.vocab_size) if tokenizer.decode([at]) in begun]
    if len(ids) > LABEL_TOKENS:
        problem = f"the labels can begin with {len(ids)} tokens, vLLM lists {LABEL_TOKENS} at most"
        raise ConfigError("sampling.logprobs", [f"{problem}; give a number, of the likeliest"])
    return {"logprobs": len(ids), "logprob_token_ids": ids}


def likelihood_params() -> Any:
    """Build SamplingParams that ask for each prompt token's own log probability and rank."""
    fields = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
    params = build_params(fields)
    params.flat_logprobs = True  # A list for all tokens; else a dict for each.
    return params


def structured_outputs_config(spec: EngineSpec) -> Mapping[str, Any]:
    """Choose the grammar backend of the engine, and prove that it takes the job's grammar.

    Always one by name, also where only requests may bring grammars. vLLM's `auto` chooses for
    each request, but the engine compiles all of them with the backend of the first (vllm#43920;
    v1/structured_output/__init__.py, grammar_init, 0.26 to 0.33): a schema that xgrammar was
    found unfit for would be compiled by it all the same, and what it does not know it leaves
    out. With a name, a request's grammar is checked for that backend, and is that row's error.

    Whitespace in JSON stays the model's choice. `disable_any_whitespace` saves tokens, but a
    model that learnt `": "` and may not write it answers worse: the sample's went from 95 % right
    labels to 32 % (vLLM 0.32, xgrammar).

    Returns:
        vLLM's `structured_outputs_config`; what the job gives in `[model.engine]` stays.

    Raises:
        ConfigError: No backend takes the grammar. Told before a model is loaded; takes
            milliseconds, a regex that is too hard at most VLLM_REGEX_COMPILATION_TIMEOUT_S.
    """
    given = spec.model_kwargs.get("structured_outputs_config") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(WHERE_GIVEN, [f"structured_outputs_config = {given!r} is not a table"])
    fields = spec.sampling_params.get("structured_outputs")
    backend = str(given.get("backend") or _first_fit(fields))
    problem = grammar_problem(backend, fields) if backend in BACKENDS else None
    if problem is not None:
        raise _refusal(fields, [problem])
    return {"backend": backend, **given}


def _first_fit(fields: Mapping[str, Any] | None) -> str:
    problems: list[str] = []
    for backend in BACKENDS:
        if (problem := grammar_problem(backend, fields)) is None:
            return backend
        problems.append(problem)
    raise _refusal(fields, problems)


def _refusal(fields: Mapping[str, Any] | None, problems: list[str]) -> ConfigError:
    kind = next(iter(fields or ()), "structured_outputs")
    what = {"json": "JSON schema"}.get(kind, kind)
    text = f"vLLM cannot compile the {what}: {'; '.join(problems)}; leave that out of it"
    return ConfigError(WHERE, [text])


def grammar_problem(backend: str, fields: Mapping[str, Any] | None) -> str | None:
    """Say in one line why a backend does not take a grammar; None if it does.

    Source:
        vllm/sampling_params.py, SamplingParams._validate_structured_outputs, 0.26 to 0.33, which
        does the same for every request; it needs the model's configuration, this does not.
    """
    from vllm.v1.structured_output.backend_guidance import (
        has_guidance_unsupported_json_features,
        validate_guidance_grammar,
    )
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    if not fields:
        return None
    validate = {"xgrammar": validate_xgrammar_grammar, "guidance": validate_guidance_grammar}
    try:
        # A copy for each: xgrammar's check writes a choice down as a grammar.
        params = build_params({"structured_outputs": fields})
        validate[backend](params)
        schema = params.structured_outputs.json
    except Exception as exc:  # noqa: BLE001 - vLLM's and its backends' errors share no base class
        text = SOURCE_LINE.sub("", one_line(exc)).partition(": ")[2] or one_line(exc)
        return f"{backend}: {text}"
    if backend == "guidance" and schema is not None:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if has_guidance_unsupported_json_features(schema):
            return "guidance: the schema has patternProperties, which it leaves out"
    return None


def check_grammars_once(llm_engine: Any) -> None:
    """Have each grammar checked with the first request that brings it, not with every one.

    vLLM compiles it in the front end each time, only to see that it can: 0.05 ms for a small
    schema, 0.6 ms for a larger one, of 0.2 ms that a request takes otherwise (0.32, one core).
    Requests that share the object differ in their seeds only.

    Source:
        InputProcessor._validate_params, a function of the parameters: vllm/v1/engine/
        input_processor.py, 0.26 to 0.33. Where it is missing, nothing is changed.
    """
    processor = getattr(llm_engine, "input_processor", None)
    check = getattr(processor, "_validate_params", None)
    if processor is None or check is None:
        return
    checked: dict[int, tuple[Any, Any]] = {}

    def check_once(params: Any, *args: Any, **named: Any) -> Any:
        grammar = getattr(params, "structured_outputs", None)
        if grammar is None:
            return check(params, *args, **named)
        known, outcome = checked.get(id(grammar), (None, None))
        if known is not grammar:
            outcome = check(params, *args, **named)
            if len(checked) >= MAX_VARIANTS:
                checked.clear()
            checked[id(grammar)] = (grammar, outcome)
        return outcome

    processor._validate_params = check_once


def pass_to_reasoner(llm_engine: Any, chat_template_kwargs: Mapping[str, Any]) -> None:
    """Tell the core's reasoning parser how chats are rendered: whether there will be reasoning.

    A grammar binds only what follows the reasoning, and some parsers (deepseek_v3) know from
    these keywords alone. vLLM's server passes them on, its offline `add_request` cannot.

    Source:
        EngineCoreRequest.reasoning_parser_kwargs: vllm/v1/engine/async_llm.py, 0.26 to 0.33.
    """
    processor = getattr(llm_engine, "input_processor", None)
    process = getattr(processor, "process_inputs", None)
    if processor is None or process is None:
        return
    kwargs = {"chat_template_kwargs": dict(chat_template_kwargs)}

    def process_and_tell(*args: Any, **named: Any) -> Any:
        request = process(*args, **named)
        if hasattr(request, "reasoning_parser_kwargs"):
            request.reasoning_parser_kwargs = kwargs
        return request

    processor.process_inputs = process_and_tell


def lora_requests(loras: Mapping[str, str]) -> dict[str, Any]:
    """Give each adapter its vLLM request; their numbers count from 1."""
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(loras.items(), start=1)
    }


def load_loras(llm_engine: Any, requests: Mapping[str, Any]) -> None:
    """Load every adapter once: a bad one that a row brought would end vLLM's core.

    Raises:
        EngineError: vLLM cannot use one.
    """
    for name, request in requests.items():
        try:
            llm_engine.add_lora(request)
        except Exception as exc:
            raise EngineError(f"adapter {name!r} ({request.lora_path}): {one_line(exc)}") from exc
