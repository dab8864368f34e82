"""Signals that tell a command to end: `finally` runs, and the exit code is 128 + their number."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Told(SystemExit):
    """A signal has told this process to end."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Python has a handler of the first


def exit_when_told() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit from now on. One that is ignored, as nohup ignores
    SIGHUP, stays so. Of the main thread only."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)


@contextlib.contextmanager
def exiting_when_told() -> Iterator[None]:
    """The same within it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    exit_when_told()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise Told(number)
