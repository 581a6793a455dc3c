"""What refuses a run before it has done anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchgen.core.errors import OutputError
from batchgen.store.names import STATE

if TYPE_CHECKING:
    from pathlib import Path


def refuse_foreign(root: Path) -> None:
    """An output folder is ours, empty or absent; its state is not somewhere else."""
    for link in (root / STATE, *(root / STATE).glob("*")):
        if link.is_symlink():
            msg = f"{link}: is a link, expected a folder; remove it or choose another output.path"
            raise OutputError(msg)
    nearest = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    if not nearest.is_dir():
        msg = f"{nearest}: is a file, expected a folder; choose another output.path"
        raise OutputError(msg)
    # In this order: a run that starts beside this one makes STATE before anything else.
    if root.is_dir() and any(root.iterdir()) and not (root / STATE).is_dir():
        msg = f"{root}: holds files that are not batchgen's; choose another output.path"
        raise OutputError(msg)
