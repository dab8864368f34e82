"""Flower messages on their way: sent to nodes, waited for together, given up one by one."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Message

from hosl_flower.flower.announced import Node
from hosl_flower.flower.superlink import AnyGrid
from hosl_flower.protocol.messages.base import Request

_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.002, 0.25
_TRIES = 3  # of a message whose process died: what it asks for is the same whoever answers

Part = dict[int, list[Request]]  # by partition: what one message asks


@dataclass(eq=False)
class PendingMessage:
    """A message to one node, which has `seconds` to answer. answer: None while there is none; over:
    nothing more will come; dropped: nobody reads its answer any more."""

    node: Node
    part: Part
    seconds: float
    give_up: float  # on time.monotonic()
    tries: int = 0
    answer: Message | None = None
    over: bool = False
    dropped: bool = False


class Mailbox:
    """write: makes the Flower message of a part, which is of use for so many seconds."""

    def __init__(self, grid: AnyGrid, write: Callable[[Node, Part, float], Message]):
        self.grid, self.write = grid, write
        self._out: dict[str, PendingMessage] = {}  # by message id

    def send(
        self, parts: Mapping[Node, Part], seconds: Callable[[Part], float]
    ) -> dict[Node, PendingMessage]:
        """One message to each node. seconds: that a node has to answer a part."""
        letters = {}
        for node, part in parts.items():
            own = seconds(part)
            letters[node] = PendingMessage(node, part, own, time.monotonic() + own)
        self._push(list(letters.values()))
        return letters

    def wait(self, letter: PendingMessage, until: float = math.inf) -> bool:
        """Until it is answered or given up; False when it is `until` before that. Polls as often
        as pays: Flower's own send_and_receive does so every 3 s in deployment."""
        pause = _FIRST_POLL_SECONDS
        while not letter.over:
            self.poll()
            if letter.over:
                break
            now = time.monotonic()
            if now >= until:
                return False
            time.sleep(max(0.0, min(pause, min(until, letter.give_up) - now)))
            pause = min(pause * 1.3, _LAST_POLL_SECONDS)
        return True

    def poll(self) -> None:
        """Take what has come, send again what a dying process left, give up what is too late.
        Does not wait."""
        answers = list(self.grid.pull_messages(list(self._out))) if self._out else []
        again: dict[PendingMessage, Message] = {}
        for answer in answers:
            letter = self._out.pop(answer.metadata.reply_to_message_id, None)
            if letter is None or letter.dropped:
                continue  # too late: its node is free again
            if answer.has_error() and letter.tries < _TRIES:
                again[letter] = answer
            else:
                letter.answer, letter.over = answer, True
        self._push(list(again))
        for letter, error in again.items():
            if letter.over:  # no more than this will be heard of its node
                letter.answer = error
        now = time.monotonic()
        for i, letter in list(self._out.items()):
            if now > letter.give_up:
                letter.over = True
                del self._out[i]

    def drop(self, letter: PendingMessage) -> None:
        """Do not read its answer, if it still comes."""
        letter.dropped, letter.answer = True, None

    def late(self) -> set[int]:
        """Ids of the nodes that have not yet answered what has been dropped."""
        return {letter.node.id for letter in self._out.values() if letter.dropped}

    def _push(self, letters: list[PendingMessage]) -> None:
        if not letters:
            return
        ids = self.grid.push_messages([self.write(x.node, x.part, x.seconds) for x in letters])
        for i, letter in zip(ids, letters, strict=True):
            letter.tries += 1
            if i:
                self._out[i] = letter
            else:  # Flower takes none for a node that is gone
                letter.over = True
