"""The files of a run's end: each is tried, whatever became of the others, so that a disk without
room for one of them costs no other."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from hosl_flower.errors import DivergedError, HoslError
from hosl_flower.run.checkpoint import steps as checkpoints

log = logging.getLogger("hosl_flower")


class Ending:
    """What could not be written of a run that has taken all its steps. failures: by what was to be
    written."""

    def __init__(self) -> None:
        self.failures: dict[str, OSError | DivergedError] = {}

    @property
    def diverged(self) -> bool:
        """Whether something is not written since its values are not finite."""
        return any(isinstance(error, DivergedError) for error in self.failures.values())

    def attempt(self, what: str, write: Callable[[], object]) -> None:
        """Write something, or note that it could not be."""
        try:
            write()
        except (OSError, DivergedError) as error:
            self.failures[what] = error

    def check(self, directory: Path, steps: int) -> None:
        """HoslError unless everything of a run of so many steps has been written: DivergedError
        where room would not have helped."""
        if not self.failures:
            return
        failed = "; ".join(f"{what} ({error})" for what, error in self.failures.items())
        lost = "results.json" in self.failures
        kept = "the log has the results" if lost else "results.json is there"
        said = (
            f"the run has taken all its steps, but some of {directory} could not be written: "
            f"{failed}; {kept}"
        )
        if self.diverged:
            raise DivergedError(said)
        raise HoslError(f"{said}; make room there, {_way_on(directory, steps)}")


def warn_of_room(directory: Path, needed: int) -> None:
    """Warn where a model of so many bytes does not fit now."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        log.warning(
            "%s has %.1f MB free and the model will need about %.1f MB: make room before the run "
            "ends",
            directory,
            free / 1e6,
            needed / 1e6,
        )


def _way_on(directory: Path, steps: int) -> str:
    step = next(iter(checkpoints(directory)), None)
    if step is None:
        return "and take the run again for what is missing: there is no checkpoint to make it from"
    again = "without training" if step == steps else f"after it has taken the steps from {step}"
    return (
        f"then resume={directory} writes what is missing, {again}; what it writes can be exported"
    )
