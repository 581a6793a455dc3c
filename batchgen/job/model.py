"""The job file's tables, one model each. Docstrings under the fields are the documentation.

The JSON Schema for editors, the README's table and the error texts all come from here. Field
names that vLLM has are vLLM's, with vLLM's meaning; what is not listed goes in `[model.engine]`,
which is passed on as it is.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from batchgen.core.places import Bucket, Root
from batchgen.job.run_table import PositiveInt, RunConfig, StorageConfig, Table
from batchgen.job.sampling import ChecksConfig, RetryConfig, SamplingConfig
from batchgen.job.task import NO_SAMPLING, PoolingConfig, Share, Task, by_line, unfit


def today() -> date:
    """The day in this machine's zone."""
    return datetime.now(tz=UTC).astimezone().date()


def is_url(path: str) -> bool:
    """Whether fsspec has to open it; an absolute path never is one, whatever folders are called."""
    return "://" in path and not path.startswith("/")


class GateConfig(Table):
    """When a finished run is published. Over a limit: exit 3, and nothing is."""

    max_error_rate: Share = 0.1
    """At most this share of the rows may be errors."""
    max_truncated_rate: Share | None = None
    """At most this share of the rows may be cut off at max_tokens."""
    max_retry_rate: Share | None = None
    """At most this share of the rows may have needed more than one attempt."""
    max_drift: Share | None = None
    """Total variation distance of the labels to those of the last published snapshot, at most."""
    max_shrink: Share | None = None
    """At most this share of the last snapshot's rows may be gone from the input; what came
    makes up for what went. Default: 0.5; in outputs that began before 0.2: not all of them."""
    min_accuracy: Share | None = None
    """At least this share of the rows with a gold label must have that label, see `[score]`."""
    drift_column: str | None = None
    """Which labels, by the column's name. Default: the choice, or each enum of the schema."""


class ScoreConfig(Table):
    """What answers are scored against. Not part of the recipe: change it freely."""

    gold: str | None = None
    """Column of the input with the right label, carried to the output. Rows where it is null or
    empty are not scored."""
    gold_path: str | None = None
    """File that has the right labels instead (CSV, JSONL, Parquet), in its column `gold`."""
    on: str | None = None
    """With `gold_path`: column of that file and of the input that names a row, such as an id."""
    answer: str | None = None
    """Which labels are scored, by the column's name. Default: the only ones."""
    precision: Share | None = None
    """Wanted precision: from which probability on it is reached, and by which share of the rows."""

    @property
    def column(self) -> str | None:
        """The carried column that right labels are in, or are found by."""
        return self.gold if self.gold_path is None else self.on


# vLLM's load formats that read pickles (vllm/config/load.py, 0.26).
PICKLE_FORMATS = frozenset({"pt", "npcache"})


_BASE_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class InputConfig(Table):
    """What to read."""

    path: str | list[str] = Field(min_length=1)
    """File, pattern, folder (its files), or a list of these. Relative to the job file; URLs go to
    fsspec. What exists as it is written is no pattern. Names that begin with . or _ and folders in
    it are left out, unless named; links to files are files. `{date}`, `{yesterday}`,
    `{run_date-3d}` are days, `{date:%Y/%m/%d}` says how to write them."""
    format: Literal["jsonl", "csv", "parquet", "openai"] | None = None
    """Only needed when file names do not end in .jsonl, .ndjson, .json, .csv, .tsv (these also
    with .gz, .zst), .parquet or .pq; openai: a batch file of OpenAI's API, whose lines say
    themselves what is asked."""
    columns: list[str] | None = None
    """Columns to carry into the output. Default: all."""
    types: dict[str, str] = Field(default={})
    """Column types: string, text, bool, int32, int64, float64, json, and in ISO 8601 date,
    timestamp (without an offset) and timestamptz (with one; UTC). A value that does not fit is an
    error of its row; text holds strings as they are, and all else as JSON. JSONL: else a type that
    holds all values. CSV: else strings; an empty field is '' in a string and null in any other
    type."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Of CSV, one character. Default: a comma, in .tsv a tab."""
    encoding: str | None = None
    """Of JSONL and CSV: the text's encoding, as Python names it: utf-16, latin-1, cp1252.
    Default: UTF-8."""
    where: str | None = None
    """SQL expression over the columns; only rows for which it is true are run."""
    limit: PositiveInt | None = None
    """Only the first so many rows (of those that `where` lets through)."""

    @model_validator(mode="after")
    def _can_delimit(self) -> Self:
        if self.delimiter is not None and self.delimiter in '"\r\n\0':
            msg = f"delimiter = {self.delimiter!r} cannot end a field, expected such as ';'"
            raise ValueError(msg)
        return self

    @field_validator("encoding")
    @classmethod
    def _can_decode(cls, name: str | None) -> str | None:
        if name is None:
            return None
        try:
            # Python has codecs from bytes to bytes, too, and those that cannot mark a wrong byte.
            is_text = isinstance(b" ".decode(name, "replace"), str)
            codecs.getincrementaldecoder(name)("replace").decode(b" ")
        except (LookupError, UnicodeError, ValueError):
            is_text = False
        if not is_text:
            msg = f"encoding = {name!r} is none that Python knows, expected such as 'utf-16'"
            raise ValueError(msg)
        return None if codecs.lookup(name).name in _UTF_8 else name


_UTF_8 = ("utf-8", "utf-8-sig")


class Example(Table):
    """One question and its answer."""

    user: str
    """The question, as a row's `user` would render; plain text."""
    assistant: str | dict[str, Any]
    """The answer; a table is written as JSON."""


class PromptConfig(Table):
    """How a row becomes a prompt: `user` (with `system`), or `text`, `template` or `messages`."""

    user: str | None = None
    """Jinja template over the row's columns: the user message of a chat."""
    user_file: str | None = None
    """The same, from a file."""
    system: str | None = None
    """Jinja template: the system message."""
    system_file: str | None = None
    """The same, from a file."""
    messages: str | None = None
    """Name of a column that holds a whole chat: a list of {role, content}, or of {from, value}; or
    a raw prompt, as {prompt}. `body.messages` is looked up in the column `body`."""
    text: str | None = None
    """Name of a column that holds the raw prompt; no chat template is applied."""
    template: str | None = None
    """Jinja template of a raw prompt; no chat template is applied."""
    query: str | None = None
    """For `task = "score"`, a Jinja template: what is looked for."""
    passage: str | None = None
    """For `task = "score"`, a Jinja template: what may be it."""
    continuation: str | None = None
    """For `task = "loglikelihood"`, a Jinja template: what may follow the prompt in `template`.
    Whitespace at the prompt's end goes to it."""
    examples: list[Example] = Field(default=[])
    """Few-shot: questions and answers between system and user, the same for every row."""
    examples_file: str | None = None
    """The same from a JSONL file of {"user": ..., "assistant": ...}."""
    prefill: str | None = None
    """Jinja template: how the assistant's answer begins, which the model goes on with. A form holds
    for what follows, and only that is the answer. Chats of `messages` that end with the assistant
    are gone on with as well."""
    images: str | None = None
    """Column with a row's images (path, URL or bytes, or a list), for vision models. A path counts
    by its name: another image under the same name is no other request."""
    images_folder: str | list[str] | None = None
    """The folders that images of rows may be read from: what `images` and `messages` name has to
    lie below one of them. Relative paths start at the first. Default: the job file's folder for
    `images`, none for `messages`; vLLM's `allowed_local_media_path` is one of them."""
    image_domains: list[str] = Field(default=[], examples=[["images.example.org"]])
    """The hosts that images of rows may be fetched from, or "*" for any; beside those in vLLM's
    `allowed_media_domains`. Default: none."""
    tools: list[dict[str, Any]] = Field(default=[])
    """Tools that the model may call, as OpenAI's API describes them."""
    tools_file: str | None = None
    """The same from a JSON file: a list."""
    chat_template_file: str | None = None
    """Chat template to use instead of the model's own."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Extra variables for the chat template, for example enable_thinking = false."""

    @property
    def form(self) -> str:
        """The key that says what rows become; `continuation` for a template that has one."""
        keys = ("messages", "text", "continuation", "template", "query")
        return next((key for key in keys if getattr(self, key) is not None), "user")

    @property
    def is_chat(self) -> bool:
        """Whether rows become chats, which the model's chat template makes texts of."""
        return self.form in ("user", "messages")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = {
            "user": self.user is not None or self.user_file is not None,
            "messages": self.messages is not None,
            "text": self.text is not None,
            "template": self.template is not None,
            "query": self.query is not None,
        }
        given = [name for name, is_given in forms.items() if is_given]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"found {found}, expected exactly one of {', '.join(forms)}")
        if (self.query is None) != (self.passage is None):
            raise ValueError("query and passage go together, found one of them")
        for name in ("user", "system"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"both {name} and {name}_file are given, expected one")
        if (self.system is not None or self.system_file is not None) and not forms["user"]:
            raise ValueError(f"system goes with user, not with {given[0]}")
        if (self.examples or self.examples_file is not None) and not forms["user"]:
            raise ValueError(f"examples go with user, not with {given[0]}")
        if self.examples and self.examples_file is not None:
            raise ValueError("both examples and examples_file are given, expected one")
        for name in ("images", "prefill"):
            if getattr(self, name) is not None and not self.is_chat:
                raise ValueError(f"{name} goes with user or messages, not with {given[0]}")
        return self

    @model_validator(mode="after")
    def _continues_template(self) -> Self:
        if self.continuation is not None and self.template is None:
            msg = "continuation is given without template, the prompt that it follows"
            raise ValueError(msg)
        return self


class ModelConfig(Table):
    """Which model, and how the engine loads it."""

    backend: str = Field(default="vllm", examples=["vllm", "openai", "echo"])
    """`openai` is a server on the network that speaks OpenAI's API, see `base_url`.
    `echo` answers with the prompt itself: dry runs, pipeline benchmarks.
    `package.module:Class` (experimental) is an engine of your own, a `batchgen.engine.base.Engine`
    that Python finds on every machine of the run."""
    name: str = ""
    """Folder of the model (relative to the job file) or hub id; with `openai`, the name that the
    server has for it."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    base_url: Annotated[str, Field(min_length=1)] | list[str] | None = Field(
        default=None, examples=["http://gpu1:8000/v1"]
    )
    """With `openai`: where the server is, or several that serve the same model: rows go where there
    is room. `auto`: the server of `batchgen engine up` on this machine if it was started for this
    model and these settings, else an engine is started as ever."""
    api_key_env: str | None = Field(default=None, examples=["VLLM_API_KEY"])
    """With `openai`: the environment variable that holds the server's key. Never the key itself."""
    dtype: str | None = None
    """vLLM's dtype: auto, bfloat16, float16, float32."""
    quantization: str | None = None
    """vLLM's quantization, when the checkpoint does not say it itself."""
    max_model_len: PositiveInt | None = None
    """Prompt and output together, in tokens. Default: the model's own."""
    max_num_seqs: PositiveInt | None = None
    """Rows that the engine runs at once. Default: vLLM's for the device."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the GPU's memory for this engine. Default: vLLM's."""
    tensor_parallel_size: PositiveInt | None = None
    """GPUs that share one copy of the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. From the hub only with `revision` = a commit."""
    allow_pickle: bool = False
    """Load weights from *.bin, *.pt, *.pth or *.ckpt, which can run any code."""
    lora: dict[str, str] = Field(default={})
    """LoRA adapters: name -> folder. A single one serves every row."""
    lora_column: str | None = None
    """Column with the name of the row's adapter; null is the model itself."""
    reasoning_parser: str | None = None
    """vLLM's reasoning parser, such as qwen3: reasoning gets a column, forms hold for the rest."""
    tool_call_parser: str | None = None
    """vLLM's tool parser, such as hermes: tool calls get a column."""
    engine: dict[str, Any] = Field(default={})
    """Any other keyword of vLLM's LLM(...), passed as it is."""

    @property
    def is_vllm(self) -> bool:
        """Whether there is a model to find, on devices, and `engine` holds vLLM's own keywords."""
        return self.backend == "vllm" or self.is_auto

    @property
    def is_auto(self) -> bool:
        """Whether a warm server is used if there is one, see `base_url`."""
        return self.base_url in ("auto", ["auto"])

    @property
    def is_pinned(self) -> bool:
        """Whether the job says exactly which weights, so that it is the same wherever it runs."""
        is_commit = re.fullmatch("[0-9a-f]{40}", self.revision or "") is not None
        return self.is_vllm or is_commit or self.name.startswith("/")

    @property
    def urls(self) -> list[str]:
        """Servers of the model, each once."""
        given = [self.base_url] if isinstance(self.base_url, str) else self.base_url or []
        return list(dict.fromkeys(url.rstrip("/") for url in given))

    @field_validator("backend")
    @classmethod
    def _is_known(cls, backend: str) -> str:
        if backend not in ("vllm", "openai", "echo") and not _IMPORT_PATH.fullmatch(backend):
            expected = "'vllm', 'openai', 'echo' or 'package.module:Class'"
            raise ValueError(f"{backend!r:.60} is wrong, expected: {expected}")
        return backend

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if self.is_auto and self.backend in ("vllm", "openai"):
            return self
        if self.backend != "openai":
            for name in ("base_url", "api_key_env"):
                if getattr(self, name) is not None:
                    msg = f"{name} goes with backend = 'openai', not with {self.backend!r}"
                    raise ValueError(msg)
            return self
        if not self.urls:
            raise ValueError("base_url is missing, expected such as 'http://gpu1:8000/v1'")
        for url in self.urls:
            if not _BASE_URL.fullmatch(url):
                msg = f"base_url = {url!r:.200} is wrong, expected such as 'http://gpu1:8000/v1'"
                raise ValueError(msg)
        if self.api_key_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env):
            # Not repeated: it may be the key.
            msg = "api_key_env is no name of an environment variable, expected such as VLLM_API_KEY"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _has_name(self) -> Self:
        if (self.is_vllm or self.backend == "openai") and not self.name:
            raise ValueError("name is missing, expected the model's folder or hub id")
        clash = sorted(set(self.engine) & {*type(self).model_fields, "model"})
        if clash and self.is_vllm:
            key = "name" if clash[0] == "model" else clash[0]
            raise ValueError(f"engine.{clash[0]} has a key of its own, set model.{key}")
        if self.lora_column is not None and not self.lora:
            msg = "lora_column is given without adapters, expected [model.lora] name = folder"
            raise ValueError(msg)
        if len(self.lora) > 1 and self.lora_column is None:
            msg = f"{len(self.lora)} lora adapters, expected lora_column to say which row has which"
            raise ValueError(msg)
        load_format = self.engine.get("load_format")
        if load_format is not None and not isinstance(load_format, str):
            msg = f"engine.load_format = {load_format!r:.80}, expected a text such as 'safetensors'"
            raise ValueError(msg)
        if load_format in PICKLE_FORMATS and not self.allow_pickle:
            msg = f"engine.load_format = {load_format!r} unpickles weights, set allow_pickle = true"
            raise ValueError(msg)
        return self


class OutputConfig(Table):
    """Where the results go."""

    path: str = Field(min_length=1)
    """Folder of the published Parquet files and of the job's state (`_batchgen/`).
    May hold dates, as `input.path`: then every day is a job of its own."""
    prefix: str = "gen_"
    """Begins the name of every column that batchgen adds."""
    json_schema: str | dict[str, Any] | None = Field(default=None, alias="schema")
    """JSON Schema of the answer, a file or inline: answers are held to it and get typed columns."""
    schema_column: str | None = None
    """Column with a row's own JSON Schema: an object, or JSON text. Answers stay JSON text."""
    choice: list[str] | None = Field(default=None, min_length=1)
    """The answer is one of these."""
    regex: str | None = None
    """The answer matches this, as a whole."""
    grammar: str | None = None
    """The answer follows this grammar (EBNF or Lark, see vLLM)."""
    json_object: bool = False
    """The answer is some JSON object."""
    flatten: bool = False
    """With `schema`: a column for each of its fields, instead of one struct."""
    label_probability: bool = False
    """With `sampling.logprobs` and a choice or enums: the probability of the label that was given,
    as a column, such as `gen_label_probability`."""
    with_seed: bool = False
    """A column with the seed that each row was sampled with."""
    samples: bool | None = None
    """With `sampling.n` > 1: a column with the verdict, finish_reason, tokens, cumulative
    log probability (with `sampling.logprobs`) and error of each sample, and the rules of `[checks]`
    hold for each by itself instead of for the lists. Default: true; false in outputs that began
    before 0.2."""
    openai: bool = False
    """With `input.format = "openai"`: also OpenAI's output and error files, `openai-output.jsonl`
    and `openai-errors.jsonl`; each line of the input has one in exactly one of them."""
    compression: Literal["zstd", "snappy", "lz4", "gzip", "none"] = "zstd"
    """Of the published files."""
    rows_per_file: PositiveInt = 1_000_000
    """Published files hold at most so many rows."""
    keep_snapshots: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """So many snapshots stay: older ones are removed once a new one is published, with what only
    they needed, see `batchgen prune`. 0: all stay. Default: 30, and all in an output that was begun
    before 0.2."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = {
            "schema": self.json_schema,
            "schema_column": self.schema_column,
            "choice": self.choice,
            "regex": self.regex,
            "grammar": self.grammar,
            "json_object": self.json_object or None,
        }
        given = [name for name, value in forms.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, expected one of them")
        if self.flatten and self.json_schema is None:
            raise ValueError("flatten is given without schema")
        return self


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuned file and what a run takes from it, see `batchgen.job.tuned`."""

    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those used: names as in vLLM -> values."""
    note: str | None = None
    """Why it is not used, or what of it is not."""


class JobConfig(Table):
    """A whole job file."""

    task: Task = "generate"
    """What the model makes of a row: a text; or a vector (embed), a label (classify), how well a
    passage fits a query (score), or how likely a text is (loglikelihood)."""
    input: InputConfig
    prompt: PromptConfig
    model: ModelConfig
    sampling: SamplingConfig
    pooling: PoolingConfig = PoolingConfig()
    output: OutputConfig
    storage: StorageConfig = StorageConfig()
    checks: ChecksConfig = ChecksConfig()
    retry: list[RetryConfig] = Field(default=[], max_length=10)
    gate: GateConfig = GateConfig()
    score: ScoreConfig = ScoreConfig()
    run: RunConfig = RunConfig()
    _run_date: date = PrivateAttr(default_factory=today)
    _tuned: Tuned | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _without_sampling(cls, tables: Any) -> Any:  # noqa: ANN401 - before it is checked
        if not isinstance(tables, dict) or tables.get("task", "generate") == "generate":
            return tables
        if unfit := sorted({"sampling", "retry"} & tables.keys()):
            msg = f"[{unfit[0]}] is for answers that are generated, not for {tables['task']!r}"
            raise ValueError(msg)
        return {**tables, "sampling": dict(NO_SAMPLING)}

    @model_validator(mode="before")
    @classmethod
    def _asks_by_line(cls, tables: Any) -> Any:  # noqa: ANN401 - before it is checked
        return by_line(tables)

    @model_validator(mode="after")
    def _fits_task(self) -> Self:
        prompt, output = self.prompt, self.output.model_dump(exclude_defaults=True)
        if why := unfit(self.task, prompt.form, self.pooling, output):
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _writes_what_it_reads(self) -> Self:
        if self.output.openai and not self.asks_by_line:
            msg = "output.openai goes with input.format = 'openai', whose lines it answers"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if self.model.urls and self.run.is_cluster:
            msg = "model.base_url does not go with run.replicas: one process keeps servers busy"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _lists_labels(self) -> Self:
        is_here = not self.model.is_auto and self.model.backend != "openai"
        if self.sampling.logprobs == "labels" and not (self.output.choice and is_here):
            msg = "sampling.logprobs = 'labels' goes with output.choice, and not with servers"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _has_samples(self) -> Self:
        least, num = self.checks.min_ok_samples, self.sampling.n
        if least > num:
            msg = f"checks.min_ok_samples = {least}, expected at most sampling.n = {num}"
            raise ValueError(msg)
        return self

    @property
    def asks_by_line(self) -> bool:
        """Whether each line of the input says itself what is asked, see `source.openai`."""
        return self.input.format == "openai"

    @property
    def tells_samples(self) -> bool:
        """Whether samples are judged, and told, one by one."""
        return self.sampling.n > 1 and self.output.samples is not False

    @property
    def root(self) -> Root:
        """Where the output is."""
        if is_url(self.output.path):
            return Bucket(self.output.path, **self.storage.model_dump())
        return Path(self.output.path)

    @property
    def run_date(self) -> date:
        """The day that dates in paths are counted from; no key of the file, not in the recipe."""
        return self._run_date

    def dated(self, run_date: date) -> Self:
        """The same job with another `run_date`; paths that are resolved already stay."""
        copy = self.model_copy()
        copy._run_date = run_date
        return copy

    def quiet(self) -> Self:
        """The same job on one engine here, whose end nobody is told of."""
        alone: dict[str, Any] = {"on_finish": [], "metrics_file": None}
        alone |= {"replicas": 1, "ray_address": None}
        return self.changed(run=alone)

    def changed(self, **tables: Mapping[str, Any]) -> Self:
        """The same job but for some keys of some tables, which are not checked."""
        changes = {
            name: getattr(self, name).model_copy(update=keys) for name, keys in tables.items()
        }
        return self.model_copy(update=changes)

    @property
    def tuned(self) -> Tuned | None:
        """The tuned file beside the job file, see `use_tuned`; no key of the file either."""
        return self._tuned

    def tuned_by(self, tuned: Tuned) -> Self:
        """The same job, saying which tuned file there is."""
        copy = self.model_copy()
        copy._tuned = tuned
        return copy
