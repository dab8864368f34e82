"""The clients of one step, of which some may fail."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from hosl_flower.errors import (
    ClientError,
    DivergedError,
    OutOfRangeError,
    ProtocolError,
    UnusableBatchError,
)
from hosl_flower.link.base import Link
from hosl_flower.messages import Activations, Describe, Described, Request
from hosl_flower.session import Drop, Session

log = logging.getLogger("hosl_flower")


class Cohort:
    """The sampled partitions of a step, less those that fail: a client that errs, times out or
    sends what it should not is left out of the rest of the step, and the step goes on with the
    others as long as min-clients remain."""

    def __init__(self, session: Session, link: Link, step: int, partitions: Iterable[int]):
        self.session, self.link, self.step = session, link, step
        self.partitions = list(partitions)

    def ask(self, requests: Callable[[int], Sequence[Request]]) -> dict[int, list[Any]]:
        """Replies by partition, of those who answered everything; the others are dropped.

        A client that has not been met yet describes itself first. Raises ClientError when too
        few are left, DriftError when one is not what its ledger says.
        """
        wanted = {partition: list(requests(partition)) for partition in self.partitions}
        met = self.session.clients.keys()
        sent = {
            p: own if p in met else [Describe(**self.session.at(self.step, p)), *own]
            for p, own in wanted.items()
        }
        replies: dict[int, list[Any]] = {}
        errors: list[Exception] = []
        for partition, stream in self.link.exchange(sent).items():
            try:
                own = list(stream)
            except (ClientError, ProtocolError) as error:
                errors.append(error)
                self._drop(partition, error)
                continue
            if partition not in met:
                described = own.pop(0)
                assert isinstance(described, Described)  # Link has checked it
                self.session.clients[partition] = described
            replies[partition] = own
        if errors and not replies and all(isinstance(error, OutOfRangeError) for error in errors):
            raise DivergedError(
                f"every client's numbers are out of range, training has diverged ({errors[0]}); "
                "lower server-learning-rate or client-learning-rate"
            )
        self._check_enough()
        return {partition: replies[partition] for partition in self.partitions}

    @property
    def weights(self) -> list[float]:
        """Share of each remaining client, by its number of training examples where aggregation is
        weighted-mean, else the same for all; they sum to 1. Server and clients use the same."""
        examples = [self.session.clients[p].train_examples for p in self.partitions]
        if self.session.config.aggregation != "weighted-mean":
            examples = [1] * len(examples)
        return [count / sum(examples) for count in examples]

    def train_server(self, clean: dict[int, Activations]) -> tuple[float, dict[int, Tensor]]:
        """One step of the server on the clients' activations, weighted: the loss before it, and
        each client's own cut gradient. A client whose batch gives no finite logits is dropped;
        when it is everybody's, training has diverged. Empties `clean`."""
        server, micro_batch = self.session.server, self.session.config.server_micro_batch
        while True:
            clients, weights = list(self.partitions), self.weights
            try:
                losses, gradients = server.train_jointly(
                    [clean[m] for m in clients], weights, micro_batch
                )
            except UnusableBatchError as error:
                if len(error.indices) == len(clients):
                    raise
                for index in error.indices:
                    self._drop(clients[index], ClientError("its activations give no finite logits"))
                self._check_enough()
                continue
            clean.clear()
            loss = sum(w * x for w, x in zip(weights, losses, strict=True))
            return loss, dict(zip(clients, gradients, strict=True))

    def done(self) -> None:
        """The step is complete: those still here took part in it."""
        self.session.took_part.update(self.partitions)

    def _drop(self, partition: int, error: Exception) -> None:
        self.partitions.remove(partition)
        self.session.dropped.append(Drop(self.step, partition, str(error)))
        log.warning("step %d goes on without client %d: %s", self.step, partition, error)

    def _check_enough(self) -> None:
        least = self.session.config.min_clients
        if len(self.partitions) < least:
            reasons = [d.reason for d in self.session.dropped if d.step == self.step]
            raise ClientError(
                f"step {self.step}: {len(self.partitions)} client(s) left, min-clients = {least}; "
                f"{'; '.join(reasons) or 'no other is connected: are their SuperNodes up?'}"
            )
