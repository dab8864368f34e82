"""The link over Flower messages: one message per SuperNode and exchange.

Each exchange is one `train.exchange` message per node with all requests to the clients it
serves, answered by one with all replies. It works wherever Flower works, and costs what
Flower's mailbox costs: 0.1 s per exchange in simulation, seconds in deployment.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from hosl_flower.checks import Limits
from hosl_flower.errors import AbsentError, ClientError, HoslError, ProtocolError
from hosl_flower.history import History
from hosl_flower.link.base import Link
from hosl_flower.link.nodes import Node, Nodes
from hosl_flower.link.records import pack, unpack_replies
from hosl_flower.messages import (
    Backward,
    Evaluate,
    Failure,
    Fetch,
    Forward,
    LocalTrain,
    Probe,
    Reply,
    Request,
)
from hosl_flower.spec import ClientSpec
from hosl_flower.tensors import DTYPES
from hosl_flower.wire import to_wire

EXCHANGE = "train.exchange"
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.002, 0.25
_MESSAGE_BYTES = 64 << 20  # activations that one message may carry, if it carries several
_TRIES = 3  # of a message whose process died: what it asks for is the same whoever answers

Part = dict[int, list[Request]]  # by partition: what one message asks


class GridLink(Link):
    """deadline: seconds a node may take to answer one exchange; nodes: who serves whom."""

    pipelined = False  # an exchange is a message, and is waited for

    def __init__(
        self,
        grid: Grid,
        spec: ClientSpec,
        history: History,
        limits: Limits,
        deadline: float,
        nodes: Nodes,
    ):
        super().__init__(history, limits)
        self.grid, self.spec, self.deadline, self.nodes = grid, spec, deadline, nodes

    def absent(self) -> set[int]:
        if not self.nodes.complete:
            self.nodes.refresh()
        return set(range(self.spec.num_clients)) - set(self.nodes.served())

    def describe_client(self, partition: int) -> str:
        node = self.nodes.of(partition)
        return f"client {partition} ({f'node {node.id}' if node else 'without a node'})"

    def _deliver(self, requests: Mapping[int, Sequence[Request]]) -> dict[int, Iterator[Reply]]:
        """The first message to every node at once; what does not fit follows when wanted."""
        if not self.nodes.complete:
            self.nodes.refresh()
        by_node: dict[Node, Part] = {}
        streams: dict[int, Iterator[Reply]] = {}
        for partition, own in requests.items():
            node = self.nodes.of(partition)
            if node is None:
                streams[partition] = self._absent(partition)
            else:
                by_node.setdefault(node, {})[partition] = list(own)
        exchanges = {node: self._cut(own) for node, own in by_node.items()}
        answers = self._send_and_wait({node: parts[0] for node, parts in exchanges.items()})
        for node, parts in exchanges.items():
            exchange = _NodeExchange(self, node, parts, answers.get(node))
            streams |= {partition: exchange.read(partition) for partition in by_node[node]}
        return {partition: streams[partition] for partition in requests}

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
        """Of a request or its reply, whichever is more."""
        _, tensors = to_wire(request)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if type(request) in (Forward, Probe, Evaluate):
            limits = self.limits
            item = DTYPES[limits.dtype].itemsize
            size = max(size, limits.batch * limits.length * limits.hidden * item)
        if type(request) in (LocalTrain, Backward, Fetch):
            state = self.history.state
            fetched = isinstance(request, Fetch) and request.moments
            moments = math.prod(state.moments_shape) if fetched else 0
            size = max(size, 4 * (state.elements + moments))
        return size

    def _send_and_wait(self, parts: Mapping[Node, Part]) -> dict[Node, Message]:
        """Push a message per node, pull until all are answered or the deadline passes.

        Grid.send_and_receive polls every 3 s in deployment; this polls as often as pays. A node
        whose ClientApp process died is asked again.
        """
        waiting = self._push(parts)
        tries = dict.fromkeys(parts, 1)
        answers: dict[Node, Message] = {}
        give_up = time.monotonic() + self.deadline
        pause = _FIRST_POLL_SECONDS
        while waiting and time.monotonic() < give_up:
            for answer in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(answer.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                answers[node] = answer
                if answer.has_error() and tries[node] < _TRIES:
                    tries[node] += 1
                    waiting |= self._push({node: parts[node]})
            if waiting:
                time.sleep(pause)
                pause = min(pause * 1.3, _LAST_POLL_SECONDS)
        for node in parts:
            if node not in answers or answers[node].has_error():
                self.nodes.forget(node)
        return answers

    def _push(self, parts: Mapping[Node, Part]) -> dict[str, Node]:
        """Message ids of what was sent."""
        messages = [
            Message(
                content=pack(part.values(), self.spec),
                dst_node_id=node.id,
                message_type=EXCHANGE,
                ttl=self.deadline,
                group_id=str(next(iter(part.values()))[0].step),
            )
            for node, part in parts.items()
        ]
        ids = self.grid.push_messages(messages)
        return {i: node for i, node in zip(ids, parts, strict=True) if i}


class _NodeExchange:
    """The messages of one exchange with one node, and the replies taken from them so far."""

    def __init__(self, link: GridLink, node: Node, parts: list[Part], first: Message | None):
        self.link, self.node, self.parts = link, node, parts
        self.ended: set[int] = set()  # partitions that get nothing more
        self.silent = first is None  # nothing more is asked of it: every wait is a deadline
        self.replies: list[dict[int, list[Reply]] | HoslError] = [self._unpack(parts[0], first)]

    def read(self, partition: int) -> Iterator[Reply]:
        """Replies of one partition, later messages sent when they are wanted."""
        for index, part in enumerate(self.parts):
            if partition not in part:
                continue
            while len(self.replies) <= index:
                self._fetch()
            found = self.replies[index]
            if isinstance(found, HoslError):
                self.ended.add(partition)
                raise found
            own = found.pop(partition)
            complete = len(own) == len(part[partition])
            while own:  # let go of each as it is taken: activations are large
                yield own.pop(0)
            if not complete:  # Behind or Failure: the rest would be refused too
                self.ended.add(partition)
                return

    def _fetch(self) -> None:
        """Send the next message, without what is no longer of use."""
        part = self.parts[len(self.replies)]
        wanted = {p: own for p, own in part.items() if p not in self.ended}
        answer = None
        if wanted and not self.silent:
            answer = self.link._send_and_wait({self.node: wanted}).get(self.node)
            self.silent = answer is None
        self.replies.append(self._unpack(wanted, answer) if wanted else {})

    def _unpack(self, part: Part, answer: Message | None) -> dict[int, list[Reply]] | HoslError:
        who = self.link.describe_client(next(iter(part)))
        if answer is None:
            return AbsentError(
                f"{who} did not answer within {self.link.deadline:g} s, or is gone; is its "
                "SuperNode alive? (reply-deadline allows more)"
            )
        if answer.has_error():
            return ClientError(f"{who} failed: {answer.error.reason or answer.error.code}")
        try:
            groups = unpack_replies(answer.content)
            if len(groups) == 1 and groups[0] and isinstance(groups[0][0], Failure):
                groups *= len(part)  # the process could not even start
            if len(groups) != len(part):
                raise ProtocolError(f"{len(part)} clients were asked, {len(groups)} answered")
        except ProtocolError as error:
            return ProtocolError(f"{who}: {error}")
        return {p: list(group) for p, group in zip(part, groups, strict=True)}
