"""How right the quickstart's labels are, read back the way a user's own script would."""

import sys
from pathlib import Path

import polars as pl

import batchgen

JOB = Path(__file__).with_name("quickstart.toml")


def main() -> int:
    """Compare the labels with the sample's gold column; return a shell's exit code."""
    rows = batchgen.read(JOB).filter(gen_status="ok")
    scored = rows.select(
        right=pl.col("gen_text").str.strip_chars() == pl.col("gold_label"), hard=pl.col("hard")
    ).collect()
    share = scored["right"].mean()
    hard = scored.filter("hard")["right"].mean()
    example = rows.select("subject", "gen_text").head(3).collect()
    print(
        f"\n{share:.1%} of {len(scored):,} labels are right ({hard:.1%} of the hard ones). Such as:"
    )
    for subject, label in example.iter_rows():
        print(f"  {label:16} {subject}")
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
