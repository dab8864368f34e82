"""Where a process's client state is between two averagings of weights (LocalStep).

A local step moves the client's own weights, which no ledger knows. A device that serves one
client holds no second copy for that: its weights are simply further on. A process that serves
several keeps the others' weights, and those they all started from, while it works for one.
"""

from hosl_flower.ledger.client_state import ClientState, Snapshot
from hosl_flower.protocol.messages.base import Request

_Key = tuple[int, int]  # partition and its local steps
_TRUNK: _Key = (-1, 0)  # what all clients share: the ledger's weights
_NOWHERE: _Key = (-1, -1)  # what a local step that failed half-way has left


class LocalWeights:
    """The states of the clients of one process, one of them in place."""

    def __init__(self, state: ClientState):
        self.state = state
        self.clear()

    def clear(self) -> None:
        """The state in place is the ledger's; nothing else is kept."""
        self._here = _TRUNK
        self._kept: dict[_Key, Snapshot] = {}
        self._asked: set[int] = set()  # partitions that have been at these shared weights

    @property
    def at_shared(self) -> bool:
        """Whether the state in place is the ledger's."""
        return self._here == _TRUNK

    def enter(self, request: Request) -> bool:
        """Put the state a request is for in place. False when it is not here: it was another
        process's, or this one has moved on from it."""
        key = (request.partition, request.local) if request.local else _TRUNK
        if key == _TRUNK:
            self._asked.add(request.partition)
        if key == self._here:
            return True
        if key not in self._kept:
            return False
        if self._here != _NOWHERE:
            self._kept[self._here] = self.state.snapshot()
        self.state.roll_back(self._kept.pop(key))
        self._here = key
        return True

    def has_taken(self, request: Request) -> bool:
        """Whether the local step a request asks for has been made already."""
        key = (request.partition, request.local + 1)
        return key == self._here or key in self._kept

    def keep_shared(self) -> None:
        """To be called before a local step: what others still need of the state is kept."""
        if self.at_shared and len(self._asked) > 1:
            self._kept[_TRUNK] = self.state.snapshot()

    def lost(self) -> None:
        """The state in place is nobody's: parameters are stepped one after the other, and not all
        have been."""
        self._here = _NOWHERE

    def moved(self, request: Request) -> None:
        """The local step a request asks for has been made."""
        self._here = (request.partition, request.local + 1)
