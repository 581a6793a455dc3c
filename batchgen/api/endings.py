"""What the doors add once a run has ended: examples of errors, the report with score and costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from batchgen.core.errors import BatchgenError

if TYPE_CHECKING:
    from batchgen.job.model import JobConfig
    from batchgen.pipeline.context import Summary
    from batchgen.preview.estimate import Price
    from batchgen.report_page.facts import ReportOptions


def look_back(job: JobConfig, summary: Summary) -> None:
    """Add what people look at once a run has ended: trouble with it is not the run's."""
    try:
        _add_examples(job, summary)
    except Exception as error:  # noqa: BLE001 - of whatever library: the run is over
        summary.warnings.append(f"the run's report could not be written: {error!r:.200}")


def deliver(job: JobConfig) -> None:
    """Write what the job wants beside its Parquet, of the newest snapshot.

    Raises:
        OutputError: It cannot be written; another run does it again.
    """
    if job.output.openai:
        from batchgen.views.batch_files import refresh

        refresh(Path(job.output.path))


def _add_examples(job: JobConfig, summary: Summary) -> None:
    root = job.root
    if summary.num_errors:
        from batchgen.views.rows import error_lines

        summary.error_examples.extend(error_lines(root))
    if summary.summary_path is not None and job.run.report != "none":
        from batchgen.report_page.page import write_report

        options = report_options(job, None, with_rows=job.run.report == "full")
        write_report(root, options, run_id=summary.run_id)


def report_options(job: JobConfig | None, price: Price | None, *, with_rows: bool) -> ReportOptions:
    """Say what a report tells; without the job no price is known but a given one."""
    from batchgen.engine.vllm.settings import engine_gpus
    from batchgen.preview.estimate import read_price
    from batchgen.report_page.facts import ReportOptions

    score = _score_text(job, with_labels=with_rows) if job is not None else ""
    if price is None and job is not None and job.run.gpu_cost is not None:
        price = read_price(job.run.gpu_cost)
    if price is None or (job is not None and job.run.replicas == "auto"):
        return ReportOptions(with_rows, score=score)
    num_gpus = engine_gpus(job) * int(job.run.replicas) if job is not None else 1
    return ReportOptions(with_rows, (price.per_hour * num_gpus, price.currency), score)


def _score_text(job: JobConfig, *, with_labels: bool) -> str:
    """Write the score of what is published; gold labels are rows' own, unlike those of the job."""
    from batchgen.quality.score import score as score_output

    if job.score.gold is None:
        return ""
    try:
        text = score_output(job.root, job.score).as_text()
    except BatchgenError as error:
        text = f"not scored: {error}"
    return text if with_labels else "\n".join(text.splitlines()[:2])
