"""What a run is asked for beside its job."""

from __future__ import annotations

from dataclasses import dataclass

from batchgen.errors import ConfigError


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

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: fresh and retry_errors.
        """
        if self.fresh and self.retry_errors:
            where = "run"
            problem = "fresh runs every row again and retry_errors only some, expected one of them"
            raise ConfigError(where, [problem])
