"""`examine`: a job and a machine to a report. Nothing is loaded, and nothing of the output touched.

A check that fails hides none of the others, as far as they can be made without it.
"""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from batchgen.cluster.crews import is_fleet, needs_of, share_gpu
from batchgen.core.errors import BatchgenError, ConfigError
from batchgen.engine.vllm.settings import gpus_of, llm_kwargs
from batchgen.pipeline.decide import refuse_foreign
from batchgen.pipeline.prepare import engine_spec, prepare
from batchgen.preview import fit, places
from batchgen.preview.doctor_report import Report
from batchgen.preview.engine_keys import check_keywords, check_settings, least_model_len
from batchgen.preview.findings import Finding, ok, problem, warning
from batchgen.preview.hub import HuggingFace, find_model
from batchgen.preview.lengths import row_lengths
from batchgen.preview.machine import read_machine
from batchgen.preview.model import Model, read_model
from batchgen.preview.replicas import check_replicas
from batchgen.preview.software import check_device, check_versions
from batchgen.preview.tokens import max_model_len

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from batchgen.core.records import EngineSpec
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.prepare import Prepared
    from batchgen.preview.hub import Found, Hub
    from batchgen.preview.lengths import RowLengths
    from batchgen.preview.machine import Machine, Probe


MAX_SETTING = 2**53
"""As of every number of a job file."""


def examine(
    load: Callable[[], JobConfig],
    job_file: Path | None = None,
    probe: Probe = read_machine,
    hub: Hub | None = None,
) -> Report:
    """Say whether this machine can run a job.

    Args:
        load: Loads the job; what it raises is a problem like any other.
        job_file: For its time; None if the job is not from a file.
        probe: Reads the machine.
        hub: Asked for models that are not in a folder; None: the Hugging Face hub.
    """
    machine = probe()
    try:
        job = load()
    except BatchgenError as error:
        return Report([problem("job", _one_line(error))], machine)
    if job.model.backend == "vllm":
        return _with_model(job, machine, hub or HuggingFace(), job_file)
    findings = [ok("model", "echo needs neither GPU nor vLLM")]
    findings += places.check_host(machine, 0, job_file)
    findings += check_replicas(job, machine)
    findings += _output(job, _prepared(job, findings), None)
    return Report(findings, machine)


def _with_model(job: JobConfig, machine: Machine, hub: Hub, job_file: Path | None) -> Report:
    found, findings = find_model(job.model, hub), list[Finding]()
    local = _shared(_localized(job, found))
    spec = engine_spec(local, str(found.folder or ""))
    is_cpu = machine.build == "cpu"
    kwargs = _bounded(_kwargs(spec, findings, is_cpu=is_cpu), findings)
    num_gpus = gpus_of(kwargs, is_cpu=is_cpu)
    limit = max_model_len(spec, None)[0] if found.folder is not None else None
    findings = [
        *check_versions(machine),
        *check_device(machine, num_gpus),
        *check_replicas(job, machine),
        *found.findings,
        *places.check_host(machine, num_gpus, job_file),
        *check_keywords(job.model.engine),
        *check_settings(kwargs, least_model_len(kwargs, found.folder, limit)),
        *findings,
    ]
    prepared = _prepared(local, findings) if found.folder is not None else None
    rows = _rows(prepared, limit, findings) if prepared is not None else None
    model = None
    if found.folder is not None:
        model = read_model(found, kwargs, machine, limit, num_gpus)
        findings += model.findings
    held = _fit(model, rows, findings) if model is not None else None
    findings += _output(job, prepared, rows)
    return Report(
        findings=findings,
        machine=machine,
        can_run=model.can_run if model else {},
        weights=model.weights if model else None,
        settings=model.settings if model and held else None,
        memory=model.memory if model else None,
        fit=held,
        rows=rows,
    )


def _localized(job: JobConfig, found: Found) -> JobConfig:
    """The same job, with nothing left to fetch when it is prepared."""
    changes: dict[str, Any] = {}
    if found.commit is not None:
        changes = {"revision": found.commit}
    elif found.missing_bytes and found.folder is not None:
        changes = {"name": str(found.folder), "revision": None}
    return job.model_copy(update={"model": job.model.model_copy(update=changes)})


def _shared(job: JobConfig) -> JobConfig:
    """The job as its engine gets it, which may have to share a GPU with another replica's."""
    try:
        return share_gpu(job, needs_of(job)) if is_fleet(job) else job
    except ConfigError:  # Told by `check_replicas`.
        return job


def _kwargs(spec: EngineSpec, findings: list[Finding], *, is_cpu: bool) -> Mapping[str, Any]:
    try:
        return llm_kwargs(spec, is_cpu=is_cpu)
    except BatchgenError as error:
        findings.append(problem("lora", _one_line(error)))
    except (OSError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        # Of the adapters' and the model's files, and the job's own keywords.
        findings.append(problem("model", f"the engine's settings: {_one_line(error)}"))
    return spec.model_kwargs


def _bounded(kwargs: Mapping[str, Any], findings: list[Finding]) -> Mapping[str, Any]:
    """Without numbers that mean nothing, and that no sum could be made with."""
    beyond = [
        name
        for name, value in kwargs.items()
        if isinstance(value, (int, float)) and not abs(value) <= MAX_SETTING
    ]
    for name in beyond:
        text = f"model.engine.{name} = {short(kwargs[name])}, expected {MAX_SETTING:,} at most"
        findings.append(problem("job", text))
    return {name: value for name, value in kwargs.items() if name not in beyond}


def _prepared(job: JobConfig, findings: list[Finding]) -> Prepared | None:
    try:
        return prepare(job)
    except (BatchgenError, OSError) as error:  # A file of the model that may not be read.
        findings.append(problem("job", _one_line(error), "batchgen check JOB shows more"))
        return None


def _rows(prepared: Prepared, limit: int | None, findings: list[Finding]) -> RowLengths | None:
    try:
        rows = row_lengths(prepared, limit)
    except BatchgenError as error:
        findings.append(problem("input", _one_line(error)))
        return None
    if rows is None:
        findings.append(warning("rows", "the input's first rows hold no prompt", "batchgen check"))
    return rows


def _fit(model: Model, rows: RowLengths | None, findings: list[Finding]) -> fit.Fit | None:
    """Rows at once, where the device and the weights are known."""
    if model.settings is None or not (model.memory or model.kv_cache_tokens):
        if rows is not None:
            findings.append(ok("rows", fit.told_rows(rows)))
        return None
    settings, tokens = model.settings, model.kv_cache_tokens
    held = fit.fit_of(tokens, settings.max_num_seqs, settings.max_model_len, rows)
    if tokens != 0:
        findings += fit.check_kv_cache(held, model.shape, settings)
        findings += fit.check_rows(held, rows, settings)
    return held


def _output(
    job: JobConfig, prepared: Prepared | None, rows: RowLengths | None
) -> Iterator[Finding]:
    root = Path(job.output.path)
    try:
        refuse_foreign(root)
    except BatchgenError as error:
        yield problem("output", _one_line(error))
        return
    needed = None
    if prepared is not None:
        answer = rows.answer if rows is not None else float(job.sampling.max_tokens)
        needed = places.output_bytes(prepared, answer)
    yield from places.check_output(root, needed)


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
