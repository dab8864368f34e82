"""The log of a run, kept in its directory: log.txt has every line of this package's, with the
time, and last the line that says how the run ended if it did not end well."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hosl_flower.errors import HoslError, printable
from hosl_flower.run.checkpoint import steps
from hosl_flower.system.signals import ENDING

log = logging.getLogger("hosl_flower")

NAME = "log.txt"
_LINES = 10_000  # kept until there is a directory


class _Quiet(logging.FileHandler):
    """A log that cannot be opened or written, for want of room say, stops and disturbs nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the file is opened here, outside what is handled
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it still held
            super().close()


class OneLine(logging.Formatter):
    """A record is one line of printable text, whatever a client's words in it were; a traceback
    follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class RunLog:
    """Around a run. Lines are held back until `keep` says where the run directory is: one that
    is refused before leaves no directory."""

    def __init__(self) -> None:
        self._held: list[logging.LogRecord] = []
        self._handler: logging.Handler = _Holding(self._held)
        self._file: _Quiet | None = None
        self.directory: Path | None = None

    def __enter__(self) -> "RunLog":
        log.addHandler(self._handler)
        return self

    def keep(self, directory: Path) -> None:
        """Write to a run directory from now on, what has been said so far first; a run that is
        resumed adds to its log."""
        self.directory = directory
        file = _Quiet(directory / NAME, encoding="utf-8", delay=True)
        file.setFormatter(OneLine("%(asctime)s %(message)s"))
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
            log.info(way_on(self.directory))
            known = isinstance(error, HoslError)
            line = f"{type(error).__name__}: {error}" if known else repr(error)
            # the app says it on the terminal
            self._file.handle(
                log.makeRecord(log.name, logging.ERROR, "", 0, f"run failed: {line}", (), None)
            )
        log.removeHandler(self._handler)
        self._handler.close()


def way_on(directory: Path | None) -> str:
    """A clause that says how a run continues from its checkpoints, or that it has none."""
    found = steps(directory) if directory else []
    if not found:
        return "there is no checkpoint to go on from"
    way = f"resume={directory} goes on from the checkpoint of step {found[0]}"
    if len(found) > 1:
        way += f", without checkpoint-{found[0]} from that of step {found[1]}"
    return way


@contextlib.contextmanager
def stop_announced(kept: RunLog, cause: str = "") -> Iterator[None]:
    """While this lasts, a signal that ends the process leaves a line first. One that is ignored, as
    a shell's background jobs ignore SIGINT, stays so.

    cause: the usual one; default: the signal's name.
    """
    all_of = {number: signal.getsignal(number) for number in ENDING}
    before: dict[int, Any] = {n: set_to for n, set_to in all_of.items() if set_to != signal.SIG_IGN}

    def stop(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # a line was being written
            log.error(
                "run stopped: signal %d (%s); %s",
                number,
                cause or signal.Signals(number).name,
                way_on(kept.directory),
            )
        handler = before[number] or signal.SIG_DFL
        signal.signal(number, handler)
        if callable(handler):
            handler(number, frame)
        else:
            os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are none of its business
        return
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number in before:
            signal.signal(number, before[number] or signal.SIG_DFL)


def say_stopped(directory: Path, number: int) -> None:
    """Announce that a run in other processes was stopped: on stderr, and in its log if there is
    one. In a simulation, Flower runs the ServerApp in a thread, which gets no signals."""
    line = f"run stopped: signal {number} ({signal.Signals(number).name}); {way_on(directory)}"
    print(line, file=sys.stderr)
    if (directory / NAME).is_file():
        with RunLog() as kept:
            kept.keep(directory)
            log.error("%s", line)


class _Holding(logging.Handler):
    """Lines for later."""

    def __init__(self, held: list[logging.LogRecord]):
        super().__init__()
        self.held = held

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.held) < _LINES:
            self.held.append(record)


def log_to_stderr() -> None:
    """Our own log lines, plain: Flower's stream carries stderr of the ServerApp."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(OneLine("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
