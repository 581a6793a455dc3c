"""`[run]` and `[storage]` of the job file, and what all of its tables are; see `model`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PRICE_FORM = r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]{3}|[$\u20ac\u00a3])?"
"""Form of a price: `2.5`, `2.5EUR`, `2.5 $`."""
PositiveInt = Annotated[int, Field(gt=0, le=2**53)]


class Table(BaseModel):
    """Base of every table: unknown keys are mistakes, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class RunConfig(Table):
    """How a run behaves. Nothing here changes an answer; change it freely between runs."""

    flush_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """A finished row is durable within so many seconds: what a crash can cost."""
    flush_rows: PositiveInt = 20_000
    """Commit after so many finished rows at the latest."""
    flush_mib: PositiveInt = 64
    """Commit after about so many MiB of finished rows at the latest."""
    max_in_flight: PositiveInt | None = None
    """Requests inside the engine at once. Default: twice its max_num_seqs, which saturates it."""
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    """After SIGTERM or Ctrl-C: how long rows in flight may take to finish."""
    disk_grace_s: Annotated[float, Field(ge=0)] = 300.0
    """How long a full or failing disk may take to recover while finished rows wait in memory."""
    stall_s: Annotated[float, Field(gt=0)] = 900.0
    """An engine that has work and makes no progress for so many seconds counts as dead."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """With `model.base_url`: at most so many requests are sent, to all servers together."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """The same for tokens, of prompts and answers."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """With `model.base_url`: an answer that takes longer is given up and asked for again."""
    endpoint_grace_s: Annotated[float, Field(ge=0)] = 300.0
    """With `model.base_url`: how long no server may answer anything before the run stops; run again
    to go on."""
    max_tokens_total: PositiveInt | None = None
    """A budget: the run stops, with exit code 75, before its prompts and answers are more tokens.
    What was answered stays; the next run has the same budget again."""
    stats_s: Annotated[float, Field(gt=0)] = 5.0
    """A row in stats.parquet every so many seconds."""
    replicas: PositiveInt | Literal["auto"] = 1
    """Engines that work on the job, placed by Ray; auto: as many as the cluster has room for."""
    ray_address: Annotated[str, Field(min_length=1)] | None = None
    """Ray cluster that places them, such as `auto` or `host:6379`. Default: this machine alone."""
    gpus_per_replica: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each; below 1 they share one. Default: tensor_parallel_size x
    pipeline_parallel_size; none for vLLM's CPU build."""
    engines_per_gpu: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = "auto"
    """Engines that share a GPU, each in processes of its own, and divide its memory: what
    gpu_memory_utilization or kv_cache_memory_bytes says is for all of them. auto: two where the
    GPU would wait for vLLM's Python most of the time, a small model with much to write or many
    short texts to embed; else one."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores that Ray counts for each."""
    dedupe: Literal["auto", "always", "never"] = "auto"
    """Rows with equal requests run once and all get the answer: auto where sampling is
    deterministic, always also where it is not, or never."""
    order: Literal["auto", "input", "prefix"] = "auto"
    """In which order rows reach the engine; the output's is always the input's. auto: where it
    pays, long answers first and like prompts together, within some 30,000 rows; prefix: the
    same, by the prompts' text in any case; input: as they come."""
    engine_defaults: Literal["batchgen", "vllm"] = "batchgen"
    """Who chooses settings of the engine that the job leaves open and that only change its speed:
    CUDA graphs for as many rows as run at once, no compiling where it does not pay."""
    on_finish: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Command to run at the end, [program, arguments...]; it gets the run's summary as JSON on
    stdin. A program with a slash is relative to the job file. Its failure is only a warning."""
    metrics_file: Annotated[str, Field(min_length=1)] | None = None
    """Where to write figures of the last run for Prometheus (textfile collector, *.prom).
    Relative to the job file."""

    report: Literal["full", "no-rows", "none"] = "full"
    """report.html that a run leaves in its folder: with texts of some rows and of errors, without
    any (for private data), or none at all."""
    gpu_cost: Annotated[str, Field(pattern=f"^{PRICE_FORM}$")] | None = None
    """Price of a GPU for an hour, such as 2.5EUR: `plan` and reports tell costs by it."""

    @model_validator(mode="after")
    def _has_one_purse(self) -> Self:
        if self.max_tokens_total is not None and self.is_cluster:
            msg = "max_tokens_total is counted in one process, and does not go with replicas"
            raise ValueError(msg)
        return self

    @property
    def is_cluster(self) -> bool:
        """Whether replicas are to be placed, even if it is one, on a cluster."""
        return self.replicas != 1 or self.ray_address is not None


class StorageConfig(Table):
    """How an object store is reached. Credentials come from the environment, as for other tools."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")
    """URL of a store that is not Amazon's. Default: `AWS_ENDPOINT_URL`, else Amazon's."""
    region: str | None = None
    """Default: `AWS_REGION`, or the profile's."""
    profile: str | None = None
    """Of `~/.aws/config`. Default: `AWS_PROFILE`, or whatever else the machine has."""
    kms_key: str | None = None
    """ID or ARN of the key that objects are encrypted with. Default: as the bucket says."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """How long the store may be silent in a request before it is sent again."""
