"""Rows to requests: prompt, key, seed, and what a row asks for itself.

A row may bring sampling parameters, a JSON Schema and the name of a LoRA adapter in columns that
the job names. They are part of its `request_key`, like its prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from pydantic import ValidationError

from batchgen.core.data import check_levels, holder_of, parse_json, value_at
from batchgen.core.errors import one_line, suggestion
from batchgen.core.records import Ordinal, Prompt, Request, Result, RowBatch, RowError, is_continued
from batchgen.job.sampling import LineSampling, RowSampling
from batchgen.prompt.builder import PromptBuilder, shortened

if TYPE_CHECKING:
    from batchgen.job.model import JobConfig
    from batchgen.job.recipe import Seeds

    Values = Mapping[str, Any]
    CheckSchema = Callable[[str], object]
    """Raises ValueError for a text that is no JSON Schema which answers can be checked against."""

MAX_PROMPT_BYTES = 16 << 20
"""A request that is longer, as JSON, is an error row: it is beyond any context window."""


MAX_SCHEMA_CHARS = 256 << 10
"""A row's own schema, as JSON: looking through it takes about a second."""


class Own(NamedTuple):
    """What a row asks for itself."""

    params: Mapping[str, Any] | None
    lora: str | None


NOTHING = Own(None, None)


class RowOptions:
    """The columns that hold rows' own parameters. Holds no row."""

    def __init__(self, job: JobConfig) -> None:
        self._by_line = job.asks_by_line  # Then with columns as `source.openai` names them.
        self._sampling = job.sampling.column
        self._fields = LineSampling if self._by_line else RowSampling
        self._schema = "schema" if self._by_line else job.output.schema_column
        self._tools = "tools" if self._by_line else None
        self._finds_calls = job.model.tool_call_parser is not None
        self._lora = "model" if self._by_line else job.model.lora_column
        name = job.model.name
        served = job.model.engine.get("served_model_name", ())
        served = [served] if isinstance(served, str) else served
        self._own_names = {name, PurePath(name).name, *served} if self._by_line else set()
        self._loras = list(job.model.lora)
        # A single adapter without a column serves every row.
        self._lora_of_all = None if self._lora or not self._loras else self._loras[0]
        self._is_empty = not self.columns() and self._lora_of_all is None

    def columns(self, available: Sequence[str] = ()) -> Mapping[str, str]:
        """Key in the job file -> column that it names, out of those available if one is."""
        keys = {
            "sampling.column": self._sampling,
            "output.schema_column": self._schema,
            "prompt.tools": self._tools,
            "model.lora_column": self._lora,
        }
        return {key: holder_of(name, available) for key, name in keys.items() if name is not None}

    def of(self, values: Values, check_schema: CheckSchema) -> Own | RowError:
        """What this row asks for, or why it cannot be had."""
        if self._is_empty:
            return NOTHING
        params: dict[str, Any] = {}
        if self._sampling is not None:
            found = _sampling_of(self._sampling, value_at(values, self._sampling), self._fields)
            if isinstance(found, RowError):
                return found
            params |= found
        given = value_at(values, self._schema) if self._schema is not None else None
        if self._schema is not None and (not self._by_line or given is not None):
            schema = _schema_of(self._schema, given, check_schema)
            if isinstance(schema, RowError):
                return schema
            params["structured_outputs"] = {"json": schema}
        if self._tools is not None and (tools := values.get(self._tools)):
            if tools["tool_choice"] == "auto" and not self._finds_calls:
                problem = "tool_choice 'auto' needs model.tool_call_parser (--tool-call-parser)"
                return RowError("unsupported_parameter", problem)
            params |= tools
        lora = self._lora_of_all if self._lora is None else value_at(values, self._lora)
        lora = None if lora in self._own_names else lora
        if lora is not None and lora not in self._loras:
            known = {PurePath(name).name for name in self._own_names}.union(self._loras)
            found_text = suggestion(str(lora), sorted(known))
            kind, what = "unknown_adapter", "LoRA adapter"
            if self._by_line:
                kind, what = "model_not_found", "model"
            return RowError(kind, f"no {what} {lora!r:.60}{found_text}")
        return Own(params or None, lora)


def _sampling_of(column: str, value: object, kind: type[RowSampling]) -> dict[str, Any] | RowError:
    fields = _object(value)
    if fields is None:
        text = f"column {column!r} holds no object, expected such as {{'max_tokens': 64}}"
        return RowError("bad_sampling", text)
    try:
        check_levels(fields)
        # null means absent here, however it came.
        return kind.model_validate(_without_nulls(fields)).model_dump(exclude_none=True)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        key = ".".join(map(str, found["loc"]))
        is_unknown = found["type"] == "extra_forbidden"
        what = "unknown key, expected one of [sampling]" if is_unknown else found["msg"]
        return RowError("bad_sampling", shortened(f"column {column!r}: {key}: {what}"))
    except ValueError as error:
        return RowError("bad_sampling", shortened(f"column {column!r}: {error}"))


def _schema_of(column: str, value: object, check_schema: CheckSchema) -> dict[str, Any] | RowError:
    """A row's JSON Schema.

    As JSON text it is kept to the letter: `{"const": null}` is null and nothing else. As a Parquet
    struct it has every field of every row's schema, so null means absent. A JSONL object arrives
    like a struct: a schema that says null there has to be given as text.
    """
    schema = _object(value)
    if not schema:
        return RowError("bad_schema", f"column {column!r} holds no JSON Schema")
    try:
        check_levels(schema)
        if isinstance(value, dict):
            schema = _without_nulls(schema)
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_CHARS:
            problem = f"column {column!r}: a schema of more than {MAX_SCHEMA_CHARS >> 10} Ki chars"
            return RowError("bad_schema", problem)
        check_schema(text)
    except (ValueError, TypeError) as error:  # TypeError: a struct of dates, say.
        return RowError("bad_schema", shortened(f"column {column!r}: {error}"))
    return schema


def _object(value: object) -> dict[str, Any] | None:
    """A mapping, given as such or as JSON; {} for null; None if it is neither."""
    if value is None:
        return {}
    if isinstance(value, str | bytes):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Leave out fields that are null; items of a list stay, so that places keep their number."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


class RequestBuilder:
    """Rows to requests, with keys and seeds. Owned by one thread."""

    def __init__(
        self,
        prompts: PromptBuilder,
        job: JobConfig,
        recipe: str,
        *,
        seeds: Seeds,
        ids: Iterator[int],
        check_schema: CheckSchema,
    ) -> None:
        """Bind to a job.

        Args:
            prompts: The compiled templates.
            job: The job.
            recipe: Fingerprint of the recipe, part of every key.
            seeds: The rows' own.
            ids: Request ids, unique within the run.
            check_schema: Refuses a schema that a row brings.
        """
        self._prompts = prompts
        self._seeds = seeds
        self._options = RowOptions(job)
        self._key = hashlib.blake2b(recipe.encode(), digest_size=16)
        self._ids = ids
        self._check_schema = check_schema

    def of(self, batch: RowBatch) -> Iterator[Request | Result]:
        """Yield one entry a row of `batch`, in order: a request, or the result of a bad row."""
        # What waits for its answer keeps only the carried columns, not the parsed values.
        kept = replace(batch, values=())
        for index, (row, values) in enumerate(zip(batch.rows, batch.values, strict=True)):
            ordinal = Ordinal(batch.segment, row)
            error = batch.errors[index] if values is None else None
            outcome = error or self._request(ordinal, values or {}, kept, index)
            if isinstance(outcome, RowError):
                yield Result(ordinal, kept, index, None, None, outcome)
            else:
                yield outcome

    def _request(
        self, ordinal: Ordinal, values: Values, batch: RowBatch, index: int
    ) -> Request | RowError:
        prompt = self._prompts.build(values)
        if isinstance(prompt, RowError):
            return prompt
        try:
            own = self._options.of(values, self._check_schema)
        except Exception as error:  # noqa: BLE001 - the row border: values of any kind
            own = RowError("bad_request", one_line(error))
        if isinstance(own, RowError):
            return own
        key = self._request_key(prompt, own)
        if isinstance(key, RowError):
            return key
        seed = self._seeds.of(ordinal, own.params or {}, 1)
        params = {key: value for key, value in (own.params or {}).items() if key != "seed"}
        return Request(
            request_id=next(self._ids),
            ordinal=ordinal,
            prompt=prompt,
            request_key=key,
            seed=seed,
            batch=batch,
            index=index,
            params=params or None,
            lora=own.lora,
        )

    def _request_key(self, prompt: Prompt, own: Own) -> str | RowError:
        content: object = prompt if own == NOTHING else [prompt, _ordered(own.params), own.lora]
        if is_continued(prompt):  # Up to 0.1.0 a new turn was begun after it.
            content = ["continued", content]
        try:
            data = orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
        except orjson.JSONEncodeError as error:
            return RowError("bad_prompt", f"the prompt is not text: {error}")
        if len(data) > MAX_PROMPT_BYTES:
            return RowError("bad_prompt", f"the prompt is longer than {MAX_PROMPT_BYTES >> 20} MiB")
        key = self._key.copy()
        key.update(data)
        return key.hexdigest()


def _ordered(params: Values | None) -> Values | None:
    """Parameters for a key that sorts: schema and tools as text, whose order is asked for.

    vLLM generates in that order, and a chat template writes in it.
    """
    if params is None or params.keys().isdisjoint(("structured_outputs", "tools")):
        return params
    schema = params.get("structured_outputs", {}).get("json")
    ordered = {"structured_outputs": schema, "tools": params.get("tools")}
    return {**params, **{k: json.dumps(v) for k, v in ordered.items() if v is not None}}


def wrong_option_columns(job: JobConfig, available: Sequence[str]) -> list[str]:
    """One line for each named column that the input lacks."""
    return [
        f"{key}: no column {column!r} in the input{suggestion(column, available)}"
        for key, column in RowOptions(job).columns(available).items()
        if column not in available
    ]
