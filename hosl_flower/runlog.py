"""The log of a run, kept in its directory: log.txt has every line of this package's, with the
time, and last the line that says how the run ended if it did not end well."""

import contextlib
import logging
from pathlib import Path
from types import TracebackType

from hosl_flower.errors import HoslError

log = logging.getLogger("hosl_flower")

NAME = "log.txt"
_LINES = 10_000  # kept until there is a directory


class _Quiet(logging.FileHandler):
    """A log that cannot be written, for want of room, stops and disturbs nothing."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it still held
            super().close()


class RunLog:
    """Around a run. Lines are held back until `keep` says where the run directory is: one that
    is refused before leaves no directory."""

    def __init__(self) -> None:
        self._held: list[logging.LogRecord] = []
        self._handler: logging.Handler = _Holding(self._held)
        self._file: _Quiet | None = None

    def __enter__(self) -> "RunLog":
        log.addHandler(self._handler)
        return self

    def keep(self, directory: Path) -> None:
        """Write to a run directory from now on, what has been said so far first; a run that is
        resumed adds to its log."""
        file = _Quiet(directory / NAME, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.removeHandler(self._handler)
        self._file = self._handler = file
        for record in self._held:
            file.handle(record)
        self._held.clear()
        log.addHandler(file)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and self._file is not None:
            known = isinstance(error, HoslError)
            line = f"{type(error).__name__}: {error}" if known else repr(error)
            # the app says it on the terminal
            self._file.handle(
                log.makeRecord(log.name, logging.ERROR, "", 0, f"run failed: {line}", (), None)
            )
        log.removeHandler(self._handler)
        self._handler.close()


class _Holding(logging.Handler):
    """Lines for later."""

    def __init__(self, held: list[logging.LogRecord]):
        super().__init__()
        self.held = held

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.held) < _LINES:
            self.held.append(record)
