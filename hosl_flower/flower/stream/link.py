"""The link over streams: one Flower message per SuperNode opens a conversation that lasts as
long as the run, and every request and reply travels over it.

The strategy listens; each ClientApp, called by one `train.session` message, dials, loads its
submodel once and answers until the session is closed. In simulation the port is one of this
machine's, chosen at the start; on real SuperNodes `stream-endpoint` says what to dial.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.errors import AbsentError, ClientError, ConfigError, ProtocolError, SuperLinkError
from hosl_flower.flower.nodes import Nodes, WaitLimit
from hosl_flower.flower.stream.calls import Caller, StreamCall
from hosl_flower.flower.stream.client_end import MOST_PATIENCE, Invitation
from hosl_flower.flower.stream.frames import MOST_FRAME, Key
from hosl_flower.flower.stream.server_end import StreamServer
from hosl_flower.flower.superlink import AnyGrid
from hosl_flower.protocol.messages.base import Behind, Failure, Reply, Request
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.server.history import History
from hosl_flower.server.kept_labels import STATES_BYTES
from hosl_flower.server.link import NOT_YET, Deadline, Link
from hosl_flower.tensors.activation_codec import has_scales
from hosl_flower.tensors.raw_bytes import DTYPES

log = logging.getLogger("hosl_flower")

_SLACK = 1 << 20  # bytes a frame may have beside its tensors
_OTHERS_SECONDS = 1.0  # that the first session waits for the others; they may join later
_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 15.0
_LOOK_SECONDS = 0.5  # between two questions to SuperLink about a node without a connection
_START_SECONDS = 60.0  # that a node which does not come is not doubted: it may be loading
_MOMENT = 0.05


class StreamLink(Link):
    """endpoint: what clients dial, "" for this machine; bind: what the strategy listens on.
    deadline: seconds a client may take for one reply; longest: seconds a session may last, 0 for
    any; indispensable: no client can be done without, so another node is waited for where one is
    gone."""

    def __init__(
        self,
        grid: AnyGrid,
        spec: ClientSpec,
        history: History,
        limits: ReplyLimits,
        deadline: float,
        nodes: Nodes,
        endpoint: str = "",
        bind: str = "127.0.0.1:0",
        certificate: tuple[bytes, bytes] | None = None,
        authority: str = "",
        longest: float = 0.0,
        indispensable: bool = False,
    ):
        super().__init__(history, limits)
        self.grid, self.spec, self.deadline, self.nodes = grid, spec, deadline, nodes
        self.longest, self.indispensable = longest, indispensable
        self._heard_at = 0.0
        self.limit = longest_frame(limits, history)
        if self.limit > MOST_FRAME:
            raise ConfigError(
                f"one message of this run may take {self.limit} bytes, and a stream carries at "
                f"most {MOST_FRAME}: set link = grid, or a smaller batch-size or max-length, or, "
                "where it is weights that are so many, client-trainable = lora"
            )
        # each connection has a reading and a writing thread; a node may be dialling anew
        self.server = StreamServer(bind, self.limit, 4 * nodes.count + 8, certificate)
        self.endpoint = endpoint or f"127.0.0.1:{self.server.port}"
        invitation = Invitation(
            endpoint=self.endpoint,
            token="",
            authority=authority,
            limit=self.limit,
            patience=min(MOST_PATIENCE, deadline),
        )
        self.caller = Caller(grid, spec, invitation)
        self._lines: dict[int, StreamCall] = {}  # by node id
        self._served: dict[int, StreamCall] = {}  # by partition: who answered last
        self._exchange = 0
        try:
            self._call_nodes()
            self._wait_for_any()
        except BaseException:
            self.close()
            raise

    def absent(self) -> set[int]:
        self._call_nodes()
        lines = {p: self._line_of(p) for p in range(self.spec.num_clients)}
        return {p for p, line in lines.items() if line is None or line.overdue}

    def late(self) -> set[int]:
        sessions = [line.session for line in self._lines.values()]
        return {p for p in range(self.spec.num_clients) if any(s.late(p) for s in sessions)}

    def describe_client(self, partition: int) -> str:
        line = self._served.get(partition) or self._line_of(partition)
        return f"client {partition} ({f'node {line.node.id}' if line else 'without a node'})"

    def close(self) -> None:
        """End the sessions, wait for the ClientApps to return, close the port."""
        lines = self._lines.values()
        try:
            self._end([line for line in lines if line.session.ever_connected.is_set()])
        except SuperLinkError as error:  # nothing is lost by it: the run is over
            log.warning("%s", error)
        finally:
            self.server.stop()

    def _end(self, lines: Sequence[StreamCall]) -> None:
        """Close sessions and wait for their ClientApps to return, though not for long."""
        for line in lines:
            line.session.close()
        give_up = time.monotonic() + _CLOSE_SECONDS
        while any(line.message for line in lines) and time.monotonic() < give_up:
            self.caller.hear(lines, closing=True)
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
            self.caller.call(line)
        self._wait_for_any()

    def _deliver(
        self, requests: Mapping[int, Sequence[Request]], until: Deadline
    ) -> dict[int, Iterator[Reply]]:
        self._renew()
        self._call_nodes()
        self._exchange += 1
        asked: dict[StreamCall, dict[Key, Request]] = {}
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
            asked.setdefault(line, {}).update(zip(keys, own, strict=True))
            streams[partition] = self._read(
                line, partition, dict(zip(keys, own, strict=True)), until
            )
        for line, own_requests in asked.items():
            line.session.ask(own_requests)
        return streams

    def _read(
        self, line: StreamCall, partition: int, asked: dict[Key, Request], until: Deadline
    ) -> Iterator[Reply]:
        """Replies in order, as they come; ends after Behind or Failure."""
        try:
            for key in list(asked):
                limit = self.nodes.limit(self.deadline, [asked[key]])
                give_up = time.monotonic() + limit.seconds
                while (reply := self._await(line, partition, key, give_up, limit, until)) is None:
                    if until.left <= 0:
                        yield NOT_YET
                    other = self._line_of(partition)
                    if not self._is_there(line) and other:  # asks what a node took with it
                        line = self._served[partition] = other
                        line.session.ask(asked)
                line.answered += 1
                del asked[key]
                yield reply
                if isinstance(reply, Behind | Failure):
                    return
        finally:
            for exchange in {key.exchange for key in asked}:
                line.session.withdraw(exchange, partition)

    def _await(
        self,
        line: StreamCall,
        partition: int,
        key: Key,
        give_up: float,
        limit: WaitLimit,
        until: Deadline,
    ) -> Reply | None:
        """The reply to one request; None when it has not come by `until`, or its node is gone
        and cannot be done without. give_up: when `limit` is over."""
        while True:
            reply = line.session.reply(key, max(0.0, min(_POLL_SECONDS, until.left)))
            if reply is not None:
                return reply
            if line.session.fault:
                fault, line.session.fault = line.session.fault, ""
                raise ProtocolError(f"client {partition} (node {line.node.id}): {fault}")
            if line.error:
                raise ClientError(f"client {partition} (node {line.node.id}): {line.error}")
            if time.monotonic() > give_up:
                line.overdue = not line.session.connected
                raise AbsentError(
                    f"client {partition} (node {line.node.id}) did not answer within "
                    f"{limit.seconds:g} s; is its SuperNode alive? ({limit.key} allows more)"
                )
            if not line.session.connected and not self._is_there(line):
                if self.indispensable:
                    time.sleep(_MOMENT)
                    return None
                raise AbsentError(
                    f"client {partition} (node {line.node.id}): its SuperNode is gone"
                )
            if until.left <= 0:
                return None

    def _line_of(self, partition: int) -> StreamCall | None:
        """Who answers for a client: its node, or in simulation any worker that has come."""
        if self.nodes.simulated:
            ready = [line for line in self._lines.values() if line.session.connected]
            ready = ready or [x for x in self._lines.values() if x.session.ever_connected.is_set()]
            return ready[partition % len(ready)] if ready else None
        node = self.nodes.of(partition)
        return self._lines.get(node.id) if node else None

    def _line_that_served(self, partition: int) -> StreamCall | None:
        """Who answered for a client last, if it is there, or dials again in a moment. One that
        has been let go of is told to end, even if it dials again just then."""
        line = self._served.get(partition)
        give_up = time.monotonic() + _OTHERS_SECONDS
        while line and self._lines.get(line.node.id) is line:
            if line.session.connected:
                return line
            if time.monotonic() > give_up:
                break
            time.sleep(0.05)
        return None

    def _call_nodes(self) -> None:
        """Invite nodes that have not been, let go of those that are gone, call those again whose
        ClientApp has."""
        for line in self._lines.values():
            if line.session.connected:
                line.overdue = False
                self.nodes.trust(line.node)
            elif line.session.ever_connected.is_set() or line.waited > _START_SECONDS:
                self.nodes.doubt(line.node)
        self.nodes.look()
        there = {node.id: node for node in self.nodes.all()}
        for line in [line for i, line in self._lines.items() if i not in there]:
            line.session.close()
            self.server.forget(line.session)
            del self._lines[line.node.id]
        for node in there.values():
            if node.id not in self._lines:
                line = StreamCall(node, self.server.session(f"node {node.id}"))
                self._lines[node.id] = line
                self.caller.call(line)
        if time.monotonic() - self._heard_at < _LOOK_SECONDS:
            return
        self._heard_at = time.monotonic()
        lost = [line for line in self._lines.values() if not line.session.connected]
        self.caller.hear(lost)
        self.caller.call_again(lost)

    def _is_there(self, line: StreamCall) -> bool:
        """Whether a node without a connection is still one of this run's; looked up now and
        then."""
        if time.monotonic() - line.looked_at > _LOOK_SECONDS:
            line.looked_at = time.monotonic()
            self._call_nodes()
        return self._lines.get(line.node.id) is line

    def _wait_for_any(self) -> None:
        """Until a session is up; the others have a moment more, and may join at any time."""
        give_up = time.monotonic() + self.nodes.deadline
        while not any(line.session.connected for line in self._lines.values()):
            if time.monotonic() - self._heard_at > _LOOK_SECONDS:
                self._call_nodes()
            lines = list(self._lines.values())
            errors = [f"node {line.node.id}: {line.error}" for line in lines if line.error]
            if (errors and len(errors) == len(lines)) or time.monotonic() > give_up:
                raise ClientError(f"no SuperNode came to its session; {self._why_none(errors)}")
            time.sleep(_MOMENT)
        give_up = time.monotonic() + _OTHERS_SECONDS
        lines = list(self._lines.values())
        while time.monotonic() < give_up and not all(line.session.connected for line in lines):
            time.sleep(_MOMENT)
        up = sum(line.session.connected for line in lines)
        log.info("streams: %d of %d node(s) have come to %s", up, len(lines), self.endpoint)

    def _why_none(self, errors: Sequence[str]) -> str:
        if errors:
            return "; ".join(errors[:3])
        return (
            f"{len(self._lines)} were called and none has dialled {self.endpoint} within "
            f"{self.nodes.deadline:g} s: can they reach it (stream-endpoint, stream-bind, a "
            "firewall)? Their own logs tell more"
        )


def longest_frame(limits: ReplyLimits, history: History) -> int:
    """Bytes of the longest message there can be: activations with all that goes with them, a cut
    gradient, hidden states or a snapshot."""
    item = DTYPES[limits.dtype].itemsize
    token = limits.hidden * item + 1 + (4 if has_scales(limits.codec) else 0)  # with its mask
    activations = limits.batch * (limits.length * token + 8 * limits.longest)  # and labels
    elements, rows = history.state.elements, history.state.rows.count
    update = max(4 * elements + rows, elements + 5 * rows)  # exact, or in 8 bits with scales
    weights = max(history.snapshot_bytes, update)
    # of a mini-batch, or of so many held-out examples and what is left of one more
    state = 4 * limits.longest * limits.hidden
    own = max(limits.batch * state, STATES_BYTES + limits.each * state)
    states = own if limits.private_labels else 0
    return max(activations, weights, states) + _SLACK


def _absent(partition: int) -> Iterator[Reply]:
    raise AbsentError(f"client {partition}: its SuperNode is not connected")
    yield  # a generator: the error belongs to this client, not to the exchange
