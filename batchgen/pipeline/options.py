"""What a run is asked for beside its job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchgen.core.errors import ConfigError

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of `batchgen run`."""

    fresh: bool = False
    """Begin a new plan even if the old one is unfinished or another recipe's."""
    steal: bool = False
    """Take the job from a run that holds it and cannot be stopped, a frozen one."""
    retry_errors: bool = False
    """Run the error rows of a finished job again, and take its other rows over."""
    publish_anyway: bool = False
    """Publish although a limit of `[gate]` is exceeded."""

    accept_recipe: bool = False
    """Where the recipe has changed: begin a plan by the new one, and relabel every row."""
    only_errors: bool = False
    """With accept_recipe: take over what is ok; run error, edited and new rows."""
    wait: bool = False
    """Wait for a run that holds the job, and begin when it has ended."""
    until: datetime | None = None
    """Stop in time to have committed by then; aware."""
    max_runtime_s: float | None = None
    """The same as seconds from the start of the run."""

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: With all of it.
        """
        wrong = {
            "fresh runs every row again and retry_errors only some, expected one of them": (
                self.fresh and self.retry_errors
            ),
            "fresh begins anew by any recipe, expected it without accept_recipe": (
                self.fresh and self.accept_recipe
            ),
            "wait waits for a run that holds the job and steal takes it, expected one of them": (
                self.wait and self.steal
            ),
            "only_errors says which rows a new recipe is for, expected accept_recipe with it": (
                self.only_errors and not self.accept_recipe
            ),
        }
        if problems := [problem for problem, is_wrong in wrong.items() if is_wrong]:
            where = "run"
            raise ConfigError(where, problems)
