"""What refuses a run before it has done anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen import frozen
from batchgen.errors import OutputError, RecipeChangedError
from batchgen.ledger import STATE

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.books import Plan
    from batchgen.planning import Prepared


def check_input(prepared: Prepared, plan: Plan, *, is_published: bool) -> list[str]:
    """Refuse a job whose input is not the plan's; return warnings.

    Raises:
        RecipeChangedError: Planned files changed; or, once published, files came.
    """
    changes = frozen.input_changes(plan, prepared.reader)
    new_files = frozen.new_files(plan, prepared.job)
    if is_published:
        changes += [f"input: {path} is new" for path in new_files]
    if changes:
        raise RecipeChangedError(prepared.job.output.path, changes)
    if is_published or not new_files:
        return []
    return [
        f"{len(new_files)} input files came after the plan was made, such as {new_files[0]}: not "
        "in this snapshot"
    ]


def refuse_foreign(root: Path) -> None:
    """An output folder is ours, empty or absent; its state is not somewhere else."""
    for link in (root / STATE, *(root / STATE).glob("*")):
        if link.is_symlink():
            msg = f"{link}: is a link, expected a folder; remove it or choose another output.path"
            raise OutputError(msg)
    if root.exists() and not root.is_dir():
        msg = f"{root}: is a file, expected a folder; choose another output.path"
        raise OutputError(msg)
    # In this order: a run that starts beside this one makes STATE before anything else.
    if root.is_dir() and any(root.iterdir()) and not (root / STATE).is_dir():
        msg = f"{root}: holds files that are not batchgen's; choose another output.path"
        raise OutputError(msg)
