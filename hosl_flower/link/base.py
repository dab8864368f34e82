"""How requests reach clients and replies come back.

A strategy knows one verb, `exchange`: these requests to these clients, their replies in
order. What lies beneath (a function call, Flower messages, a stream) is the subclass's
business; catching clients up, checking replies and counting bytes and seconds is done here,
once for all links.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hosl_flower.errors import ClientError, DriftError, ProtocolError
from hosl_flower.ledger import Ledger
from hosl_flower.messages import (
    Activations,
    Applied,
    Behind,
    CatchUp,
    Describe,
    Described,
    Evaluate,
    Failure,
    Fingerprint,
    Fingerprinted,
    Forward,
    Limits,
    Losses,
    Message,
    Probe,
    Reply,
    Request,
    check_activations,
    wire_bytes,
)

_ANSWERS: dict[type[Request], type[Reply]] = {
    Describe: Described,
    Forward: Activations,
    Probe: Activations,
    Evaluate: Activations,
    Losses: Applied,
    CatchUp: Applied,
    Fingerprint: Fingerprinted,
}


_CATCH_UPS = 4  # resends per request, each of which may land in another process


@dataclass
class Traffic:
    """Messages and bytes by kind of request, and where the time of exchanges went."""

    up: dict[str, list[int]] = field(default_factory=dict)  # kind -> [messages, bytes]
    down: dict[str, list[int]] = field(default_factory=dict)
    waited_seconds: float = 0.0
    client_seconds: float = 0.0
    peak_bytes: int = 0  # of the client that needed most

    def count(self, way: dict[str, list[int]], kind: str, message: Message) -> None:
        """Add one message sent on the `up` or `down` way, under its request's kind."""
        entry = way.setdefault(kind, [0, 0])
        entry[0] += 1
        entry[1] += wire_bytes(message)

    def total(self, way: dict[str, list[int]]) -> int:
        """Bytes on one way, all kinds."""
        return sum(size for _, size in way.values())


class Link(ABC):
    """Base of all links. ledger: the server's, to catch clients up from."""

    def __init__(self, ledger: Ledger, limits: Limits):
        self.ledger, self.limits = ledger, limits
        self.traffic = Traffic()
        self._outbox: dict[int, list[Request]] = {}

    @abstractmethod
    def _deliver(self, requests: Mapping[int, Sequence[Request]]) -> dict[int, Iterator[Reply]]:
        """Send; the iterators yield replies in order, as they come, and may end early after
        Behind or Failure. Raises ClientError from the iterator when a client does not answer."""

    @abstractmethod
    def describe_client(self, partition: int) -> str:
        """How to name a client in an error: its partition and, where there is one, its node."""

    def post(self, request: Request) -> None:
        """Send with the client's next exchange: for requests whose answer is only a receipt."""
        self._outbox.setdefault(request.partition, []).append(request)

    def flush(self) -> None:
        """Deliver everything posted."""
        for replies in self.exchange({partition: [] for partition in self._outbox}).values():
            for _ in replies:
                pass

    def exchange(self, requests: Mapping[int, Sequence[Request]]) -> dict[int, Iterator[Reply]]:
        """Send each client its requests; per client, an iterator of checked replies.

        requests: by partition. The iterators must be consumed: a lazy link computes a reply
        when it is asked for. They raise ClientError, ProtocolError or DriftError.
        """
        posted = {partition: self._still_useful(partition) for partition in requests}
        sent = {p: [*posted[p], *own] for p, own in requests.items() if posted[p] or own}
        return {
            partition: self._checked(partition, sent[partition], len(posted[partition]), stream)
            for partition, stream in self._send(sent).items()
        }

    def _still_useful(self, partition: int) -> list[Request]:
        """What was posted to a client, less the updates that others have gone past since: it
        gets those as ledger entries when it is next asked for something."""
        posted = self._outbox.pop(partition, [])
        return [request for request in posted if request.position + 1 == len(self.ledger)]

    def _send(self, requests: Mapping[int, Sequence[Request]]) -> dict[int, Iterator[Reply]]:
        """_deliver, timed and counted."""
        started = time.perf_counter()
        streams = self._deliver(requests)
        self.traffic.waited_seconds += time.perf_counter() - started
        for own in requests.values():
            for request in own:
                self.traffic.count(self.traffic.down, request.kind, request)
        return streams

    def _checked(
        self, partition: int, sent: Sequence[Request], posted: int, stream: Iterator[Reply]
    ) -> Iterator[Reply]:
        for index, request in enumerate(sent):
            reply = self._next(partition, request, stream)
            for attempt in range(_CATCH_UPS):
                if not isinstance(reply, Behind):
                    break
                stream, reply = self._resend(partition, sent[index:], reply, attempt)
            self._check(partition, request, reply)
            if index >= posted:
                yield reply

    def _resend(
        self, partition: int, sent: Sequence[Request], behind: Behind, attempt: int
    ) -> tuple[Iterator[Reply], Reply]:
        """The rest of an exchange once more, after the ledger entries the client lacks.

        Whoever answers may be another process than the one that was behind, at another
        position: then it is behind again, and the next attempt sends the whole ledger, of
        which a client takes what it lacks.
        """
        start, stop = behind.position, sent[0].position
        if attempt or start > stop or self.ledger.digest(start) != behind.digest:
            start = 0
        catch_up = CatchUp.of(self.ledger, start, stop, sent[0])
        stream = self._send({partition: [catch_up, *sent]})[partition]
        reply = self._next(partition, catch_up, stream)
        if not isinstance(reply, Behind):
            self._check(partition, catch_up, reply)
            reply = self._next(partition, sent[0], stream)
        return stream, reply

    def _next(self, partition: int, request: Request, stream: Iterator[Reply]) -> Reply:
        """The next reply, counted."""
        started = time.perf_counter()
        try:
            reply = next(stream)
        except StopIteration:
            raise ClientError(f"{self._where(partition, request)}: no reply") from None
        traffic = self.traffic
        traffic.waited_seconds += time.perf_counter() - started
        traffic.client_seconds += reply.seconds
        traffic.peak_bytes = max(traffic.peak_bytes, reply.peak_bytes)
        traffic.count(traffic.up, request.kind, reply)
        return reply

    def _check(self, partition: int, request: Request, reply: Reply) -> None:
        where = self._where(partition, request)
        if isinstance(reply, Failure):
            raise ClientError(f"{where}: {reply.error}")
        expected = _ANSWERS[type(request)]
        if not isinstance(reply, expected) or reply.step != request.step:
            raise ProtocolError(
                f"{where}: expected {expected.kind} of step {request.step}, "
                f"got {reply.kind} of step {reply.step}"
            )
        if isinstance(reply, Activations):
            try:
                check_activations(reply, self.limits)
            except ProtocolError as error:
                raise ProtocolError(f"{where}: {error}") from error
        if isinstance(reply, Applied):
            position = reply.position
            if position > len(self.ledger) or self.ledger.digest(position) != reply.digest:
                raise DriftError(
                    f"{where}: the client's ledger at position {position} is {reply.digest}, "
                    "which is not the server's; restart the client"
                )

    def _where(self, partition: int, request: Request) -> str:
        return f"{self.describe_client(partition)}, step {request.step}, {request.kind}"
