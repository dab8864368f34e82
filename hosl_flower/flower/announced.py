"""The description a SuperNode gives of itself, and how many nodes the clients are spread over by
what all of them say."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from hosl_flower.errors import MOST_TOLD, ClientError, ConfigError, printable

NODE = "query.node"


@dataclass(frozen=True)
class Node:
    """A SuperNode. number: its partition-id; of: its num-partitions, 0 where it was given none;
    one_data_set: its data-path is one file for whatever it serves."""

    id: int
    number: int
    of: int
    one_data_set: bool

    def spread(self, clients: int) -> int:
        """Over how many nodes it takes the clients to be spread: without num-partitions each has
        a node of its own."""
        return min(clients, self.of or clients)

    def __str__(self) -> str:
        return f"SuperNode {self.id} (partition-id={self.number}, {self.announces})"

    @property
    def announces(self) -> str:
        """Its num-partitions, for messages."""
        return f"num-partitions={self.of}" if self.of else "no num-partitions"


def question(node: int, deadline: float) -> Message:
    """The Flower message that asks a node what it is."""
    content = RecordDict({"config": ConfigRecord({})})
    return Message(content, dst_node_id=node, message_type=NODE, ttl=deadline)


def read_answer(node: int, answer: Message) -> Node:
    """The node that has answered; ClientError when it failed, or does not say what it must."""
    if answer.has_error():
        reason = printable(answer.error.reason or str(answer.error.code), MOST_TOLD)
        raise ClientError(f"SuperNode {node} failed: {reason}")
    config = answer.content.config_records.get("config", ConfigRecord())
    number, of = config.get("partition-id"), config.get("num-partitions")
    if number is None:
        raise ClientError(
            f"SuperNode {node} has no partition-id; start it with "
            "--node-config 'partition-id=0' (its own number)"
        )
    if type(number) is not int or number < 0:
        raise ClientError(
            f"SuperNode {node}: --node-config: expected a whole number from 0 for partition-id, "
            f"got {number!r:.40}"
        )
    if of is not None and (type(of) is not int or of <= number):
        raise ClientError(
            f"SuperNode {node}: --node-config: expected a whole number above partition-id = "
            f"{number} for num-partitions, the number of nodes, got {of!r:.40}"
        )
    return Node(node, number, of or 0, one_data_set=bool(config.get("one-data")))


def check_agreement(nodes: Iterable[Node], clients: int) -> None:
    """ConfigError unless all nodes take the clients to be spread over as many nodes: one that
    announces too few would get clients of the others."""
    groups: dict[int, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.spread(clients), []).append(node)
    if len(groups) > 1:
        said = [_said(group) for group in sorted(groups.values(), key=len)]
        raise ConfigError(
            f"the SuperNodes do not agree on how many of them the num-clients = {clients} clients "
            f"are spread over: {'; '.join(said)}. Give all of them the same num-partitions in "
            "--node-config (none at all for a node for each client), or set clients-per-node, "
            "which counts instead of what they announce"
        )


def _said(group: Sequence[Node]) -> str:
    names = ", ".join(map(str, group[:8]))
    return names if len(group) <= 8 else f"{names}, ... ({len(group)} in all)"


def some(numbers: Sequence[int]) -> str:
    """Numbers for a message, the first few of many."""
    head = ", ".join(map(str, numbers[:8]))
    return (head or "none") if len(numbers) <= 8 else f"{head}, ... ({len(numbers)} in all)"
