"""How right published labels are: held against gold labels that the input carries.

Metrics are scikit-learn's, by its definitions. A row without an answer counts as wrong: a job does
not become better by failing. Memory holds a count for each pair of labels and, where answers have
probabilities, 9 bytes for each row with a gold label.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from batchgen.core.errors import ConfigError, OutputError, suggestion
from batchgen.core.runtime import Told, option
from batchgen.pipeline.gold import MOST_LABELS, missing_column, right_label
from batchgen.storage.remote import storage_at
from batchgen.store.ledger import Ledger
from batchgen.store.snapshot import find_snapshot
from batchgen.views.sides import Side

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.core.places import Root
    from batchgen.job.model import ScoreConfig

NO_ANSWER = "(no answer)"
_BINS = 10
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class LabelScore:
    """How well one label is found."""

    label: str
    precision: float
    """Of the answers with this label, the share that is right; 0 without one."""
    recall: float
    """Of the rows that have this gold label, the share that is answered so; 0 without one."""
    f1: float
    num_gold: int
    num_answered: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether answers are right as often as their probabilities say."""

    num_rows: int
    """With a probability of the label that was answered."""
    expected_error: float
    """Expected calibration error: mean distance of probability and share of right ones, by bins."""
    brier: float
    """Brier score: mean squared distance of the probability from 1 for right, 0 for wrong."""
    bins: Sequence[Mapping[str, Any]]
    """Tenths of the probability that hold rows: `from`, `to`, `num_rows`, `mean_probability`,
    `accuracy`."""
    wanted_precision: float | None = None
    threshold: float | None = None
    """The least probability from which on answers have the wanted precision; None: none has."""
    threshold_precision: float | None = None
    threshold_share: float | None = None
    """Share of all rows with a gold label that it leaves."""


@dataclass(frozen=True, slots=True, repr=False)
class Score(Told):
    """A snapshot's labels, scored."""

    output: str
    snapshot: int
    gold: str
    """Names of the columns."""
    answer: str
    num_rows: int
    """With a gold label."""
    num_without_gold: int
    num_unanswered: int
    """Rows with a gold label that are errors; they count as wrong."""
    accuracy: float | None
    """Of all rows with a gold label; None without one."""
    macro_f1: float | None
    """Mean F1 of the labels that rows have as gold."""
    labels: Sequence[LabelScore]
    confusion: Sequence[Mapping[str, Any]]
    """`gold`, `answered` (None: no answer), `num_rows`; most rows first."""
    calibration: Calibration | None = None
    """None where answers have no probabilities."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """Write it for a person."""
        lines = [
            f"{self.answer} against {self.gold}, snapshot {self.snapshot}: {self.num_rows:,} rows "
            f"with a gold label, {self.num_without_gold:,} without"
        ]
        if self.accuracy is None or self.macro_f1 is None:
            return lines[0]
        num = self.num_unanswered
        errors = f"; {num:,} without an answer are wrong" if num else ""
        lines.append(f"accuracy {self.accuracy:.1%}, macro F1 {self.macro_f1:.3f}{errors}")
        lines.append(f"  {'label':22} {'F1':>6} {'precision':>10} {'recall':>7} {'gold':>9}")
        for one in sorted(self.labels, key=lambda one: -one.num_gold):
            figures = f"{one.f1:6.3f} {one.precision:10.3f} {one.recall:7.3f} {one.num_gold:9,}"
            lines.append(f"  {one.label:22} {figures}")
        wrong = [pair for pair in self.confusion if pair["gold"] != pair["answered"]]
        for pair in wrong[:_SHOWN]:
            answered = NO_ANSWER if pair["answered"] is None else pair["answered"]
            lines.append(f"  {pair['num_rows']:,} rows: {pair['gold']}, answered {answered}")
        if len(wrong) > _SHOWN:
            lines.append(f"  and {len(wrong) - _SHOWN} more pairs, see {option('--json')}")
        return "\n".join([*lines, *_calibration_lines(self.calibration)])


def _calibration_lines(found: Calibration | None) -> list[str]:
    if found is None:
        return ["no probabilities: set sampling.logprobs to have them"]
    lines = [
        f"calibration error {found.expected_error:.3f}, Brier score {found.brier:.3f}, "
        f"of {found.num_rows:,} rows with a probability"
    ]
    for one in found.bins:
        mean, right = f"mean {one['mean_probability']:.3f}", f"{one['accuracy']:.1%} right"
        lines.append(
            f"  {one['from']:.1f}-{one['to']:.1f} {one['num_rows']:9,} rows, {mean}, {right}"
        )
    if found.wanted_precision is None:
        return lines
    if found.threshold is None:
        return [*lines, f"no probability from which on {found.wanted_precision:.1%} are right"]
    share, right = f"{found.threshold_share:.1%}", f"{found.threshold_precision:.1%}"
    told = f"from a probability of {found.threshold:.4g} on {right} are right: {share} of the rows"
    return [*lines, told]


def score(root: Root, table: ScoreConfig, snapshot: int | None = None) -> Score:
    """Score what is published against gold labels.

    Args:
        root: The output folder.
        table: Which columns, and the wanted precision.
        snapshot: Its number; None: the newest.

    Raises:
        ConfigError: scikit-learn is not installed, or a column is none that can be scored.
        OutputError: There is no such snapshot, or it cannot be read.
    """
    _check_installed()
    ledger = Ledger(storage_at(root))
    number = find_snapshot(ledger, snapshot).number
    try:
        side = Side(ledger, number)
        gold, name = _gold(side, table), _answer(side, table.answer)
        rows = side.frame.select(gold.alias("gold"), side.labels[name].alias("answered"))
        counts = rows.group_by("gold", "answered").len(name="num_rows").collect(engine="streaming")
        scored = counts.filter(pl.col("gold").is_not_null())
        if scored["gold"].n_unique() > MOST_LABELS:
            problem = f"{table.gold!r} has more than {MOST_LABELS:,} values, expected labels"
            raise _wrong(problem)
        num_rows = int(scored["num_rows"].sum())
        return Score(
            output=str(root),
            snapshot=number,
            gold=str(table.gold) + (f" of {table.gold_path}" if table.gold_path else ""),
            answer=side.plan.prefix + name,
            num_rows=num_rows,
            num_without_gold=int(counts["num_rows"].sum()) - num_rows,
            num_unanswered=int(scored.filter(pl.col("answered").is_null())["num_rows"].sum()),
            **_labels(scored),
            confusion=scored.sort(
                *("num_rows", "gold", "answered"), descending=[True, False, False]
            ).to_dicts(),
            calibration=_calibration(side, gold, name, num_rows, table.precision),
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise OutputError(f"{root}: cannot be scored ({str(error).splitlines()[0]})") from error


def _check_installed() -> None:
    try:
        import sklearn.metrics  # noqa: F401
    except ModuleNotFoundError as error:
        where, told = "score", "scikit-learn is not installed"
        raise ConfigError(
            where, [f"{told}: pip install scikit-learn, or the extra score"]
        ) from error


def _wrong(problem: str) -> ConfigError:
    return ConfigError("[score]", [problem])


def _gold(side: Side, table: ScoreConfig) -> pl.Expr:
    """Read gold labels as texts, null where there is none.

    Raises:
        ConfigError: There is no such column, or it holds no labels.
    """
    names = [carried for carried in side.plan.carried if carried in side.schema]
    name = table.column
    if table.gold is None or name is None or name not in names:
        problem = missing_column(table, names)
        raise _wrong(problem)
    kind = side.schema[name]
    is_text = kind in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)
    if not is_text and not kind.is_integer() and table.gold_path is None:
        problem = f"gold: {name!r} is {kind}, expected texts or whole numbers"
        raise _wrong(problem)
    return right_label(table, name)


def _answer(side: Side, wanted: str | None) -> str:
    """Find the labels to score, by their name without the prefix.

    Raises:
        ConfigError: There are none, or several and nobody says which.
    """
    names = {side.plan.prefix + name: name for name in side.labels}
    if wanted is not None and wanted in names:
        return names[wanted]
    if wanted is not None:
        problem = f"answer: {wanted!r} holds no labels{suggestion(wanted, names)}"
        raise _wrong(problem)
    if len(names) == 1:
        return next(iter(names.values()))
    if not names:
        problem = f"snapshot {side.manifest.number} has no labels to score"
        raise _wrong(problem)
    problem = f"answer: missing, expected {option('--answer')} with one of {', '.join(names)}"
    raise _wrong(problem)


def _labels(scored: pl.DataFrame) -> dict[str, Any]:
    """Figures of counts by gold and answered label."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    if scored.is_empty():
        return {"accuracy": None, "macro_f1": None, "labels": []}
    # Apart from each label, whatever labels are called: a text of no answer could be one.
    gold = [f"={label}" for label in scored["gold"]]
    told = ["" if label is None else f"={label}" for label in scored["answered"]]
    num = scored["num_rows"].to_list()
    names = sorted({*gold, *told} - {""})
    figures = precision_recall_fscore_support(
        gold, told, labels=names, sample_weight=num, zero_division=0.0
    )
    answered: dict[str, int] = dict.fromkeys(names, 0)
    for label, rows in zip(told, num, strict=True):
        answered[label] = answered.get(label, 0) + rows
    labels = [
        LabelScore(name[1:], float(p), float(r), float(f1), round(support), answered[name])
        for name, p, r, f1, support in zip(names, *figures, strict=True)
    ]
    with_gold = [one.f1 for one in labels if one.num_gold]
    return {
        "accuracy": float(accuracy_score(gold, told, sample_weight=num)),
        "macro_f1": sum(with_gold) / len(with_gold),
        "labels": labels,
    }


def _probability(side: Side, name: str) -> pl.Expr | None:
    """Read the probability of the label that was answered; None where there is none."""
    column = f"{side.plan.prefix}probabilities"
    kind = side.schema.get(column)
    if not isinstance(kind, pl.Struct):
        return None
    value = pl.col(column)
    if any(isinstance(one.dtype, pl.Struct) for one in kind.fields):  # Of several labels.
        field = name.removeprefix("output.")
        inner = dict(kind).get(field)
        if not isinstance(inner, pl.Struct):
            return None
        value, kind = value.struct.field(field), inner
    label = side.labels[name]
    return pl.coalesce(
        pl.when(label == one.name).then(value.struct.field(one.name)) for one in kind.fields
    )


def _calibration(
    side: Side, gold: pl.Expr, name: str, num_rows: int, wanted: float | None
) -> Calibration | None:
    from sklearn.metrics import brier_score_loss

    probability = _probability(side, name)
    if probability is None:
        return None
    rows = (
        side.frame.select(
            gold.alias("gold"), p=probability.cast(pl.Float64), right=gold == side.labels[name]
        )
        .drop_nulls()
        .drop("gold")
        .collect(engine="streaming")
    )
    if rows.is_empty():
        return None
    tenth = (pl.col("p") * _BINS).floor().clip(0, _BINS - 1).cast(pl.Int32)
    bins = (
        rows.group_by(tenth.alias("bin"))
        .agg(
            num_rows=pl.len(), mean_probability=pl.col("p").mean(), accuracy=pl.col("right").mean()
        )
        .sort("bin")
    )
    far = (pl.col("mean_probability") - pl.col("accuracy")).abs()
    error = bins.select((far * pl.col("num_rows")).sum() / pl.col("num_rows").sum()).item()
    return Calibration(
        num_rows=len(rows),
        expected_error=error,
        brier=float(brier_score_loss(rows["right"].to_numpy(), rows["p"].clip(0, 1).to_numpy())),
        bins=[
            {"from": (at := one.pop("bin")) / _BINS, "to": (at + 1) / _BINS, **one}
            for one in bins.to_dicts()
        ],
        **_threshold(rows, num_rows, wanted),
    )


def _threshold(rows: pl.DataFrame, num_rows: int, wanted: float | None) -> dict[str, Any]:
    """Find the least probability from which on answers are as precise as wanted."""
    from sklearn.metrics import precision_recall_curve

    if wanted is None:
        return {}
    found: dict[str, Any] = {"wanted_precision": wanted}
    if not rows["right"].any():
        return found
    precisions, _, thresholds = precision_recall_curve(rows["right"], rows["p"])
    for precision, threshold in zip(precisions, thresholds, strict=False):
        if precision >= wanted:
            num = int((rows["p"] >= threshold).sum())
            found |= {"threshold": float(threshold), "threshold_precision": float(precision)}
            return {**found, "threshold_share": num / num_rows}
    return found
