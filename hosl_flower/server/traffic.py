"""Bytes and seconds of exchanges, counted."""

from dataclasses import dataclass, field

from hosl_flower.protocol.messages.base import Message
from hosl_flower.protocol.wire import wire_bytes
from hosl_flower.tensors.memory import PHASES


@dataclass
class Traffic:
    """Messages and bytes of requests that were answered and their replies, by kind of request, and
    where the time of exchanges went."""

    up: dict[str, list[int]] = field(default_factory=dict)  # kind -> [messages, bytes]
    down: dict[str, list[int]] = field(default_factory=dict)
    waited_seconds: float = 0.0
    client_seconds: float = 0.0
    peak_bytes: int = 0  # of the client that needed most
    tensor_peaks: tuple[int, ...] = (0,) * len(PHASES)  # likewise, phase by phase

    def count(self, way: dict[str, list[int]], kind: str, message: Message) -> None:
        """Add one message sent on the `up` or `down` way, under its request's kind."""
        entry = way.setdefault(kind, [0, 0])
        entry[0] += 1
        entry[1] += wire_bytes(message)

    def total(self, way: dict[str, list[int]]) -> int:
        """Bytes on one way, all kinds."""
        return sum(size for _, size in way.values())
