"""`examine`: a job and a machine to a report. Nothing is loaded, and nothing of the output touched.

A check that fails hides none of the others, as far as they can be made without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchgen.cluster.machines import resources_of, share_gpu
from batchgen.core.errors import BatchgenError, ConfigError, nearest
from batchgen.core.places import Bucket
from batchgen.core.records import EngineSpec
from batchgen.core.runtime import command
from batchgen.engine.vllm.settings import gpus_of, known_keywords, llm_kwargs
from batchgen.engine.vllm.shares import cost_of, engines_that_pay, share_of, this_host
from batchgen.job.model import JobConfig, ModelConfig
from batchgen.job.tuned import above_batched_tokens
from batchgen.pipeline.prepare import Prepared, engine_spec, plain_http, prepare
from batchgen.preview.checkpoint import Found, Hub, HuggingFace, find_model
from batchgen.preview.machine import (
    Finding,
    Machine,
    check_device,
    check_limits,
    check_output,
    check_replicas,
    check_versions,
    of_error,
    ok,
    planned_machine,
    problem,
    read_machine,
    warning,
)
from batchgen.preview.model_check import Report, check_model
from batchgen.preview.sample import LARGE_BYTES, RowLengths, max_model_len, row_lengths
from batchgen.source.files import stat_input
from batchgen.storage.remote import storage_at
from batchgen.store.books import STATE

DTYPES = frozenset({"auto", "half", "float16", "bfloat16", "float", "float32"})
"""What vLLM takes as `dtype`: vllm/config/model.py, ModelDType, 0.26 to 0.33."""
_ANSWER_BYTES_A_TOKEN = 6
"""Text and typed answer, with what goes beside it in the output."""


def examine(
    load: Callable[[], JobConfig],
    probe: Callable[[], Machine] = read_machine,
    hub: Hub | None = None,
) -> Report:
    """Say whether this machine can run a job.

    Args:
        load: Loads the job; what it raises is a problem like any other.
        probe: Reads the machine.
        hub: Asked for models that are not in a folder; None: the Hugging Face hub.
    """
    machine = probe()
    try:
        job = load()
    except BatchgenError as error:
        return Report([of_error("job", error)], machine)
    if job.model.is_vllm:
        return _with_model(job, machine, hub or HuggingFace())
    findings = [ok("model", f"{job.model.backend} needs neither GPU nor vLLM")]
    findings += _of_servers(job.model)
    findings += check_limits(machine, 0)
    findings += check_replicas(job, machine)
    prepared = None
    with _errors_in(findings, "job", f"{command('check')} shows more"):
        prepared = prepare(job)
    _check_output(job, prepared, None, findings)
    return Report(findings, machine)


def _of_servers(model: ModelConfig) -> Iterator[Finding]:
    """Say what can be told of servers without a word to them."""
    if model.urls:
        yield ok("servers", f"{', '.join(model.urls)}: a run asks them, before its first row")
    for text in plain_http(model.urls):
        yield warning("servers", text)
    if model.api_key_env is not None and not os.environ.get(model.api_key_env):
        yield problem("key", f"the environment variable {model.api_key_env} is not set")


def examine_on(
    load: Callable[[], JobConfig],
    gpu: str | None = None,
    memory: str | None = None,
    capability: str | None = None,
    count: int | None = None,
) -> Report:
    """Say whether this machine can run a job; or, where a GPU is told of, one that has such GPUs.

    Args:
        load: See `examine`.
        gpu: See `planned_machine`, as for the others.
        memory: Its memory.
        capability: Its compute capability.
        count: How many.

    Raises:
        ConfigError: There is no such GPU.
    """
    is_here = gpu is None and memory is None and capability is None and count is None
    machine = read_machine() if is_here else planned_machine(gpu, memory, capability, count)
    return examine(load, lambda: machine)


def _with_model(job: JobConfig, machine: Machine, hub: Hub) -> Report:
    found, findings, wrong = find_model(job.model, hub), list[Finding](), list[Finding]()
    local, is_cpu = _shared(_localized(job, found)), machine.build == "cpu"
    spec = engine_spec(local, str(found.folder or ""))
    num_engines = _num_engines(job, spec, machine)
    spec = replace(spec, num_sharing=num_engines)
    kwargs = spec.model_kwargs
    with _errors_in(wrong, "lora"):
        kwargs = llm_kwargs(spec, is_cpu=is_cpu)
    num_gpus = gpus_of(kwargs, is_cpu=is_cpu)
    if num_engines > 1 and not is_cpu:
        cost, gpu = cost_of(Path(spec.model), kwargs), next(iter(machine.devices.gpus), None)
        kwargs |= share_of(kwargs, num_engines, cost, gpu.total_bytes if gpu else None)
    findings += [
        *(() if machine.is_planned else check_versions(machine)),
        *check_device(machine, num_gpus),
        *(() if machine.is_planned else check_replicas(job, machine)),
        found.finding,
        *(() if machine.is_planned else check_limits(machine, num_gpus)),
        *check_keywords(job.model.engine),
        *check_settings(kwargs),
        *wrong,
    ]
    prepared, rows, report = None, None, Report(findings, machine)
    if found.folder is not None:
        limit = max_model_len(spec, None)[0]
        with _errors_in(findings, "job", f"{command('check')} shows more"):
            prepared = prepare(local)
        if prepared is not None:
            rows = _rows(prepared, limit, findings)
        report = check_model(found, kwargs, machine, limit, rows, num_engines)
        findings += report.findings
    if not machine.is_planned:
        _check_output(job, prepared, rows, findings)
    return replace(report, findings=findings)


def _num_engines(job: JobConfig, spec: EngineSpec, machine: Machine) -> int:
    """How many engines share a GPU, as a run decides it if there is enough to do."""
    asked, devices = job.run.engines_per_gpu, machine.devices
    if asked != "auto":
        return asked
    is_measured = job.tuned is not None and bool(job.tuned.settings)
    is_own = machine.is_planned or job.run.is_cluster or is_measured
    if is_own or spec.defaults != "batchgen" or not devices.gpus:
        return 1
    host = this_host(len(devices.gpus) + devices.num_hidden)
    return engines_that_pay(spec, devices.gpus[0], host)


@contextmanager
def _errors_in(findings: list[Finding], topic: str, advice: str = "") -> Iterator[None]:
    """Make a problem of an error, so that it hides no other check."""
    try:
        yield
    except (BatchgenError, OSError) as error:
        findings.append(of_error(topic, error, advice))


def _localized(job: JobConfig, found: Found) -> JobConfig:
    """Return the job with nothing left to fetch when it is prepared."""
    changes: dict[str, Any] = {}
    if found.commit is not None:
        changes = {"revision": found.commit}
    elif found.missing_bytes and found.folder is not None:
        changes = {"name": str(found.folder), "revision": None}
    return job.changed(model=changes)


def _shared(job: JobConfig) -> JobConfig:
    """The job as its engine gets it, which may have to share a GPU with another replica's."""
    try:
        return share_gpu(job, resources_of(job)) if job.run.is_cluster else job
    except ConfigError:  # Reported by `check_replicas`.
        return job


def _rows(prepared: Prepared, limit: int | None, findings: list[Finding]) -> RowLengths | None:
    with _errors_in(findings, "input"):
        rows = row_lengths(prepared, limit)
        if rows is None:
            text = "the input's first rows hold no prompt"
            findings.append(warning("rows", text, command("check")))
        return rows
    return None


def check_keywords(
    engine: Mapping[str, Any], known: Collection[str] | None = None
) -> Iterator[Finding]:
    """Say whether vLLM has what `[model.engine]` names.

    Args:
        engine: That table.
        known: vLLM's keywords; None: those of the installed one.
    """
    known = known if known is not None else known_keywords()
    if known is None:
        if engine:
            text = f"whether vLLM knows model.engine's {', '.join(engine)} could not be looked up"
            yield warning("job", text)
        return
    for name in (name for name in engine if name not in known):
        text = f"model.engine.{name}: the installed vLLM has no such keyword"
        if (near := nearest(name, known)) is not None:
            place = "model" if near in ModelConfig.model_fields else "model.engine"
            text = f"{text}, did you mean '{place}.{near}'?"
        yield problem("job", text, "mend it or leave it out")


def check_settings(kwargs: Mapping[str, Any]) -> Iterator[Finding]:
    """Say which values of `LLM(...)`'s keywords vLLM refuses, alone or beside each other.

    Where the job does not say `max_model_len`, what follows from it is left to vLLM.
    """
    dtype = kwargs.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        text = f"dtype {dtype!r}, expected auto, bfloat16, float16 (half), float32 (float)"
        yield problem("dtype", text, "set model.dtype to one of these, or leave it out")
    names = ("max_num_batched_tokens", "max_num_seqs", "max_model_len")
    numbers = {name: found for name in names if isinstance(found := kwargs.get(name), int)}
    if (tokens := numbers.pop("max_num_batched_tokens", None)) is None:
        return
    seqs, length = numbers.get("max_num_seqs"), numbers.get("max_model_len")
    is_chunked = kwargs.get("enable_chunked_prefill") in (None, True)
    above = above_batched_tokens(tokens, seqs, length, is_chunked=is_chunked)
    if above is not None:
        where = " where prefill is not chunked" if above == "max_model_len" else ""
        text = f"which vLLM refuses below {above} = {numbers[above]:,}{where}"
        advice = f"raise model.engine.max_num_batched_tokens, or lower model.{above}"
        yield problem("job", f"max_num_batched_tokens = {tokens}, {text}", advice)


def _check_output(
    job: JobConfig, prepared: Prepared | None, rows: RowLengths | None, findings: list[Finding]
) -> None:
    root, needed = job.root, None
    with _errors_in(findings, "output"):
        storage_at(root).check(STATE, is_dry=isinstance(root, Bucket))
        if prepared is not None:
            answer = rows.answer if rows is not None else float(job.sampling.max_tokens)
            needed = _output_bytes(prepared, answer)
        if isinstance(root, Path):
            findings += check_output(root, needed)


def _output_bytes(prepared: Prepared, answer_tokens: float) -> int | None:
    """About what a job leaves on disk: its parts, and the published files beside them.

    The input stands for the carried columns, though Parquet makes them smaller. Rows of large
    files are not counted, and then no answers either.
    """
    sizes = [stat_input(path).size_bytes for path in prepared.files]
    if any(size < 0 for size in sizes):
        return None
    answers = 0.0
    if sum(sizes) <= LARGE_BYTES:
        num_rows = sum(prepared.reader.scan(path).num_rows for path in prepared.files)
        answers = num_rows * answer_tokens * prepared.job.sampling.n * _ANSWER_BYTES_A_TOKEN
    return round(2 * (answers + (sum(sizes) if prepared.carried else 0)))
