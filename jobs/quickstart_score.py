"""How right the quickstart's labels are, read back the way a user's own script would."""

import sys
from pathlib import Path

import polars as pl

import batchgen

JOB = Path(__file__).with_name("quickstart.toml")
SURE = 0.99


def main() -> int:
    """Compare the labels with the sample's gold columns; return a shell's exit code."""
    rows = batchgen.read(JOB).filter(gen_status="ok")
    chance = pl.col("gen_probabilities").struct.field("label")
    scored = rows.select(
        "subject",
        "gen_label",
        "gen_urgency",
        "hard",
        right=pl.col("gen_label") == pl.col("gold_label"),
        # The likeliest label's; greedy answers take it.
        probability=pl.max_horizontal(chance.struct.unnest()),
    ).collect()
    sure = scored.filter(pl.col("probability") >= SURE)
    print(
        f"\n{scored['right'].mean():.1%} of {len(scored):,} labels are right "
        f"({scored.filter('hard')['right'].mean():.1%} of the hard ones).\n"
        f"Those with a probability of {SURE} or more, {len(sure) / len(scored):.0%} of the rows: "
        f"{sure['right'].mean():.1%} right. Such as:"
    )
    for subject, label, urgency, *_, probability in scored.head(4).iter_rows():
        print(f"  {label:16} {urgency:7} {probability:.2f}  {subject}")
    print(
        "\nNext:\n"
        "  .venv/bin/batchgen show jobs/quickstart.toml -n 3\n"
        "  .venv/bin/batchgen show jobs/quickstart.toml --errors\n"
        '  .venv/bin/python -c "import batchgen; '
        "print(batchgen.read('jobs/quickstart.toml').collect())\"\n"
        "  edit jobs/quickstart.toml, then: .venv/bin/batchgen check jobs/quickstart.toml"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
