"""Which SuperNode serves which client. Node ids are new in every run, so clients are known by
their partition; one node may serve many (a Ray worker, an edge gateway)."""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict

from hosl_flower.errors import ClientError, ConfigError
from hosl_flower.link.superlink import AnyGrid
from hosl_flower.messages import Describe, Request

log = logging.getLogger("hosl_flower")

NODE = "query.node"
_POLL_SECONDS = 0.05
_TRIES = 3


@dataclass(frozen=True)
class Node:
    """What a SuperNode says about itself. number: its partition-id; of: its num-partitions, 0
    where it was given none; one_data_set: its data-path is one file for whatever it serves;
    simulated: it is a worker of Flower's simulation engine, which can serve any client."""

    id: int
    number: int
    of: int
    one_data_set: bool
    simulated: bool


class Limit(NamedTuple):
    """Of a wait. key: the run-config key that allows more."""

    seconds: float
    key: str


class Nodes:
    """The SuperNodes of a run: node `number` of M serves clients number, number + M, ...

    clients: N. per_node: clients one node serves at most; 0 spreads the clients over as many
    nodes as they say there are (num-partitions), or takes one node for each. deadline: seconds
    a node may take to answer, its start included.
    """

    def __init__(self, grid: AnyGrid, clients: int, per_node: int, deadline: float):
        self.grid, self.clients, self.per_node, self.deadline = grid, clients, per_node, deadline
        self._known: dict[int, Node] = {}  # by number
        self._asked: dict[str, int] = {}  # message id -> node, not answered yet
        self._seen: set[int] = set()
        self._tries: Counter[int] = Counter()  # questions a node has failed to answer
        self._unfit: list[str] = []
        self._doubted: set[int] = set()  # ids of nodes that have failed and may be gone
        self._refused: set[int] = set()  # ids of nodes whose number is another's, as has been said
        self._fixed = 0  # M, once the run has started

    def limit(self, deadline: float, requests: Iterable[Request]) -> Limit:
        """What a node may take to answer these: a description needs the node's data to be loaded,
        which is part of its start."""
        if any(isinstance(request, Describe) for request in requests):
            return Limit(self.deadline, "nodes-deadline")
        return Limit(deadline, "reply-deadline")

    @property
    def count(self) -> int:
        """M, the nodes the clients are spread over."""
        if self._fixed:
            return self._fixed
        if self.per_node:
            return math.ceil(self.clients / self.per_node)
        announced = max((node.of for node in self._known.values()), default=0)
        return min(self.clients, announced or self.clients)

    def of(self, partition: int) -> Node | None:
        """The node that serves a client, if it is there."""
        return self._known.get(partition % self.count)

    def served(self) -> list[int]:
        """Clients whose node is there."""
        return [p for p in range(self.clients) if self.of(p)]

    @property
    def complete(self) -> bool:
        """Whether every client has its node."""
        return all(number in self._known for number in range(self.count))

    @property
    def simulated(self) -> bool:
        """Whether this is a simulation."""
        return any(node.simulated for node in self._known.values())

    def all(self) -> list[Node]:
        """The nodes that are there and serve a client, by number."""
        return [node for number, node in sorted(self._known.items()) if number < self.count]

    def wait(self, seconds: float, required: int) -> None:
        """Until every client has its node; after `seconds`, `required` clients are enough."""
        started = time.monotonic()
        while not self.complete:
            self.refresh()
            waited = time.monotonic() - started
            enough = not self._known or len(self._seen) >= self.count
            starting = self._asked and enough  # there, but still loading
            if waited > (self.deadline if starting else seconds):
                break
            time.sleep(_POLL_SECONDS)
        served = self.served()
        if self.simulated:
            required = self.clients  # nobody joins a simulation later
        if len(served) < required:
            raise ConfigError(self._why_missing(required))
        self._fixed = self.count  # a client's node stays the same number, whoever comes and goes
        self._check_data()
        log.info(self._plan(served))

    def look(self) -> None:
        """Refresh, if there is any reason to: a node is missing, or may be."""
        if self._doubted or not self.complete:
            self.refresh()

    def refresh(self) -> None:
        """Let go of doubted nodes that are gone, ask those that are new, take answers that have
        come. Does not wait."""
        there = list(self.grid.get_node_ids())
        for node in list(self._known.values()):
            if node.id in self._doubted and node.id not in there:
                log.warning("SuperNode %d, partition %d, is gone", node.id, node.number)
                self._let_go(node)
        new = [node for node in there if node not in self._seen]
        self._seen.update(new)
        if new:
            ids = self.grid.push_messages([_question(node, self.deadline) for node in new])
            self._asked.update((i, node) for i, node in zip(ids, new, strict=True) if i)
        for answer in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node_id = self._asked.pop(answer.metadata.reply_to_message_id)
            try:
                self._add(_read(node_id, answer))
            except ClientError as error:
                self._unfit.append(str(error))
                self._tries[node_id] += 1
                if self._tries[node_id] < _TRIES:
                    self._seen.discard(node_id)  # it is asked again

    def doubt(self, node: Node) -> None:
        """A node has failed: it is let go of when it is gone, and another of its number takes
        its place even before Flower has noticed."""
        if self._known.get(node.number) == node:
            self._doubted.add(node.id)

    def trust(self, node: Node) -> None:
        """A node has shown that it is there."""
        self._doubted.discard(node.id)

    def _let_go(self, node: Node) -> None:
        self._doubted.discard(node.id)
        if self._known.get(node.number) == node:
            del self._known[node.number]
        # spare nodes, with the same number perhaps, are asked once more
        self._seen = {other.id for other in self._known.values()} | set(self._asked.values())

    def _add(self, node: Node) -> None:
        other = self._known.get(node.number)
        if other is not None and self._fixed and other.id in self._doubted:
            log.warning(
                "SuperNode %d takes the place of %d, partition %d", node.id, other.id, node.number
            )
            self._doubted.discard(other.id)  # it stays seen: nobody asks it again
        elif other is not None and other.id in set(self.grid.get_node_ids()) - {node.id}:
            text = (
                f"SuperNodes {other.id} and {node.id} both serve partition {node.number}; give "
                "each its own partition-id"
            )
            if not self._fixed:
                raise ConfigError(text)
            # the first keeps it; a restarted node gets it back once its old id is gone
            if node.id not in self._refused:
                log.warning("%s; %d goes on", text, other.id)
            self._refused.add(node.id)
            self._seen.discard(node.id)
            return
        self._known[node.number] = node

    def _check_data(self) -> None:
        for node in self._known.values():
            own = [p for p in self.served() if self.of(p) == node]
            if node.one_data_set and len(own) > 1:
                raise ConfigError(
                    f"SuperNode {node.id} serves clients {_some(own)} with one data-path; put "
                    "{partition} into it, or set clients-per-node = 1"
                )

    def _plan(self, served: Sequence[int]) -> str:
        count = min(self.count, len(self._known))
        most = math.ceil(self.clients / self.count)
        spread = f", up to {most} clients on each" if most > 1 else ""
        late = self.clients - len(served)
        missing = f"; {late} client(s) have no node yet and may join later" if late else ""
        return f"{len(served)} client(s) on {count} SuperNode(s){spread}{missing}"

    def _why_missing(self, required: int) -> str:
        wanted, connected = self.count, len(self._seen)
        if connected < wanted:
            return (
                f"num-clients = {self.clients} needs {wanted} SuperNodes, {connected} are "
                "connected; start more, set clients-per-node, or in simulation add "
                f'--federation-config "num-supernodes={wanted}"'
            )
        missing = [number for number in range(wanted) if number not in self._known]
        return "; ".join(
            [
                f"no SuperNode answered for partition {_some(missing)}; those that did have "
                f"partition-id {_some(sorted(self._known))}, {required} client(s) are needed",
                *self._unfit,
            ]
        )


def _some(numbers: Sequence[int]) -> str:
    head = ", ".join(map(str, numbers[:8]))
    return (head or "none") if len(numbers) <= 8 else f"{head}, ... ({len(numbers)} in all)"


def _question(node: int, deadline: float) -> Message:
    content = RecordDict({"config": ConfigRecord({})})
    return Message(content, dst_node_id=node, message_type=NODE, ttl=deadline)


def _read(node: int, answer: Message) -> Node:
    if answer.has_error():
        raise ClientError(f"SuperNode {node} failed: {answer.error.reason or answer.error.code}")
    config = answer.content.config_records.get("config", ConfigRecord())
    number, of = config.get("partition-id"), config.get("num-partitions")
    if not isinstance(number, int) or number < 0:
        raise ClientError(
            f"SuperNode {node} has no partition-id; start it with "
            "--node-config 'partition-id=0' (its own number)"
        )
    return Node(
        id=node,
        number=number,
        of=max(of, 0) if isinstance(of, int) else 0,
        one_data_set=bool(config.get("one-data")),
        simulated=bool(config.get("simulated")),
    )
