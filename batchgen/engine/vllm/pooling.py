"""Vectors, classes, scores, likelihoods: what a model can do by its files, and how vLLM is asked.

Texts are made to fit here, and not by vLLM: offline it has no chunks, and what it cuts off are also
the special tokens at the end. What comes out goes on as float32 bytes; of vectors without a Python
float.

Imports nothing of vLLM but what `Pooler` needs when an engine is up.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgen.core.errors import ConfigError, one_line, suggestion
from batchgen.core.records import (
    Completion,
    EngineSpec,
    Pair,
    RowError,
    Sample,
    TaskFacts,
    TokenLogprobs,
)
from batchgen.core.runtime import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np

    Tokens = array[int]
    Vector = np.ndarray[Any, np.dtype[np.float32]]

_CLASSIFIERS = ("ForSequenceClassification", "ClassificationModel")
_OTHERS = ("ForTokenClassification", "ForAudioClassification", "ForImageClassification")
_GENERATORS = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")
"""Ends of the names of architectures: vllm/config/model.py, _SUFFIX_TO_DEFAULTS, 0.32."""
_SIZES = ("hidden_size", "n_embd", "d_model", "dim")
_UNIT = 1e-2
"""Vectors this near to length 1 have been made so; float16 and bfloat16 are no exacter."""
TASK, MODEL, WHERE = "task", "model.name", "[pooling]"


def read_config(spec: EngineSpec) -> dict[str, Any]:
    """Read a model's config.json, as the job overrides it, and that of its text model."""
    overrides = spec.model_kwargs.get("hf_overrides")
    config = read_json(Path(spec.model) / "config.json", dict)
    inner = config.get("text_config")
    changes = overrides if isinstance(overrides, dict) else {}
    return {**(inner if isinstance(inner, dict) else {}), **config, **changes}


def _modules(spec: EngineSpec, kind: str) -> list[str]:
    """Folders of the model's Sentence Transformers modules of a kind."""
    found = read_json(Path(spec.model) / "modules.json", list)
    return [
        str(one.get("path", ""))
        for one in found
        if isinstance(one, dict) and str(one.get("type", "")).endswith(f".{kind}")
    ]


def tasks_of(spec: EngineSpec) -> Sequence[str]:
    """Tasks that a model can do, as far as its files tell; the likeliest first."""
    names = [str(name) for name in read_config(spec).get("architectures") or ()]
    wanted = spec.model_kwargs.get("convert", "auto")
    if wanted == "classify" or (wanted == "auto" and _ends(names, _CLASSIFIERS)):
        return ("score", "classify") if len(_labels(spec)) == 1 else ("classify",)
    if wanted == "embed" or _modules(spec, "Pooling"):
        return ("embed", "score")
    if _ends(names, _OTHERS):
        return ()
    is_generator = not names or _ends(names, _GENERATORS)
    return ("generate", "loglikelihood") if is_generator else ("embed", "score")


def _ends(names: Sequence[str], ends: tuple[str, ...]) -> bool:
    return any(name.endswith(ends) for name in names)


def _labels(spec: EngineSpec) -> list[str]:
    """A classifier's labels, in the order of its numbers.

    Source:
        transformers/configuration_utils.py, id2label and num_labels, 5.19.
    """
    config = read_config(spec)
    found = config.get("id2label")
    if not isinstance(found, dict) or not found:
        num = config.get("num_labels")
        return [f"LABEL_{at}" for at in range(num if isinstance(num, int) else 2)]
    with suppress(ValueError):
        found = {int(number): label for number, label in found.items()}
    return [str(label) for _, label in sorted(found.items())]


def task_facts(spec: EngineSpec) -> TaskFacts:
    """Say what a model makes of a row.

    Raises:
        ConfigError: It cannot do the task, or not as `[pooling]` wants it.
    """
    can = tasks_of(spec)
    if spec.task not in can:
        can_do = f"can do {' and '.join(can)}" if can else "can do none of batchgen's tasks"
        advice = "name a model that does, or set model.engine.convert if this one can be made to"
        raise ConfigError(TASK, [f"{spec.task!r}: by its files {spec.model!r} {can_do}; {advice}"])
    if spec.task == "embed":
        return TaskFacts(_size(spec), prefix=_prefix(spec))
    if spec.task == "score":
        return TaskFacts(1)
    if spec.task == "loglikelihood":
        return TaskFacts(2)
    labels = _labels(spec)
    if len({*labels}) < len(labels):
        raise ConfigError(MODEL, ["its id2label has a label twice"])
    is_multi = read_config(spec).get("problem_type") == "multi_label_classification"
    return TaskFacts(len(labels), labels, is_multi)


def _size(spec: EngineSpec) -> int:
    """Numbers of a model's vectors.

    Source:
        vllm/config/model.py, embedding_size and matryoshka_dimensions, 0.26 to 0.33.
    """
    config = read_config(spec)
    dense = [
        read_json(Path(spec.model) / folder / "config.json", dict)
        for folder in _modules(spec, "Dense")
    ]
    sizes = [one.get("out_features") for one in dense[-1:]] + [config.get(key) for key in _SIZES]
    size = next((found for found in sizes if isinstance(found, int) and found > 0), None)
    wanted = spec.pooling.get("dimensions")
    if size is None:
        problem = "the model's config.json does not say how many numbers a vector has"
        raise ConfigError(MODEL, [f"{problem}, expected hidden_size"])
    if wanted is None or wanted == size:
        return size
    allowed = config.get("matryoshka_dimensions")
    problem = ""
    if not allowed and not config.get("is_matryoshka"):
        advice = "if it is, set model.engine.hf_overrides = { is_matryoshka = true }"
        problem = f"the model is not said to be trained for fewer than {size}; {advice}"
    elif allowed and wanted not in allowed:
        problem = f"the model has {', '.join(map(str, allowed))}"
    elif wanted > size:
        problem = f"the model has {size}"
    if problem:
        raise ConfigError(WHERE, [f"dimensions = {wanted}: {problem}"])
    return int(wanted)


def _prefix(spec: EngineSpec) -> str:
    """What goes before each text.

    Source:
        `prompts` of config_sentence_transformers.json, name -> text: sentence_transformers/
        SentenceTransformer.py; vLLM does not apply them offline (0.32).
    """
    name = spec.pooling.get("prompt_name")
    if name is None:
        return str(spec.pooling.get("prefix", ""))
    path = Path(spec.model) / "config_sentence_transformers.json"
    prompts = read_json(path, dict).get("prompts")
    prompts = prompts if isinstance(prompts, dict) else {}
    if name not in prompts:
        has = suggestion(name, list(prompts)) if prompts else "; it has none, set pooling.prefix"
        raise ConfigError(WHERE, [f"prompt_name: the model has no prompt {name!r}{has}"])
    return str(prompts[name])


APART, JOINED, IN_A_ROW, CONTINUED = "apart", "joined", "in a row", "continued"


def pairs_of(spec: EngineSpec) -> str:
    """How the two texts of a pair become tokens, see `encode_pair`."""
    if spec.task == "loglikelihood":
        return CONTINUED
    if tasks_of(spec)[:1] == ("embed",):
        return APART
    return JOINED if read_config(spec).get("use_sep_token", True) else IN_A_ROW


class Pieces(NamedTuple):
    """A text or two as tokens."""

    first: Tokens
    second: Tokens | None = None
    """Of the second text, where each is read by itself."""
    boundary: int = 0
    """Where the second text begins, if both are in `first`; else 0. Likelihoods are of what follows
    it."""

    @property
    def num_tokens(self) -> int:
        """Of all."""
        return len(self.first) + len(self.second or ())


def encode_pair(tokenizer: Any, how: str, pair: Pair) -> Pieces:
    """Make tokens of a pair: `apart` for vectors of both, `joined` by the model's marks, or not.

    Source:
        vllm/entrypoints/pooling/scoring/io_processor.py, get_score_prompt, 0.32: models that were
        made of one that generates have no mark between the two (`use_sep_token`).
    """
    if how == APART:
        first, second = (array("i", tokenizer.encode(text)) for text in pair)
        return Pieces(first, second)
    if how == IN_A_ROW:
        head = len(tokenizer.encode(pair[0]))
        return Pieces(array("i", tokenizer.encode(pair[0] + pair[1])), boundary=head)
    found = tokenizer(text=pair[0], text_pair=pair[1], return_token_type_ids=True)
    ids, types = found["input_ids"], found["token_type_ids"]
    boundary = types.index(1) if 1 in types else len(tokenizer.encode(pair[0]))
    return Pieces(array("i", ids), boundary=boundary)


def continued(tokenizer: Any, whole: Tokens, num_prompt: int, *, is_alone: bool) -> Pieces:
    """Say where a continuation begins: behind as many tokens as the prompt has by itself.

    Args:
        tokenizer: Of transformers.
        whole: Of the prompt with its continuation.
        num_prompt: How many the prompt has.
        is_alone: There is none: the text follows the token that texts begin with.

    Source:
        lm_eval/api/model.py, TemplateLM._encode_pair and loglikelihood; prefix_token_id in
        lm_eval/models/vllm_causallms.py, 0.4.
    """
    if not is_alone:
        return Pieces(whole, boundary=num_prompt)
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    has_start = start is None or whole[:1] == array("i", [start])
    return Pieces(whole if has_start else array("i", [start]) + whole, boundary=1)


class Fit:
    """Makes texts fit, by their tokens."""

    def __init__(
        self, tokenizer: Any, limit: int, pooling: Mapping[str, Any], prefix: str = ""
    ) -> None:
        """Find the special tokens that the tokenizer puts around a text.

        Args:
            tokenizer: Of transformers.
            limit: Tokens that the model takes.
            pooling: The job's table.
            prefix: With which each text begins, and each piece of it.
        """
        bare = tokenizer.encode("a", add_special_tokens=False)
        whole = tokenizer.encode("a")
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self._head = array("i", whole[:at])
        self._tail = array("i", whole[at + len(bare) :])
        self._num_prefix = len(tokenizer.encode(prefix, add_special_tokens=False)) if prefix else 0
        self._limit = limit
        self._how = pooling.get("too_long", "refuse")

    def pieces(self, ids: Tokens, boundary: int = 0) -> list[Tokens] | RowError:
        """Cut a text that is too long, as the job wants it; its end keeps the special tokens.

        Args:
            ids: With special tokens.
            boundary: What must not be cut into: of a pair, where the second text begins.
        """
        if len(ids) <= self._limit:
            return [ids]
        room = self._limit - len(self._head) - len(self._tail)
        text = ids[len(self._head) : len(ids) - len(self._tail)]
        if self._how == "refuse" or room <= max(boundary, self._num_prefix):
            problem = f"the text has {len(ids)} tokens, the model takes {self._limit}"
            return RowError("prompt_too_long", f"{problem} (max_model_len)")
        if self._how == "truncate":
            return [self._head + text[:room] + self._tail]
        prefix, body = text[: self._num_prefix], text[self._num_prefix :]
        step = room - len(prefix)
        starts = range(0, len(body), step)
        return [self._head + prefix + body[at : at + step] + self._tail for at in starts]


class Part(NamedTuple):
    """What vLLM is asked for a request; one of several."""

    token_ids: Tokens
    params: Any
    """PoolingParams or SamplingParams."""


class Pooler:
    """Asks one engine for what requests want, and puts the answers together. Holds no request."""

    def __init__(self, spec: EngineSpec, limit: int, tokenizer: Any) -> None:
        """Bind to an engine that is up.

        Args:
            spec: Of the engine.
            limit: Its max_model_len.
            tokenizer: The model's.
        """
        from vllm import PoolingParams

        self._make: Callable[..., Any] = PoolingParams
        is_apart = spec.task == "score" and pairs_of(spec) == APART
        self._is_apart = is_apart
        self._fields = {"task": "embed" if is_apart or spec.task == "embed" else "classify"}
        self._fields |= {
            k: v for k, v in spec.pooling.items() if k in ("dimensions", "use_activation")
        }
        self._params = self._make(**self._fields)
        self._fit = Fit(tokenizer, limit, spec.pooling, _prefix(spec))
        self._has_types = "token_type_ids" in getattr(tokenizer, "model_input_names", ())

    def parts(self, given: Pieces) -> list[Part] | RowError:
        """Say what to ask vLLM for a request."""
        found: list[Part] = []
        params = self._params
        if given.boundary and self._has_types:
            # Of types that are zeros followed by ones vLLM wants to know the first one.
            extra = {"compressed_token_type_ids": given.boundary}
            params = self._make(**self._fields, extra_kwargs=extra)
        for ids in (ids for ids in (given.first, given.second) if ids is not None):
            pieces = self._fit.pieces(ids, given.boundary)
            if isinstance(pieces, RowError):
                return pieces
            found += [Part(piece, params) for piece in pieces]
        return found

    def completion(
        self, request_id: int, given: Pieces, outputs: Sequence[Any], latency_s: float
    ) -> Completion:
        """Put together what vLLM gave, one output a part, in their order."""
        num = sum(len(output.prompt_token_ids) for output in outputs)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        error = next((one for output in outputs if (one := getattr(output, "error", None))), None)
        if error is not None:
            why = RowError("engine_error", f"vLLM: {one_line(Exception(error))}")
            return Completion(request_id, (), num, cached, 0, latency_s, why)
        vectors = [_vector(output) for output in outputs]
        weights = [len(output.prompt_token_ids) for output in outputs]
        numbers = _cosine(vectors) if self._is_apart else _mean(vectors, weights)
        reason = "length" if num < given.num_tokens else "stop"
        num_chunks = 1 if self._is_apart else len(outputs)
        sample = Sample("", reason, numbers=numbers, num_chunks=num_chunks)
        return Completion(request_id, (sample,), num, cached, 0, latency_s)


def joined(completions: Iterable[Completion]) -> Completion:
    """Put the numbers of a request's pairs together; it fails with the first that does."""
    whole, *others = completions
    for one in others:
        if whole.error is not None or one.error is not None:
            return whole if whole.error is not None else one
        (first,), (second,) = whole.samples, one.samples
        reason = "length" if "length" in (first.finish_reason, second.finish_reason) else "stop"
        numbers = (first.numbers or b"") + (second.numbers or b"")
        sample = first._replace(finish_reason=reason, numbers=numbers)
        whole = whole._replace(
            samples=(sample,),
            num_prompt_tokens=(whole.num_prompt_tokens or 0) + (one.num_prompt_tokens or 0),
            num_cached_tokens=(whole.num_cached_tokens or 0) + (one.num_cached_tokens or 0),
        )
    return whole


class Likelihoods:
    """Asks one engine how likely the tokens of texts are, as `Pooler` asks. Holds no request."""

    def __init__(self, spec: EngineSpec, limit: int, tokenizer: Any, params: Any) -> None:
        """Bind to an engine that is up, see `Pooler`; `params` are vLLM's for each request."""
        self._params = params
        self._limit = limit - 1  # vLLM generates a token in any case.
        self._how = spec.pooling.get("too_long", "refuse")
        has_tokens = spec.pooling.get("token_logprobs", False)
        self._decode: Callable[[list[int]], str] | None = tokenizer.decode if has_tokens else None

    def parts(self, given: Pieces) -> list[Part] | RowError:
        """Say what to ask vLLM for a request."""
        ids = given.first
        if not 0 < given.boundary < len(ids):
            problem = "a likelihood needs at least one token, and one before it"
            return RowError("empty_prompt", f"{problem}; the text or its continuation has none")
        if len(ids) > self._limit and self._how == "refuse":
            problem = f"the text has {len(ids)} tokens, the model takes fewer than"
            return RowError("prompt_too_long", f"{problem} {self._limit + 1} (max_model_len)")
        return [Part(ids[start:stop], self._params) for start, stop, _ in self._windows(given)]

    def _windows(self, given: Pieces) -> list[tuple[int, int, int]]:
        """Begin and end of each part, and from where on its tokens count.

        What is too long loses the beginning of the prompt, one token aside, then its end. Windows
        over all of it have each as much before its tokens as there is room for.

        Source:
            lm_eval/models/vllm_causallms.py, _loglikelihood_tokens; lm_eval/utils.py,
            get_rolling_token_windows, 0.4.
        """
        num, first, limit = len(given.first), given.boundary, self._limit
        if num <= limit or self._how != "chunk":
            start = max(0, min(first - 1, num - limit))
            return [(start, min(num, start + limit), first)]
        ends = [first, *range(limit, num, limit - 1), num]
        return [(max(0, stop - limit), stop, begin) for begin, stop in pairwise(ends)]

    def completion(
        self, request_id: int, given: Pieces, outputs: Sequence[Any], latency_s: float
    ) -> Completion:
        """Put together what vLLM gave, one output a part, in their order."""
        ids, logprobs, ranks, tokens = given.first, array("f"), array("f"), array("i")
        num = sum(len(output.prompt_token_ids) for output in outputs)
        for (start, stop, first), output in zip(self._windows(given), outputs, strict=True):
            found = output.prompt_logprobs  # None, or of all tokens but the first.
            if found is None or len(found.logprobs) != stop - start - 1:
                has = 0 if found is None else len(found.logprobs)
                problem = f"vLLM gave {has} log probabilities, expected {stop - start - 1}"
                error = RowError("bad_loglikelihood", problem)
                return Completion(request_id, (), num, 0, 0, latency_s, error)
            logprobs.extend(found.logprobs[first - start - 1 :])
            ranks.extend(found.ranks[first - start - 1 :])
            tokens += ids[first:stop]
        is_cut = self._how == "truncate" and len(ids) > self._limit
        told = None
        if self._decode is not None:
            texts = [self._decode([token]) for token in tokens]
            told = [TokenLogprobs(*item, ()) for item in zip(texts, logprobs, strict=True)]
        reason, numbers = "length" if is_cut else "stop", (logprobs + ranks).tobytes()
        sample = Sample("", reason, told, numbers=numbers, num_chunks=len(outputs))
        return Completion(request_id, (sample,), num, 0, 0, latency_s)


def _vector(output: Any) -> Vector:
    found: Vector = output.outputs.data.float().numpy().reshape(-1)
    return found


def _mean(vectors: Sequence[Vector], weights: Sequence[int]) -> bytes:
    """The weighted mean; of vectors of length 1 it is made so again."""
    import numpy as np

    if len(vectors) == 1:
        return vectors[0].tobytes()
    if len({len(vector) for vector in vectors}) > 1:
        return b""  # One has failed.
    mean: Vector = np.average(np.stack(vectors), axis=0, weights=weights).astype(np.float32)
    lengths = np.linalg.norm(np.stack(vectors), axis=1)
    if np.all(np.abs(lengths - 1) < _UNIT):
        mean /= max(np.linalg.norm(mean), np.finfo(np.float32).tiny)
    return mean.tobytes()


def _cosine(vectors: Sequence[Vector]) -> bytes:
    import numpy as np

    one, other = vectors
    if len(one) != len(other):
        return b""
    size = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    score: bytes = np.float32(one @ other / size if size else 0).tobytes()
    return score
