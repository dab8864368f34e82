"""Calling ClientApps to their streams, each by a Flower message, and hearing when they return."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from flwr.app import Message

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.errors import MOST_TOLD, printable
from hosl_flower.flower.announced import Node
from hosl_flower.flower.records import pack_invitation
from hosl_flower.flower.stream.client_end import Invitation
from hosl_flower.flower.stream.server_end import StreamSession
from hosl_flower.flower.superlink import AnyGrid

log = logging.getLogger("hosl_flower")

SESSION = "train.session"
_LIFETIME = 7 * 86400.0  # seconds Flower keeps the message that opens a stream: longer than a run
_RETRY_SECONDS = 60.0
_CALLS = 3  # times a node is called again without ever having answered between them


class StreamCall:
    """A node's session, and the Flower message that called it."""

    def __init__(self, node: Node, session: StreamSession):
        self.node = node
        self.begin(session)

    @property
    def waited(self) -> float:
        """Seconds since it was called."""
        return time.monotonic() - self.called_at

    def begin(self, session: StreamSession) -> None:
        """A new conversation; nobody has been called to it yet."""
        self.session = session
        self.message = ""
        self.called_at = self.looked_at = 0.0
        self.activated = ""  # when its SuperNode was started, as of the call
        self.calls = 0
        self.answered = 0  # replies since the last call
        self.error = ""
        self.overdue = False  # has not answered in time; cleared when it has a connection again


class Caller:
    """invitation: what every node is told, but for its token."""

    def __init__(self, grid: AnyGrid, spec: ClientSpec, invitation: Invitation):
        self.grid, self.spec, self.invitation = grid, spec, invitation

    def call(self, line: StreamCall) -> None:
        """Send the Flower message that makes a ClientApp dial."""
        line.calls = 1 if line.answered else line.calls + 1
        line.answered, line.called_at = 0, time.monotonic()
        line.activated = self._activations().get(line.node.id, "")
        invitation = replace(self.invitation, token=line.session.invite())
        message = Message(
            pack_invitation(invitation, self.spec),
            dst_node_id=line.node.id,
            message_type=SESSION,
            ttl=_LIFETIME,
        )
        (line.message,) = self.grid.push_messages([message])

    def hear(self, lines: Sequence[StreamCall], closing: bool = False) -> None:
        """Take Flower's replies: a ClientApp that has returned is called again, unless the
        session is closing or it said that it cannot serve."""
        by_message = {line.message: line for line in lines if line.message}
        for answer in self.grid.pull_messages(list(by_message)) if by_message else ():
            line = by_message[answer.metadata.reply_to_message_id]
            line.message = ""
            said = ""
            if answer.has_error():
                reason = printable(answer.error.reason or str(answer.error.code), MOST_TOLD)
            else:
                config = answer.content.config_records.get("config")
                told = str(config.get("error", "")) if config else "no record"
                said = reason = printable(told, MOST_TOLD)
            if closing:
                continue
            if said and not line.session.ever_connected.is_set():
                line.error = said
            elif line.calls >= _CALLS:
                line.error = f"its ClientApp ended {line.calls} times: {reason}"
            else:
                log.warning("node %d is called again: %s", line.node.id, reason or "it returned")
                self.call(line)

    def call_again(self, lines: Sequence[StreamCall]) -> None:
        """Of nodes without a connection, call those that nobody will hear of: a SuperNode that was
        restarted under the same id knows of no ClientApp, nor of a message it had taken; and one
        whose ClientApps have failed may have been mended after a while."""
        activations = self._activations() if lines else {}
        for line in lines:
            if activations.get(line.node.id, line.activated) != line.activated:
                log.warning("SuperNode %d was restarted and is called again", line.node.id)
                self.call(line)
            elif line.error and line.waited > _RETRY_SECONDS:
                log.warning("node %d is called again after %s", line.node.id, line.error)
                line.error, line.calls = "", 0
                self.call(line)

    def _activations(self) -> dict[int, str]:
        """When each SuperNode was started, by node id, as SuperLink tells it."""
        return {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}
