"""How requests reach clients and replies come back.

A strategy knows one verb, `exchange`: these requests to these clients, their replies in
order. What lies beneath (a function call, Flower messages, a stream) is the subclass's
business; catching clients up, checking replies and counting bytes and seconds is done here,
once for all links.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hosl_flower.errors import MOST_TOLD, ClientError, DriftError, ProtocolError, printable
from hosl_flower.ledger.ledger import first_digest
from hosl_flower.protocol.messages.activations import (
    Activations,
)
from hosl_flower.protocol.messages.base import Behind, Failure, Reply, Request
from hosl_flower.protocol.messages.describe import Describe
from hosl_flower.protocol.messages.generation import (
    Continued,
)
from hosl_flower.protocol.messages.gradients import (
    Adopt,
)
from hosl_flower.protocol.messages.ledger import (
    Applied,
    ApplyDeltas,
    CatchUp,
    Losses,
    Restore,
)
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.server.history import History
from hosl_flower.server.traffic import Traffic
from hosl_flower.tensors.activation_codec import decode_activations
from hosl_flower.tensors.raw_bytes import DTYPES

log = logging.getLogger("hosl_flower")

NOT_YET: Any = None  # in place of a reply that has not come by an exchange's `until`

_CLOCKS_DIFFER = 1.0  # seconds, of one exchange
_CATCH_UPS = 4  # resends per request, each of which may land in another process


@dataclass
class Deadline:
    """Until when replies of an exchange are waited for. Their reader may move it.

    Attributes:
        time: on time.monotonic(); infinite for as long as a client may take at all.
    """

    time: float = math.inf

    @property
    def left(self) -> float:
        """Seconds until then; negative once it has passed."""
        return self.time - time.monotonic()


class Link(ABC):
    """Base of all links. history: the server's, to catch clients up from.

    pipelined: whether requests can be sent one by one, while replies to others are awaited, at no
    extra cost; else what can go together should.
    """

    pipelined = True

    def __init__(self, history: History, limits: ReplyLimits):
        self.history, self.limits = history, limits
        self.traffic = Traffic()
        self._outbox: dict[int, list[Request]] = {}
        self._positions: dict[int, tuple[int, str]] = {}  # from each client's last receipt
        self._overstated: set[int] = set()  # partitions that claimed more seconds than passed

    @abstractmethod
    def _deliver(
        self, requests: Mapping[int, Sequence[Request]], until: Deadline
    ) -> dict[int, Iterator[Reply]]:
        """Send; the iterators yield replies in order, as they come, and NOT_YET while one has not
        come by `until`. They may end early after Behind or Failure. Raises ClientError from the
        iterator when a client does not answer. Of what has not come when an iterator is closed,
        nothing is wanted any more."""

    def absent(self) -> set[int]:
        """Partitions that cannot be asked now: no node is there for them."""
        return set()

    def late(self) -> set[int]:
        """Partitions that still work on something nobody waits for any more."""
        return set()

    @abstractmethod
    def describe_client(self, partition: int) -> str:
        """How to name a client in an error: its partition and, where there is one, its node."""

    def post(self, request: Request) -> None:
        """Send with the client's next exchange: for requests whose answer is only a receipt."""
        self._outbox.setdefault(request.partition, []).append(request)

    def close(self) -> None:  # noqa: B027  # most links hold nothing open
        """Let go of everything held open; the link is not used again."""

    def arrived(self, partition: int) -> None:
        """Take it that a client is at the end of the ledger."""
        self._positions[partition] = len(self.history.ledger), self.history.ledger.digest()

    def flush(self) -> None:
        """Deliver everything posted."""
        for replies in self.exchange({partition: [] for partition in self._outbox}).values():
            for _ in replies:
                pass

    def exchange(
        self, requests: Mapping[int, Sequence[Request]], until: Deadline | None = None
    ) -> dict[int, Generator[Reply, None, None]]:
        """Send each client its requests; per client, an iterator of checked replies.

        A client that is behind gets what it lacks first. The iterators must be consumed: a lazy
        link computes a reply when it is asked for. They raise ClientError, ProtocolError or
        DriftError.

        Args:
            requests: by partition.
            until: after it the iterators no longer wait: they yield NOT_YET, and the reply another
                time. None: they wait as long as a client may take.
        """
        until = until or Deadline()
        sent: dict[int, list[Request]] = {}
        leads: dict[int, int] = {}
        for partition, own in requests.items():
            work = [*self._still_useful(partition), *own]
            if work:
                lead = self._lead(partition, work)
                leads[partition] = len(lead) + len(work) - len(own)
                sent[partition] = [*lead, *work]
        asked = time.perf_counter()
        return {
            partition: self._checked(
                partition, sent[partition], leads[partition], stream, asked, until
            )
            for partition, stream in self._send(sent, until).items()
        }

    def _still_useful(self, partition: int) -> list[Request]:
        """What was posted to a client, less the updates that others have gone past since: it
        gets those as ledger entries."""
        useful: list[Request] = []
        end = len(self.history.ledger)
        for request in reversed(self._outbox.pop(partition, [])):
            if request.position + 1 != end:
                break
            useful.insert(0, request)
            end = request.position
        return useful

    def _lead(self, partition: int, work: Sequence[Request]) -> list[Request]:
        """What a client lacks, as far as is known, to answer its work."""
        first = next((request for request in work if not request.anywhere), None)
        start = (0, first_digest(self.history.ledger.genesis))
        position, digest = self._positions.get(partition, start)
        if first is None or position >= first.position:
            return []
        return [self.history.catch_up(position, digest, first.position, first)]

    def _send(
        self, requests: Mapping[int, Sequence[Request]], until: Deadline
    ) -> dict[int, Iterator[Reply]]:
        """_deliver, timed."""
        started = time.perf_counter()
        streams = self._deliver(requests, until)
        self.traffic.waited_seconds += time.perf_counter() - started
        return streams

    def _checked(
        self,
        partition: int,
        sent: Sequence[Request],
        lead: int,
        stream: Iterator[Reply],
        asked: float,
        until: Deadline,
    ) -> Generator[Reply, None, None]:
        """Replies to what follows the first `lead` requests, all of them checked. asked: when."""
        index = attempts = 0
        while index < len(sent):
            reply = self._next(partition, sent[index], stream)
            if reply is NOT_YET:
                yield NOT_YET
                continue
            asked += self._note(partition, sent[index], reply, time.perf_counter() - asked)
            if isinstance(reply, Behind) and sent[index].local:
                if not isinstance(sent[index], Adopt):
                    raise ClientError(
                        f"{self._where(partition, sent[index])}: the client no longer has the "
                        f"weights of its {sent[index].local} local step(s); it starts again from "
                        "the next averaging"
                    )
                if index + 1 == len(sent):
                    return
            if isinstance(reply, Behind) and attempts < _CATCH_UPS:
                # another will replace it
                index += isinstance(sent[index], CatchUp | ApplyDeltas | Restore | Adopt)
                rest, lead = sent[index:], max(0, lead - index) + 1
                sent, stream = self._resend(partition, rest, reply, attempts, until)
                index, attempts = 0, attempts + 1
                continue
            self._check(partition, sent[index], reply)
            if index >= lead:
                attempts = 0
                yield self._decoded(reply)
            index += 1

    def _resend(
        self,
        partition: int,
        rest: Sequence[Request],
        behind: Behind,
        attempt: int,
        until: Deadline,
    ) -> tuple[list[Request], Iterator[Reply]]:
        """The rest of an exchange once more, after what the client lacks.

        Whoever answers may be another process than the one that was behind, at another
        position: then it is behind again, and the next attempt sends the whole history, of
        which a client takes what it lacks.
        """
        stop = rest[0].position
        known = (0, "") if attempt or behind.position > stop else (behind.position, behind.digest)
        sent = [self.history.catch_up(*known, stop, rest[0]), *rest]
        return sent, self._send({partition: sent}, until)[partition]

    def _next(self, partition: int, request: Request, stream: Iterator[Reply]) -> Reply:
        """The next reply, counted with its request."""
        started = time.perf_counter()
        traffic = self.traffic
        try:
            reply = next(stream)
        except StopIteration:
            raise ClientError(f"{self._where(partition, request)}: no reply") from None
        finally:
            traffic.waited_seconds += time.perf_counter() - started
        if reply is NOT_YET:
            return reply
        traffic.count(traffic.down, request.kind, request)
        traffic.count(traffic.up, request.kind, reply)
        return reply

    def _note(self, partition: int, request: Request, reply: Reply, passed: float) -> float:
        """Add what a client says it took to the traffic; the seconds of it that count: not more
        than have passed since it was asked."""
        try:
            reply.check_measures()
        except ProtocolError as error:
            raise type(error)(f"{self._where(partition, request)}: {error}") from error
        traffic, believed = self.traffic, min(reply.seconds, max(0.0, passed))
        if reply.seconds > believed + _CLOCKS_DIFFER and partition not in self._overstated:
            self._overstated.add(partition)
            log.warning(
                "%s says it computed for %.3g s, of which %.3g s can be: the rest does not count",
                self._where(partition, request),
                reply.seconds,
                believed,
            )
        traffic.client_seconds += believed
        traffic.peak_bytes = max(traffic.peak_bytes, reply.peak_bytes)
        traffic.tensor_peaks = tuple(map(max, traffic.tensor_peaks, reply.tensor_peaks))
        return believed

    def _check(self, partition: int, request: Request, reply: Reply) -> None:
        where = self._where(partition, request)
        if isinstance(reply, Failure):
            raise ClientError(f"{where}: {printable(reply.error, MOST_TOLD)}")
        expected = request.reply
        if not isinstance(reply, expected) or reply.step != request.step:
            raise ProtocolError(
                f"{where}: expected {expected.kind} of step {request.step}, "
                f"got {reply.kind} of step {reply.step}"
            )
        try:
            reply.check(request, self.limits, self.history.state)
        except ProtocolError as error:
            raise type(error)(f"{where}: {error}") from error
        if isinstance(reply, Applied):
            if not self._is_ours(request, reply):
                raise DriftError(
                    f"{where}: the client's ledger at position {reply.position} is "
                    f"{reply.digest}, which is not the server's; restart the client"
                )
            self._positions[partition] = (reply.position, reply.digest)

    def _is_ours(self, request: Request, reply: Applied) -> bool:
        """Whether the ledger a receipt names is the server's, as far as that can be known: of
        several updates posted at once, the server may have let go of all but the last."""
        position, ledger = reply.position, self.history.ledger
        if isinstance(request, Losses | Adopt):
            if position == request.position + 1:
                return reply.digest == request.digest_after
            if request.position < position < ledger.start:
                return True  # made before, its receipt lost; that of the last update will tell
        return ledger.digest(position) == reply.digest  # "" where nothing is held

    def _decoded(self, reply: Reply) -> Reply:
        """Activations as the client computed them, as far as the codec kept them."""
        if not isinstance(reply, Activations | Continued) or self.limits.codec == "exact":
            return reply
        h = decode_activations(reply.activations, reply.scales, DTYPES[self.limits.dtype])
        return replace(reply, activations=h, scales=torch.empty(0))

    def _where(self, partition: int, request: Request) -> str:
        who = self.describe_client(partition)
        return (
            who if isinstance(request, Describe) else f"{who}, step {request.step}, {request.kind}"
        )
