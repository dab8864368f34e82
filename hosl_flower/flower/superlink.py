"""SuperLink as the links see it: calls that end.

Flower's Grid repeats a call for ever once SuperLink is gone, and nothing the caller does can
interrupt it. So every call is made in a thread of its own, which is left behind when it takes too
long.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from hosl_flower.errors import SuperLinkError, first_line

_CHECK_SECONDS = 30.0  # after which SuperLink is asked whether it is there

T = TypeVar("T")


class SuperLink:
    """The calls of a Grid that are used. seconds: what any of them may take; a SuperLink
    that is gone is noticed before that. Raises SuperLinkError."""

    def __init__(self, grid: Grid, seconds: float, check: float = _CHECK_SECONDS):
        self.grid, self.seconds, self.check = grid, seconds, min(check, seconds)

    def get_node_ids(self) -> list[int]:
        """Ids of the nodes that are there."""
        return self._call(lambda: list(self.grid.get_node_ids()))

    def get_nodes(self) -> list[Any]:
        """The nodes that are there, with all that SuperLink tells of them."""
        return self._call(lambda: list(self.grid.get_nodes()))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send; ids of the messages, "" for one that was not taken."""
        own = list(messages)
        return self._call(lambda: [i or "" for i in self.grid.push_messages(own)])

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages that have come."""
        ids = list(message_ids)
        return self._call(lambda: list(self.grid.pull_messages(ids)))

    def _call(self, function: Callable[[], T]) -> T:
        """What a call gives. A large message may take long over a slow line, so between checks
        a small call shows whether SuperLink is there."""
        call = _Call(function)
        waited = 0.0
        while not call.wait(self.check):
            waited += self.check
            gone = not _Call(lambda: list(self.grid.get_node_ids())).wait(self.check)
            if gone or waited >= self.seconds:
                raise _gone(f"it has not answered for {waited + self.check * gone:g} s")
        if call.error is not None:
            if isinstance(call.error, httpx.HTTPError):
                raise _gone(first_line(call.error)) from call.error
            raise call.error
        return call.result


AnyGrid = Grid | SuperLink


class _Call:
    """A function running in a daemon thread."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # whatever it is, the caller gets it
            self.error = error
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after so long at most."""
        return self._done.wait(seconds)


def _gone(reason: str) -> SuperLinkError:
    return SuperLinkError(
        f"SuperLink is gone ({reason}): start it again, and go on from the last checkpoint with "
        "resume"
    )
