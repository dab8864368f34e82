"""The link over Flower messages: one message per client and exchange.

Each exchange is one `train.exchange` message with all of its requests, answered by one with
all replies. It works wherever Flower works, and costs what Flower's mailbox costs: 0.1 s per
exchange in simulation, seconds in deployment.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from hosl_flower.errors import ClientError, ConfigError, HoslError, ProtocolError
from hosl_flower.ledger import Ledger
from hosl_flower.link.base import Link
from hosl_flower.link.records import pack, unpack_replies
from hosl_flower.messages import Evaluate, Forward, Limits, Reply, Request
from hosl_flower.spec import ClientSpec
from hosl_flower.tensors import DTYPES

EXCHANGE = "train.exchange"
NODE = "query.node"
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.002, 0.25
_MESSAGE_BYTES = 64 << 20  # activations that one message may carry, if it carries several


class GridLink(Link):
    """deadline: seconds a client may take to answer one exchange; nodes_deadline: seconds to
    wait for as many SuperNodes as there are clients."""

    def __init__(
        self,
        grid: Grid,
        spec: ClientSpec,
        ledger: Ledger,
        limits: Limits,
        deadline: float,
        nodes_deadline: float,
    ):
        super().__init__(ledger, limits)
        self.grid, self.spec, self.deadline = grid, spec, deadline
        self.nodes = self._find_nodes(nodes_deadline)  # partition -> node id

    def describe_client(self, partition: int) -> str:
        return f"client {partition} (node {self.nodes.get(partition, 'unknown')})"

    def _deliver(self, requests: Mapping[int, Sequence[Request]]) -> dict[int, Iterator[Reply]]:
        """The first message to every client at once; what does not fit follows when wanted."""
        parts = {partition: self._cut(own) for partition, own in requests.items()}
        answers = self._exchange({partition: own[0] for partition, own in parts.items()})
        return {p: self._read(p, own, answers.get(p)) for p, own in parts.items()}

    def _cut(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Requests in groups whose replies fit a message, so that neither side ever holds
        many activations at once."""
        limits = self.limits
        item = DTYPES[limits.dtype].itemsize
        largest = limits.batch * limits.length * limits.hidden * item
        most = max(1, _MESSAGE_BYTES // largest)
        groups: list[list[Request]] = [[]]
        heavy = 0
        for request in requests:
            heavy += isinstance(request, (Forward, Evaluate))  # Probe is a Forward
            if heavy > most:
                groups.append([])
                heavy = 1
            groups[-1].append(request)
        return groups

    def _exchange(self, requests: Mapping[int, Sequence[Request]]) -> dict[int, Message]:
        messages = {
            partition: Message(
                content=pack(own, self.spec),
                dst_node_id=self.nodes[partition],
                message_type=EXCHANGE,
                ttl=self.deadline,
                group_id=str(own[0].step),
            )
            for partition, own in requests.items()
        }
        return self._send_and_wait(messages)

    def _read(
        self, partition: int, parts: Sequence[Sequence[Request]], answer: Message | None
    ) -> Iterator[Reply]:
        """Replies, from the first answer and then from those still to be asked for."""
        for index, part in enumerate(parts):
            if index:
                answer = self._exchange({partition: part}).get(partition)
            replies = self._unpack(partition, answer)
            answer = None
            complete = len(replies) == len(part)
            while replies:  # let go of each as it is taken: activations are large
                yield replies.pop(0)
            if not complete:  # Behind or Failure: the rest would be refused too
                return

    def _unpack(self, partition: int, answer: Message | None) -> list[Reply]:
        who = self.describe_client(partition)
        if answer is None:
            raise ClientError(
                f"{who} did not answer within {self.deadline:g} s; is its SuperNode alive? "
                "(reply-deadline allows more)"
            )
        if answer.has_error():
            raise ClientError(f"{who} failed: {answer.error.reason or answer.error.code}")
        try:
            return unpack_replies(answer.content)
        except ProtocolError as error:
            raise ProtocolError(f"{who}: {error}") from error

    def _send_and_wait(self, messages: Mapping[int, Message]) -> dict[int, Message]:
        """Push messages, pull until all are answered or the deadline passes.

        Grid.send_and_receive polls every 3 s in deployment; this polls as often as pays.
        """
        partitions = list(messages)
        ids = list(self.grid.push_messages([messages[partition] for partition in partitions]))
        waiting = {i: partition for i, partition in zip(ids, partitions, strict=True) if i}
        answers: dict[int, Message] = {}
        give_up = time.monotonic() + self.deadline
        pause = _FIRST_POLL_SECONDS
        while waiting and time.monotonic() < give_up:
            for answer in self.grid.pull_messages(list(waiting)):
                partition = waiting.pop(answer.metadata.reply_to_message_id, None)
                if partition is not None:
                    answers[partition] = answer
            if waiting:
                time.sleep(pause)
                pause = min(pause * 1.3, _LAST_POLL_SECONDS)
        return answers

    def _find_nodes(self, deadline: float) -> dict[int, int]:
        """Ask every SuperNode which partition it serves (node ids are new in every run) until
        the wanted ones are there. Nodes beyond those are left alone."""
        wanted = set(range(self.spec.num_clients))
        asked: dict[str, int] = {}  # message id -> node, not answered yet
        seen: set[int] = set()
        nodes: dict[int, int] = {}
        unfit: list[str] = []
        started = time.monotonic()
        while not wanted <= nodes.keys():
            new = [node for node in self.grid.get_node_ids() if node not in seen]
            seen.update(new)
            ids = self.grid.push_messages([_question(node, self.deadline) for node in new])
            asked.update(zip(ids, new, strict=True))
            for answer in self.grid.pull_messages(list(asked)) if asked else ():
                node = asked.pop(answer.metadata.reply_to_message_id)
                try:
                    partition = _partition_of(node, answer)
                except HoslError as error:
                    unfit.append(str(error))
                    continue
                if partition in nodes:
                    raise ConfigError(
                        f"SuperNodes {nodes[partition]} and {node} both serve partition "
                        f"{partition}; give each its own partition-id"
                    )
                nodes[partition] = node
            waited = time.monotonic() - started
            starting = asked and len(seen) >= len(wanted)  # there, but still loading
            if waited > (self.deadline if starting else deadline):
                raise ConfigError(_why_missing(wanted, nodes, len(seen), unfit))
            time.sleep(_FIRST_POLL_SECONDS if wanted <= nodes.keys() else 0.1)
        return {partition: nodes[partition] for partition in wanted}


def _question(node: int, deadline: float) -> Message:
    content = RecordDict({"config": ConfigRecord({})})
    return Message(content, dst_node_id=node, message_type=NODE, ttl=deadline)


def _why_missing(
    wanted: set[int], nodes: Mapping[int, int], connected: int, unfit: Sequence[str]
) -> str:
    if connected < len(wanted):
        return (
            f"num-clients = {len(wanted)} needs {len(wanted)} SuperNodes, {connected} are "
            "connected; start more, or in simulation add --federation-config "
            f'"num-supernodes={len(wanted)}"'
        )
    missing = ", ".join(map(str, sorted(wanted - nodes.keys())))
    return "; ".join(
        [
            f"no SuperNode answered for partition {missing} of num-clients = {len(wanted)}; "
            f"those that did serve {sorted(nodes) or 'none'}",
            *unfit,
        ]
    )


def _partition_of(node: int, answer: Message) -> int:
    if answer.has_error():
        raise ClientError(f"SuperNode {node} failed: {answer.error.reason or answer.error.code}")
    config = answer.content.config_records.get("config", ConfigRecord())
    partition = config.get("partition-id")
    if not isinstance(partition, int) or partition < 0:
        raise ConfigError(
            f"SuperNode {node} has no partition-id; start it with "
            "--node-config 'partition-id=0' (its own number)"
        )
    return partition
