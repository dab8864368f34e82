"""The link over Flower messages: one message per SuperNode and exchange.

Each exchange is one `train.exchange` message per node with all requests to the clients it
serves, answered by one with all replies. It works wherever Flower works, and costs what
Flower's mailbox costs: 0.1 s per exchange in simulation, seconds in deployment.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.errors import (
    MOST_TOLD,
    AbsentError,
    ClientError,
    HoslError,
    ProtocolError,
    printable,
)
from hosl_flower.flower.announced import Node
from hosl_flower.flower.mailbox import Mailbox, Part, PendingMessage
from hosl_flower.flower.nodes import Nodes, WaitLimit
from hosl_flower.flower.records import pack, unpack_replies
from hosl_flower.flower.superlink import AnyGrid
from hosl_flower.protocol.messages.base import Failure, Reply, Request
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.protocol.wire import to_wire
from hosl_flower.server.history import History
from hosl_flower.server.link import NOT_YET, Deadline, Link

EXCHANGE = "train.exchange"
_MESSAGE_BYTES = 64 << 20  # activations that one message may carry, if it carries several


class GridLink(Link):
    """deadline: seconds a node may take to answer one exchange; nodes: who serves whom."""

    pipelined = False  # an exchange is a message, and is waited for

    def __init__(
        self,
        grid: AnyGrid,
        spec: ClientSpec,
        history: History,
        limits: ReplyLimits,
        deadline: float,
        nodes: Nodes,
    ):
        super().__init__(history, limits)
        self.grid, self.spec, self.deadline, self.nodes = grid, spec, deadline, nodes
        self.mailbox = Mailbox(grid, self._write)

    def absent(self) -> set[int]:
        self.nodes.look()
        return set(range(self.spec.num_clients)) - set(self.nodes.served())

    def late(self) -> set[int]:
        self.mailbox.poll()
        late = self.mailbox.late()
        return {p for p in self.nodes.served() if (node := self.nodes.of(p)) and node.id in late}

    def describe_client(self, partition: int) -> str:
        node = self.nodes.of(partition)
        return f"client {partition} ({f'node {node.id}' if node else 'without a node'})"

    def _deliver(
        self, requests: Mapping[int, Sequence[Request]], until: Deadline
    ) -> dict[int, Iterator[Reply]]:
        """The first message to every node at once; what does not fit follows when wanted."""
        self.nodes.look()
        by_node: dict[Node, Part] = {}
        streams: dict[int, Iterator[Reply]] = {}
        for partition, own in requests.items():
            node = self.nodes.of(partition)
            if node is None:
                streams[partition] = self._absent(partition)
            else:
                by_node.setdefault(node, {})[partition] = list(own)
        exchanges = {node: self._cut(own) for node, own in by_node.items()}
        first = {node: parts[0] for node, parts in exchanges.items()}
        for node, letter in self.mailbox.send(first, self._seconds).items():
            exchange = _NodeExchange(self, node, exchanges[node], letter, until)
            streams |= {partition: exchange.read(partition) for partition in by_node[node]}
        return {partition: streams[partition] for partition in requests}

    def post_to(self, node: Node, part: Part) -> PendingMessage:
        """A message to one node."""
        return self.mailbox.send({node: part}, self._seconds)[node]

    def limit(self, part: Part) -> WaitLimit:
        """What a node may take to answer it."""
        return self.nodes.limit(self.deadline, itertools.chain(*part.values()))

    def _seconds(self, part: Part) -> float:
        return self.limit(part).seconds

    def _absent(self, partition: int) -> Iterator[Reply]:
        raise AbsentError(f"client {partition}: its SuperNode is not connected")
        yield  # a generator: the error belongs to this client, not to the exchange

    def _cut(self, requests: Part) -> list[Part]:
        """Requests in messages whose tensors, and those of the replies, fit: neither side ever
        holds many."""
        parts: list[Part] = [{}]
        used = 0
        for partition, own in requests.items():
            for request in own:
                size = self._tensor_bytes(request)
                if used and used + size > _MESSAGE_BYTES:
                    parts.append({})
                    used = 0
                used += size
                parts[-1].setdefault(partition, []).append(request)
        return parts

    def _tensor_bytes(self, request: Request) -> int:
        """Bytes of a request or of its reply, whichever is more."""
        _, tensors = to_wire(request)
        size = sum(tensor.nbytes for tensor in tensors.values())
        return max(size, request.reply.largest(request, self.limits, self.history.state))

    def _write(self, node: Node, part: Part, seconds: float) -> Message:
        return Message(
            content=pack(part.values(), self.spec),
            dst_node_id=node.id,
            message_type=EXCHANGE,
            ttl=seconds,
            group_id=str(next(iter(part.values()))[0].step),
        )


class _NodeExchange:
    """The messages of one exchange with one node, and the replies taken from them so far."""

    def __init__(
        self,
        link: GridLink,
        node: Node,
        parts: list[Part],
        first: PendingMessage,
        until: Deadline,
    ):
        self.link, self.node, self.parts, self.until = link, node, parts, until
        self.letter: PendingMessage | None = first  # the one that is waited for
        self.wanted = parts[0]  # what it asks
        self.readers = {partition for part in parts for partition in part}
        self.ended: set[int] = set()  # partitions that get nothing more
        self.silent = False  # nothing more is asked of it: every wait is a deadline
        self.replies: list[dict[int, list[Reply]] | HoslError] = []

    def read(self, partition: int) -> Iterator[Reply]:
        """Replies of one partition, later messages sent when they are wanted."""
        try:
            for index, part in enumerate(self.parts):
                if partition not in part:
                    continue
                while len(self.replies) <= index:
                    if not self._fetch():
                        yield NOT_YET
                found = self.replies[index]
                if isinstance(found, HoslError):
                    raise found
                own = found.pop(partition)
                complete = len(own) == len(part[partition])
                while own:  # let go of each as it is taken: activations are large
                    yield own.pop(0)
                if not complete:  # Behind or Failure: the rest would be refused too
                    return
        finally:
            self._leave(partition)

    def _leave(self, partition: int) -> None:
        """One partition has all it wants; a message nobody waits for any more is dropped."""
        self.ended.add(partition)
        self.readers.discard(partition)
        if not self.readers and self.letter is not None:
            self.link.mailbox.drop(self.letter)

    def _fetch(self) -> bool:
        """Take the answer to the next message, which is sent, without what is no longer of use,
        if it is not on its way; False when it has not come by `until`."""
        if self.letter is None:
            part = self.parts[len(self.replies)]
            self.wanted = {p: own for p, own in part.items() if p not in self.ended}
            if self.wanted and not self.silent:
                self.letter = self.link.post_to(self.node, self.wanted)
        if self.letter is not None and not self.link.mailbox.wait(self.letter, self.until.time):
            return False
        answer = self.letter.answer if self.letter else None
        if answer is not None and not answer.has_error():
            self.link.nodes.trust(self.node)
        elif self.letter is not None:
            self.link.nodes.doubt(self.node)
        self.letter, self.silent = None, answer is None
        self.replies.append(self._unpack(self.wanted, answer) if self.wanted else {})
        return True

    def _unpack(self, part: Part, answer: Message | None) -> dict[int, list[Reply]] | HoslError:
        who = self.link.describe_client(next(iter(part)))
        if answer is None:
            limit = self.link.limit(part)
            return AbsentError(
                f"{who} did not answer within {limit.seconds:g} s, or is gone; is its "
                f"SuperNode alive? ({limit.key} allows more)"
            )
        if answer.has_error():
            reason = printable(answer.error.reason or str(answer.error.code), MOST_TOLD)
            return ClientError(f"{who} failed: {reason}")
        try:
            groups = unpack_replies(answer.content)
            if len(groups) == 1 and groups[0] and isinstance(groups[0][0], Failure):
                groups *= len(part)  # the process could not even start
            if len(groups) != len(part):
                raise ProtocolError(f"{len(part)} clients were asked, {len(groups)} answered")
        except ProtocolError as error:
            return ProtocolError(f"{who}: {error}")
        return {p: list(group) for p, group in zip(part, groups, strict=True)}
