"""What vLLM answered, as `records.Sample`: log probabilities, reasoning and tool calls.

Only for `vllm.py`, in the engine's process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from batchgen.core.errors import ConfigError, nearest, one_line
from batchgen.core.records import TOOLS, EngineSpec, Sample, TokenLogprobs
from batchgen.core.runtime import read_json

Params = Mapping[str, Any] | None

MIN_LOGPROB = math.log(1e-5)
"""Below it a token was no real alternative: under a grammar nearly all have none at all."""
PROMPT_END = 32
"""Tokens of a prompt that its answer's text may depend on; nearly always far fewer do."""
BYTE_MARK = "<0x"
WHERE = "model"
KEPT_IN_TEXT = ("skip_special_tokens", "spaces_between_special_tokens")
"""SamplingParams fields that parsers ask for: their marks are often special tokens."""


class ParserError(Exception):
    """A parser failed on an answer; of no use to any other."""


def prime_with_prompt_ends() -> None:
    """Let vLLM's detokenizer begin with the end of each prompt instead of all of it.

    It decodes the prompt once more with the first tokens of each answer, in the front end's only
    thread: with 780 tokens in and 8 out that was 72 % of the thread's time, and the GPU waited
    for it (H100, 0.6B model, vLLM 0.26; elsewhere 188 us a row instead of 8 us).

    Source:
        FastIncrementalDetokenizer.__init__, which reads the prompt for this alone: vllm/v1/
        engine/detokenizer.py, 0.26 to 0.33. Where it is missing, nothing is changed.
    """
    try:
        from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer as Fast
    except ImportError:
        return
    begin = Fast.__init__
    if getattr(begin, "sees_prompt_end", False):
        return

    def begin_with_end(self: Any, tokenizer: Any, request: Any) -> None:
        if request.prompt_token_ids is not None:
            skips = request.sampling_params.skip_special_tokens
            end = prompt_end(request.prompt_token_ids, tokenizer._tokenizer, skips=skips)
            request = copy(request)
            request.prompt_token_ids = end
        begin(self, tokenizer, request)

    begin_with_end.sees_prompt_end = True  # type: ignore[attr-defined]
    Fast.__init__ = begin_with_end


def prompt_end(token_ids: list[int], tokenizer: Any, *, skips: bool) -> list[int]:
    """Cut off what an answer's text cannot depend on.

    A tokenizer's decoder looks back to the beginning of a character, to that of a run of byte
    tokens (`<0x..>`: one bad byte spoils the run), and to whether there is text before, since
    the first text loses its blank. So the end holds text, and does not begin within such a run.

    Args:
        token_ids: Of the whole prompt.
        tokenizer: Of the tokenizers library.
        skips: Whether special tokens are no text.
    """
    num = PROMPT_END
    while num < len(token_ids):
        end = token_ids[-num:]
        text = tokenizer.decode(end, skip_special_tokens=skips)
        first = tokenizer.id_to_token(end[0]) or BYTE_MARK
        if text and not first.startswith(BYTE_MARK):
            return end
        num *= 2
    return token_ids


class AnswerReader:
    """Reads the outputs of one engine."""

    def __init__(
        self, tokenizer: Any, special_ids: frozenset[int], splitter: Splitter | None
    ) -> None:
        """Take what reading needs.

        Args:
            tokenizer: Only for tokens that vLLM has not decoded.
            special_ids: Token ids that end an answer or are otherwise no text of it.
            splitter: Splits a text into its parts; None where a text is an answer as it is.
        """
        self._decode: Callable[[list[int]], str] = tokenizer.decode
        self._special_ids = special_ids
        self._splitter = splitter

    def sampling_of(self, params: Params) -> Params:
        """Return a request's SamplingParams fields, with those that calls of its tools need."""
        if params is None or params.keys().isdisjoint(TOOLS):
            return params
        kept = self._splitter.kept(params) if self._splitter is not None else {}
        return {**kept, **{name: value for name, value in params.items() if name not in TOOLS}}

    def read(self, output: Any, num_logprobs: int | None, params: Params = None) -> list[Sample]:
        """Read a finished RequestOutput.

        Args:
            output: vLLM's RequestOutput.
            num_logprobs: `SamplingParams.logprobs` of its request.
            params: Of its request, for its own tools.

        Raises:
            ParserError: A parser failed on one of the answers.
        """
        answers = sorted(output.outputs, key=lambda answer: answer.index)
        if self._splitter is None and num_logprobs is None:
            return [
                Sample(answer.text, answer.finish_reason, num_tokens=len(answer.token_ids))
                for answer in answers
            ]
        prompt_ids = output.prompt_token_ids
        return [self._sample(answer, num_logprobs, prompt_ids, params) for answer in answers]

    def _sample(
        self, answer: Any, num_logprobs: int | None, prompt_ids: Sequence[int], params: Params
    ) -> Sample:
        logprobs = None
        if num_logprobs is not None and answer.logprobs is not None:
            logprobs = self.token_logprobs(answer.token_ids, answer.logprobs, num_logprobs)
        num = len(answer.token_ids)
        if self._splitter is None:
            return Sample(answer.text, answer.finish_reason, logprobs, num_tokens=num)
        split = self._splitter.split
        text, reasoning, calls = split(answer.text, answer.token_ids, prompt_ids, params)
        return Sample(text, answer.finish_reason, logprobs, reasoning, calls, num_tokens=num)

    def token_logprobs(
        self, token_ids: Sequence[int], positions: Sequence[Mapping[int, Any]], num_logprobs: int
    ) -> list[TokenLogprobs]:
        """Turn vLLM's log probabilities into ours.

        With vLLM's default `logprobs_mode`, raw_logprobs, they are of the model's distribution
        before penalties, temperature and top_p, but after the grammar's mask: both runners apply
        that to the logits before the sampler takes its copy (apply_grammar_bitmask in
        v1/worker/gpu_model_runner.py and v1/worker/gpu/model_runner.py; v1/sample/sampler.py,
        forward; 0.26 to 0.33). Seen on 0.32, CPU: the probabilities of the first tokens that a
        choice allows sum up to 1.

        Args:
            token_ids: What was generated.
            positions: One mapping of token id -> vLLM's Logprob a generated token: the likeliest
                `num_logprobs`, and the one sampled if it is not among them.
            num_logprobs: How many at most go to `top`; -1 for all.
        """
        return [
            self._position(token_id, found, num_logprobs)
            for token_id, found in zip(token_ids, positions, strict=True)
        ]

    def _position(self, token_id: int, found: Mapping[int, Any], num: int) -> TokenLogprobs:
        likely = [item for item in found.items() if item[1].logprob >= MIN_LOGPROB]
        likely.sort(key=lambda item: -item[1].logprob)
        top = [
            (self._token(other, entry), entry.logprob)
            for other, entry in (likely if num < 0 else likely[:num])
        ]
        sampled = found[token_id]
        return TokenLogprobs(self._token(token_id, sampled), sampled.logprob, top)

    def _token(self, token_id: int, entry: Any) -> str | None:
        if token_id in self._special_ids:
            return None
        token: str | None = entry.decoded_token
        return token if token is not None else self._decode([token_id])


def tokens_of(llm: Any, spec: EngineSpec) -> tuple[Any, frozenset[int]]:
    """Return the tokenizer, and the ids that are no text."""
    tokenizer = llm.get_tokenizer()
    ends = (llm.model_config.try_get_generation_config() or {}).get("eos_token_id")
    stops = spec.sampling_params.get("stop_token_ids")
    return tokenizer, special_token_ids(tokenizer, ends, stops)


def special_token_ids(tokenizer: Any, *more: int | Sequence[int] | None) -> frozenset[int]:
    """Collect the token ids that are no text: the tokenizer's special ones, and `more`.

    Args:
        tokenizer: A transformers tokenizer.
        more: Ids that end an answer: of generation_config.json, `stop_token_ids`.
    """
    ids = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    ids.update(number for number, token in added.items() if token.special)
    for given in more:
        ids.update([given] if isinstance(given, int) else given or ())
    return frozenset(ids)


class Splitter:
    """Splits texts by vLLM's parsers of reasoning and tool calls, as vLLM's server does.

    Source:
        vllm/entrypoints/openai/chat_completion/serving.py, chat_completion_full_generator, and
        vllm/parser, 0.26 to 0.33.
    """

    def __init__(self, spec: EngineSpec, tokenizer: Any) -> None:
        """Take the parsers, which there are (`has_parser`), and try them with the tokenizer.

        Raises:
            ConfigError: A parser does not find its marks in the tokenizer, say.
        """
        from vllm.parser.parser_manager import ParserManager

        self._tokenizer = tokenizer
        self._kwargs = dict(spec.chat_template_kwargs)
        self._has_tools = spec.tool_call_parser is not None
        self._has_reasoning = spec.reasoning_parser is not None
        try:
            self._request = _chat(spec.tools, "auto" if spec.tools else None)
            self._parser_type = ParserManager.get_parser(
                tool_parser_name=spec.tool_call_parser,
                reasoning_parser_name=spec.reasoning_parser,
                enable_auto_tools=self._has_tools,
                model_name=spec.model,
                is_harmony=_model_type(spec) == "gpt_oss",
            )
            self.params = self.kept(None)
        except Exception as exc:
            raise ConfigError(WHERE, [_unfit(spec, exc)]) from exc

    def kept(self, params: Params) -> dict[str, Any]:
        """Return SamplingParams fields without which the parsers would miss their marks."""
        before = self._of(params)
        adjusted = self._parser(before).adjust_request(before.model_copy())
        return {
            name: getattr(adjusted, name)
            for name in KEPT_IN_TEXT
            if getattr(adjusted, name) != getattr(before, name)
        }

    def _of(self, params: Params) -> Any:
        """Return vLLM's request, as far as parsers look at it."""
        if params is None or "tools" not in params:
            return self._request
        return _chat(params["tools"], params["tool_choice"])

    def _parser(self, request: Any) -> Any:
        # Parsers keep state: vLLM's server, too, takes a new one for each text.
        return self._parser_type(self._tokenizer, request.tools, chat_template_kwargs=self._kwargs)

    def split(
        self,
        text: str,
        token_ids: Sequence[int],
        prompt_ids: Sequence[int],
        params: Params = None,
    ) -> tuple[str, str | None, list[tuple[str, str]] | None]:
        """Return the answer, the reasoning and the tool calls (name, arguments as JSON text).

        Where the reasoning never ended there is no answer: its text is empty.

        Raises:
            ParserError: vLLM's parser failed.
        """
        try:
            request = self._of(params)
            parser = self._parser(request)
            if hasattr(parser, "set_prompt_token_ids"):
                parser.set_prompt_token_ids(prompt_ids)
            reasoning, content, calls = parser.parse(
                text,
                request,
                enable_auto_tools=self._has_tools,
                model_output_token_ids=token_ids,
            )
        except Exception as exc:
            raise ParserError(one_line(exc)) from exc
        pairs = [(call.name, call.arguments) for call in calls or ()]
        return content or "", reasoning, pairs if self._has_tools else None


def _chat(tools: Sequence[Mapping[str, Any]], choice: str | None) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    said = [{"role": "user", "content": ""}]
    return ChatCompletionRequest(messages=said, tools=list(tools) or None, tool_choice=choice)


def has_parser(spec: EngineSpec) -> bool:
    """Whether answers have to be split.

    Raises:
        ConfigError: vLLM does not have one of the parsers.
    """
    if spec.reasoning_parser is None and spec.tool_call_parser is None:
        return False
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    known = {
        "reasoning_parser": (spec.reasoning_parser, ReasoningParserManager),
        "tool_call_parser": (spec.tool_call_parser, ToolParserManager),
    }
    problems = []
    for key, (name, manager) in known.items():
        names = manager.list_registered()
        if name is not None and name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(names)}"
            problems.append(f"{key} = {name!r}: vLLM has no such parser; {hint}")
    if problems:
        raise ConfigError(WHERE, problems)
    return True


def _unfit(spec: EngineSpec, exc: Exception) -> str:
    given = {"reasoning_parser": spec.reasoning_parser, "tool_call_parser": spec.tool_call_parser}
    names = " and ".join(f"{key} = {name!r}" for key, name in given.items() if name is not None)
    return f"{names} cannot be used with this model: {one_line(exc)}"


def _model_type(spec: EngineSpec) -> str | None:
    """Read it before vLLM does; a model without config.json is vLLM's to refuse."""
    found = read_json(Path(spec.model) / "config.json", dict).get("model_type")
    return found if isinstance(found, str) else None
