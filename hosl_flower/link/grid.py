"""The link over Flower messages: one message per client and exchange.

Each exchange is one `train.exchange` message with all of its requests, answered by one with
all replies. It works wherever Flower works, and costs what Flower's mailbox costs: 0.1 s per
exchange in simulation, seconds in deployment.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from hosl_flower.errors import ClientError, ConfigError, ProtocolError
from hosl_flower.ledger import Ledger
from hosl_flower.link.base import Limits, Link
from hosl_flower.link.records import pack, unpack_replies
from hosl_flower.messages import Reply, Request
from hosl_flower.spec import ClientSpec

EXCHANGE = "train.exchange"
NODE = "query.node"
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.002, 0.25


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
        answers = self._send_and_wait(messages)
        return {partition: self._read(partition, answers.get(partition)) for partition in requests}

    def _read(self, partition: int, answer: Message | None) -> Iterator[Reply]:
        """Replies in one answer. A generator, so that errors rise where replies are consumed."""
        who = self.describe_client(partition)
        if answer is None:
            raise ClientError(
                f"{who} did not answer within {self.deadline:g} s; is its SuperNode alive? "
                "(reply-deadline allows more)"
            )
        if answer.has_error():
            raise ClientError(f"{who} failed: {answer.error.reason or answer.error.code}")
        try:
            replies = unpack_replies(answer.content)
        except ProtocolError as error:
            raise ProtocolError(f"{who}: {error}") from error
        while replies:  # let go of each as it is taken: activations are large
            yield replies.pop(0)

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
        """Ask every SuperNode which partition it serves: node ids are new in every run."""
        wanted = self.spec.num_clients
        ids = self._wait_for_nodes(wanted, deadline)
        questions = {
            i: Message(
                content=RecordDict({"config": ConfigRecord({})}),
                dst_node_id=i,
                message_type=NODE,
                ttl=self.deadline,
            )
            for i in ids
        }
        nodes: dict[int, int] = {}
        for node, answer in self._send_and_wait(questions).items():
            partition = _partition_of(node, answer)
            if partition in nodes:
                raise ConfigError(
                    f"SuperNodes {nodes[partition]} and {node} both serve partition {partition}; "
                    "give each its own partition-id"
                )
            nodes[partition] = node
        missing = sorted(set(range(wanted)) - set(nodes))
        if missing:
            raise ConfigError(
                f"no SuperNode answered for partition {', '.join(map(str, missing))} of "
                f"num-clients = {wanted}; those there serve {sorted(nodes) or 'none'}"
            )
        return nodes

    def _wait_for_nodes(self, wanted: int, deadline: float) -> list[int]:
        give_up = time.monotonic() + deadline
        ids = list(self.grid.get_node_ids())
        while len(ids) < wanted and time.monotonic() < give_up:
            time.sleep(0.5)
            ids = list(self.grid.get_node_ids())
        if len(ids) < wanted:
            raise ConfigError(
                f"num-clients = {wanted} needs {wanted} SuperNodes, {len(ids)} are connected; "
                f'start more, or in simulation add --federation-config "num-supernodes={wanted}"'
            )
        return ids


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
