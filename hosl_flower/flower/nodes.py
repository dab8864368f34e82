"""Which SuperNode serves which client. Node ids are new in every run, so clients are known by
their partition; one node may serve many (a Ray worker, an edge gateway)."""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hosl_flower.errors import ClientError, ConfigError
from hosl_flower.flower.announced import Node, check_agreement, question, read_answer, some
from hosl_flower.flower.node import is_simulated
from hosl_flower.flower.superlink import AnyGrid
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.describe import Describe

log = logging.getLogger("hosl_flower")

_POLL_SECONDS = 0.05
_TRIES = 3


class WaitLimit(NamedTuple):
    """Of a wait. key: the run-config key that allows more."""

    seconds: float
    key: str


class Nodes:
    """The SuperNodes of a run: node `number` of M serves clients number, number + M, ...

    clients: N. per_node: clients one node serves at most, whatever the nodes announce; 0 spreads
    the clients over as many nodes as all of them say there are (num-partitions), or takes one node
    for each. deadline: seconds a node may take to answer, its start included.
    """

    def __init__(self, grid: AnyGrid, clients: int, per_node: int, deadline: float):
        self.grid, self.clients, self.per_node, self.deadline = grid, clients, per_node, deadline
        self._known: dict[int, Node] = {}  # by number
        self._asked: dict[str, int] = {}  # message id -> node, not answered yet
        self._seen: set[int] = set()
        self._tries: Counter[int] = Counter()  # questions a node has failed to answer
        self._there: set[int] = set()  # as of the last refresh
        self._unfit: dict[int, str] = {}  # node -> why it is of no use
        self._doubted: set[int] = set()  # ids of nodes that have failed and may be gone
        self._refused: set[int] = set()  # ids of nodes that serve nobody, as has been said
        self._fixed = 0  # M, once the run has started

    def limit(self, deadline: float, requests: Iterable[Request]) -> WaitLimit:
        """What a node may take to answer these: a description needs the node's data to be loaded,
        which is part of its start."""
        if any(isinstance(request, Describe) for request in requests):
            return WaitLimit(self.deadline, "nodes-deadline")
        return WaitLimit(deadline, "reply-deadline")

    @property
    def count(self) -> int:
        """M, the nodes the clients are spread over."""
        if self._fixed:
            return self._fixed
        if self.per_node:
            return math.ceil(self.clients / self.per_node)
        # where they do not agree, which ends the run's start, none gets clients of others
        announced = (node.spread(self.clients) for node in self._known.values())
        return max(announced, default=self.clients)

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
        """Whether this is a simulation, whose workers can serve any client. The engine has Ray up
        in the ServerApp's process; what a node says of itself does not count."""
        return is_simulated()

    def all(self) -> list[Node]:
        """The nodes that are there and serve a client, by number."""
        return [node for number, node in sorted(self._known.items()) if number < self.count]

    def wait(self, seconds: float, required: int) -> None:
        """Until every client has its node; after `seconds`, `required` clients are enough."""
        started = time.monotonic()
        while not (self.complete and self._heard_all()):
            self.refresh()
            waited = time.monotonic() - started
            enough = not self._known or len(self._seen) >= self.count
            starting = self._asked and enough and not self.complete  # there, but still loading
            if waited > (self.deadline if starting else seconds):
                break
            time.sleep(_POLL_SECONDS)
        self._check_sharing()
        served = self.served()
        if self.simulated:
            required = self.clients  # nobody joins a simulation later
        if len(served) < required:
            raise ConfigError(self._why_missing(required))
        self._fixed = self.count  # a client's node stays the same number, whoever comes and goes
        self._check_data()
        for node in self._known.values():
            self._check_place(node)
        for who, why in self._unfit.items():
            self._leave_alone(who, why)
        log.info(self._plan(served))

    @property
    def _shared(self) -> bool:
        """Whether nodes serve several clients because they say that there are few nodes."""
        return not self.per_node and self.count < self.clients

    def _heard_all(self) -> bool:
        """Whether every node that is there has said what it is, where that decides who serves
        how many clients."""
        again = self._unfit.keys() - self._seen
        return not (self._shared and self._there & {*self._asked.values(), *again})

    def _check_sharing(self) -> None:
        """ConfigError where clients would be shared out among some nodes while others are there
        of which nobody knows what they are."""
        if self._shared and self._unfit:
            most = math.ceil(self.clients / self.count)
            raise ConfigError(
                f"num-clients = {self.clients} would be spread over {self.count} SuperNode(s), "
                "as those announce that have answered well, while others are connected: "
                f"{'; '.join(list(self._unfit.values())[:8])}. Mend or stop these, or set "
                f"clients-per-node = {most} to do without them"
            )

    def _leave_alone(self, who: int, why: object) -> None:
        """Say, once, that a node serves nobody: it may be by a typing error."""
        if who not in self._refused:
            log.warning("left alone: %s", why)
        self._refused.add(who)

    def look(self) -> None:
        """Refresh, if there is any reason to: a node is missing, or may be."""
        if self._doubted or not self.complete:
            self.refresh()

    def refresh(self) -> None:
        """Let go of doubted nodes that are gone, ask those that are new, take answers that have
        come. Does not wait."""
        there = list(self.grid.get_node_ids())
        self._there = set(there)
        self._unfit = {i: why for i, why in self._unfit.items() if i in self._there}
        for node in list(self._known.values()):
            if node.id in self._doubted and node.id not in there:
                log.warning("SuperNode %d, partition %d, is gone", node.id, node.number)
                self._let_go(node)
        new = [node for node in there if node not in self._seen]
        self._seen.update(new)
        if new:
            ids = self.grid.push_messages([question(node, self.deadline) for node in new])
            self._asked.update((i, node) for i, node in zip(ids, new, strict=True) if i)
        for answer in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node_id = self._asked.pop(answer.metadata.reply_to_message_id)
            try:
                node = read_answer(node_id, answer)
            except ClientError as error:
                self._unfit[node_id] = str(error)
                self._tries[node_id] += 1
                if self._tries[node_id] < _TRIES:
                    self._seen.discard(node_id)  # it is asked again
                elif self._fixed:
                    self._leave_alone(node_id, error)
            else:
                self._unfit.pop(node_id, None)
                self._add(node)
        if not (self._fixed or self.per_node):
            check_agreement(self._known.values(), self.clients)

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
        if self._fixed and not self._check_place(node):
            return
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
            self._leave_alone(node.id, f"{text}; {other.id} goes on")
            self._seen.discard(node.id)
            return
        self._known[node.number] = node

    def _check_place(self, node: Node) -> bool:
        """Whether a node has a place among those that the clients are spread over; it is named if
        not."""
        if not self.per_node and node.spread(self.clients) != self._fixed:
            self._leave_alone(
                node.id, f"{node}: this run's clients are spread over {self._fixed} SuperNode(s)"
            )
        elif node.number >= self._fixed:
            self._leave_alone(
                node.id, f"{node}: partition-ids of this run are 0 to {self._fixed - 1}"
            )
        else:
            return True
        return False

    def _check_data(self) -> None:
        for node in self._known.values():
            own = [p for p in self.served() if self.of(p) == node]
            if node.one_data_set and len(own) > 1:
                raise ConfigError(
                    f"SuperNode {node.id} serves clients {some(own)} with one data-path; put "
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
        wanted, connected = self.count, len(self._there)
        if connected < wanted:
            return (
                f"num-clients = {self.clients} needs {wanted} SuperNodes, {connected} are "
                "connected; start more, set clients-per-node, or in simulation add "
                f'--federation-config "num-supernodes={wanted}"'
            )
        missing = [number for number in range(wanted) if number not in self._known]
        return "; ".join(
            [
                f"no SuperNode answered for partition {some(missing)}; those that did have "
                f"partition-id {some(sorted(self._known))}, {required} client(s) are needed",
                *self._unfit.values(),
            ]
        )
