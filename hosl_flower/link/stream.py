"""The link over streams: one Flower message per SuperNode opens a conversation that lasts as
long as the run, and every request and reply travels over it.

The strategy listens; each ClientApp, called by one `train.session` message, dials, loads its
submodel once and answers until the session is closed. In simulation the port is one of this
machine's, chosen at the start; on real SuperNodes `stream-endpoint` says what to dial.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from hosl_flower.checks import Limits
from hosl_flower.errors import AbsentError, ClientError, ProtocolError
from hosl_flower.history import History
from hosl_flower.labels import STATES_BYTES
from hosl_flower.link.base import Link
from hosl_flower.link.dial import Invitation
from hosl_flower.link.frames import Key
from hosl_flower.link.nodes import Node, Nodes
from hosl_flower.link.records import pack_invitation
from hosl_flower.link.sessions import Session, StreamServer
from hosl_flower.messages import Behind, Failure, Reply, Request
from hosl_flower.spec import ClientSpec
from hosl_flower.tensors import DTYPES

log = logging.getLogger("hosl_flower")

SESSION = "train.session"
_SLACK = 1 << 20  # bytes a frame may have beside its tensors
_OTHERS_SECONDS = 1.0  # that the first session waits for the others; they may join later
_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 15.0
_CALLS = 3  # times a node is called again without ever having answered between them


class _Line:
    """A node's session, and the Flower message that called it."""

    def __init__(self, node: Node, session: Session):
        self.node = node
        self.begin(session)

    def begin(self, session: Session) -> None:
        """A new conversation; nobody has been called to it yet."""
        self.session = session
        self.message = ""
        self.calls = 0
        self.answered = 0  # replies since the last call
        self.error = ""


class StreamLink(Link):
    """endpoint: what clients dial, "" for this machine; bind: what the strategy listens on.
    deadline: seconds a client may take for one reply; lifetime: seconds Flower keeps the
    message that opens a session; longest: seconds a session may last, 0 for any."""

    def __init__(
        self,
        grid: Grid,
        spec: ClientSpec,
        history: History,
        limits: Limits,
        deadline: float,
        nodes: Nodes,
        lifetime: float,
        endpoint: str = "",
        bind: str = "127.0.0.1:0",
        certificate: tuple[bytes, bytes] | None = None,
        authority: str = "",
        longest: float = 0.0,
    ):
        super().__init__(history, limits)
        self.grid, self.spec, self.deadline, self.nodes = grid, spec, deadline, nodes
        self.lifetime, self.authority, self.longest = lifetime, authority, longest
        self.limit = longest_frame(limits, history)
        # each connection has a reading and a writing thread; a node may be dialling anew
        self.server = StreamServer(bind, self.limit, 4 * nodes.count + 8, certificate)
        self.endpoint = endpoint or f"127.0.0.1:{self.server.port}"
        self._lines: dict[int, _Line] = {}  # by node id
        self._served: dict[int, _Line] = {}  # by partition: who answered last
        self._exchange = 0
        try:
            self._call_nodes()
            self._wait_for_any(list(self._lines.values()))
        except BaseException:
            self.close()
            raise

    def absent(self) -> set[int]:
        self._call_nodes()
        return {p for p in range(self.spec.num_clients) if self._line_of(p) is None}

    def describe_client(self, partition: int) -> str:
        line = self._served.get(partition) or self._line_of(partition)
        return f"client {partition} ({f'node {line.node.id}' if line else 'without a node'})"

    def close(self) -> None:
        """End the sessions, wait for the ClientApps to return, close the port."""
        lines = self._lines.values()
        self._end([line for line in lines if line.session.ever_connected.is_set()])
        self.server.stop()

    def _end(self, lines: Sequence[_Line]) -> None:
        """Close sessions and wait for their ClientApps to return, though not for long."""
        for line in lines:
            line.session.close()
        give_up = time.monotonic() + _CLOSE_SECONDS
        while any(line.message for line in lines) and time.monotonic() < give_up:
            self._hear(lines, closing=True)
            time.sleep(0.05)

    def _renew(self) -> None:
        """Close sessions that have lasted long enough, and call their ClientApps anew."""
        if not self.longest:
            return
        old = [x for x in self._lines.values() if x.session.age > self.longest and x.session.idle]
        if not old:
            return
        log.info("%d session(s) have lasted %g s and are opened anew", len(old), self.longest)
        self._end(old)  # a device is not asked to hold two processes
        for line in old:
            self.server.forget(line.session)
            line.begin(self.server.session(f"node {line.node.id}"))
            self._call(line)
        self._wait_for_any(list(self._lines.values()))

    def _deliver(self, requests: Mapping[int, Sequence[Request]]) -> dict[int, Iterator[Reply]]:
        self._renew()
        self._call_nodes()
        self._exchange += 1
        asked: dict[int, dict[Key, Request]] = {}
        streams: dict[int, Iterator[Reply]] = {}
        for partition, own in requests.items():
            line = self._line_of(partition)
            if any(request.local for request in own):  # its weights are where it took its steps
                line = self._line_that_served(partition) or line
            if line is None:
                streams[partition] = _absent(partition)
                continue
            self._served[partition] = line
            keys = [Key(self._exchange, partition, index) for index in range(len(own))]
            asked.setdefault(line.node.id, {}).update(zip(keys, own, strict=True))
            streams[partition] = self._read(line, partition, keys)
        for node, own_requests in asked.items():
            self._lines[node].session.ask(own_requests)
        return streams

    def _read(self, line: _Line, partition: int, keys: Sequence[Key]) -> Iterator[Reply]:
        """Replies in order, as they come; ends after Behind or Failure."""
        try:
            for key in keys:
                reply = self._await(line, partition, key)
                line.answered += 1
                yield reply
                if isinstance(reply, Behind | Failure):
                    return
        finally:
            if keys:
                line.session.withdraw(keys[0].exchange, partition)

    def _await(self, line: _Line, partition: int, key: Key) -> Reply:
        give_up = time.monotonic() + self.deadline
        while True:
            reply = line.session.reply(key, _POLL_SECONDS)
            if reply is not None:
                return reply
            if line.session.fault:
                fault, line.session.fault = line.session.fault, ""
                raise ProtocolError(f"client {partition} (node {line.node.id}): {fault}")
            if line.error:
                raise ClientError(f"client {partition} (node {line.node.id}): {line.error}")
            if time.monotonic() > give_up:
                raise AbsentError(
                    f"client {partition} (node {line.node.id}) did not answer within "
                    f"{self.deadline:g} s; is its SuperNode alive? (reply-deadline allows more)"
                )
            if not line.session.connected:
                self._hear([line])

    def _line_of(self, partition: int) -> _Line | None:
        """Who answers for a client: its node, or in simulation any worker that has come."""
        if self.nodes.simulated:
            ready = [line for line in self._lines.values() if line.session.connected]
            ready = ready or [x for x in self._lines.values() if x.session.ever_connected.is_set()]
            return ready[partition % len(ready)] if ready else None
        node = self.nodes.of(partition)
        return self._lines.get(node.id) if node else None

    def _line_that_served(self, partition: int) -> _Line | None:
        """Who answered for a client last, if it is there, or dials again in a moment."""
        line = self._served.get(partition)
        give_up = time.monotonic() + _OTHERS_SECONDS
        while line and not line.session.connected:
            if time.monotonic() > give_up:
                return None
            time.sleep(0.05)
        return line

    def _call_nodes(self) -> None:
        """Invite nodes that have not been."""
        if not self.nodes.complete:
            self.nodes.refresh()
        for node in self.nodes.all():
            if node.id not in self._lines:
                line = _Line(node, self.server.session(f"node {node.id}"))
                self._lines[node.id] = line
                self._call(line)

    def _call(self, line: _Line) -> None:
        """Send the Flower message that makes a ClientApp dial."""
        line.calls = 1 if line.answered else line.calls + 1
        line.answered = 0
        invitation = Invitation(
            endpoint=self.endpoint,
            token=line.session.invite(),
            authority=self.authority,
            limit=self.limit,
            patience=min(60.0, self.deadline),
        )
        message = Message(
            pack_invitation(invitation, self.spec),
            dst_node_id=line.node.id,
            message_type=SESSION,
            ttl=self.lifetime,
        )
        (line.message,) = self.grid.push_messages([message])

    def _hear(self, lines: Sequence[_Line], closing: bool = False) -> None:
        """Take Flower's replies: a ClientApp that has returned is called again, unless the
        session is closing or it said that it cannot serve."""
        by_message = {line.message: line for line in lines if line.message}
        for answer in self.grid.pull_messages(list(by_message)) if by_message else ():
            line = by_message[answer.metadata.reply_to_message_id]
            line.message = ""
            said = ""
            if answer.has_error():
                reason = answer.error.reason or str(answer.error.code)
            else:
                config = answer.content.config_records.get("config")
                said = reason = str(config.get("error", "")) if config else "no record"
            if closing:
                continue
            if said and not line.session.ever_connected.is_set():
                line.error = said
            elif line.calls >= _CALLS:
                line.error = f"its ClientApp ended {line.calls} times: {reason}"
            else:
                log.warning("node %d is called again: %s", line.node.id, reason or "it returned")
                self._call(line)

    def _wait_for_any(self, lines: Sequence[_Line]) -> None:
        """Until a session is up; the others have a moment more, and may join at any time."""
        give_up = time.monotonic() + self.deadline
        while not any(line.session.connected for line in lines):
            self._hear(lines)
            errors = [f"node {line.node.id}: {line.error}" for line in lines if line.error]
            if len(errors) == len(lines) or time.monotonic() > give_up:
                raise ClientError(f"no SuperNode came to its session; {'; '.join(errors[:3])}")
            time.sleep(0.05)
        give_up = time.monotonic() + _OTHERS_SECONDS
        while time.monotonic() < give_up and not all(line.session.connected for line in lines):
            time.sleep(0.05)
        up = sum(line.session.connected for line in lines)
        log.info("streams: %d of %d node(s) have come to %s", up, len(lines), self.endpoint)


def longest_frame(limits: Limits, history: History) -> int:
    """Bytes of the longest message there can be: activations, a cut gradient, hidden states or a
    snapshot."""
    item = DTYPES[limits.dtype].itemsize
    activations = limits.batch * limits.length * (limits.hidden * item + 1)
    weights = max(history.snapshot_bytes, 4 * history.state.elements)
    states = (
        2 * STATES_BYTES if limits.private_labels else 0
    )  # a batch's are fewer than activations
    return max(activations, weights, states) + _SLACK


def _absent(partition: int) -> Iterator[Reply]:
    raise AbsentError(f"client {partition}: its SuperNode is not connected")
    yield  # a generator: the error belongs to this client, not to the exchange
