"""The clients of one step, of which some may fail."""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from hosl_flower.errors import (
    AbsentError,
    ClientError,
    DivergedError,
    DriftError,
    LostClientsError,
    OutOfRangeError,
    ProtocolError,
    UnusableBatchError,
)
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.describe import Describe, Described
from hosl_flower.server.link import NOT_YET, Deadline, Link
from hosl_flower.server.losses import LossSource
from hosl_flower.server.schedule import rate_factor
from hosl_flower.server.session import Session

log = logging.getLogger("hosl_flower")

_MOMENT = 0.05  # seconds between two looks at clients that are late
_MOST_REASONS = 5  # in one error


def absent(session: Session, link: Link) -> set[int]:
    """Partitions that a step does without: those with no node, and those that are late with an
    earlier one. Late ones are waited for while there are fewer others than min-clients."""
    config = session.config
    give_up = time.monotonic() + config.deadlines.reply
    while True:
        gone, late = link.absent(), link.late()
        left = config.clients.count - len(gone | late)
        if left >= config.clients.minimum or not late - gone or time.monotonic() > give_up:
            return gone | late
        time.sleep(_MOMENT)


def arrivals(
    clients: Iterable[int],
    take: Callable[[int], Any],
    until: Deadline,
    seconds: float,
    spare: int,
) -> Iterator[tuple[int, Any]]:
    """Clients' replies as they come, or the errors of those that fail or are late.

    Args:
        clients: those whose replies are wanted.
        take: a client's reply, or NOT_YET; raises what the client fails with.
        until: the deadline of the exchanges that `take` reads.
        seconds: the step-deadline, after which clients that are late are left out; 0: never.
        spare: how many clients may fail or be late. More are waited for, one after the other.

    Yields:
        A client and its reply, or ClientError, ProtocolError or DriftError.
    """
    waiting = list(clients)
    until.time = time.monotonic() + seconds if seconds else math.inf
    try:
        while waiting:
            late = []
            for client in waiting:
                try:
                    reply = take(client)
                except (ClientError, ProtocolError, DriftError) as error:
                    spare -= 1
                    yield client, error
                    continue
                if reply is NOT_YET:
                    late.append(client)
                else:
                    yield client, reply
            waiting = late
            if spare < 0 or len(waiting) <= spare:
                break  # else the first of the late are enough, whoever they are
            until.time = time.monotonic() + _MOMENT
    finally:
        until.time = math.inf
    for client in waiting:
        yield client, AbsentError(f"it did not answer within {seconds:g} s (step-deadline)")


class Cohort:
    """The sampled partitions of a step, less those that fail: a client that errs, times out or
    sends what it should not is left out of the rest of the step, and the step goes on with the
    others as long as min-clients remain."""

    def __init__(self, session: Session, step: int, partitions: Iterable[int]):
        self.session, self.step = session, step
        self.partitions = list(partitions)
        self._reasons: list[str] = []  # of those that were left out
        self._loss = 0.0  # weighted, of what was propagated last

    @property
    def weights(self) -> list[float]:
        """Share of each remaining client, by its number of training examples where aggregation is
        weighted-mean, else the same for all; they sum to 1. Server and clients use the same."""
        examples = [self.session.participation.clients[p].train_examples for p in self.partitions]
        if self.session.config.aggregation.rule != "weighted-mean":
            examples = [1] * len(examples)
        return [count / sum(examples) for count in examples]

    def train_server(
        self, clean: dict[int, Activations], labels: LossSource | None = None
    ) -> float:
        """One step of the server on the clients' activations: the weighted loss before it.

        `cut_gradients` and `step_server` in one, where no client needs a gradient.
        """
        for _ in self._propagate(clean, labels, cut_gradients=False):
            pass
        return self.step_server()

    def cut_gradients(
        self, clean: dict[int, Activations], labels: LossSource | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Back-propagate the weighted sum of the clients' losses; `step_server` is the step.

        A client whose batch gives no finite logits, or that keeps its labels and gives no gradient,
        or whose batch leads out of the numbers that training can use (trainer.py), is dropped and
        the rest is propagated again, before the optimizer has moved anything. When all batches are
        like that, training has diverged. When it cannot be told which, the server does not move in
        this step.

        Args:
            clean: activations by partition. They are taken out of it.
            labels: where the losses of these activations come from; None: labels in them.

        Yields:
            A client and its own cut gradient, as soon as there is one and once each, so that
            clients can probe while the server works on the others' activations.

        Raises:
            UnusableBatchError, DivergedError, ClientError: too few clients are left.
        """
        return self._propagate(clean, labels, cut_gradients=True)

    def step_server(self) -> float:
        """One step of the server along what has been propagated: the weighted loss before it."""
        self.session.server.apply(rate_factor(self.session.config, self.step))
        return self._loss

    def _propagate(
        self, clean: dict[int, Activations], labels: LossSource | None, cut_gradients: bool
    ) -> Iterator[tuple[int, Tensor]]:
        server, micro_batch = self.session.server, self.session.config.server.micro_batch
        given: set[int] = set()
        while True:
            clients, weights = list(self.partitions), self.weights
            self._loss = 0.0
            propagated = server.propagate(
                [clean[m] for m in clients],
                weights,
                micro_batch,
                cut_gradients,
                labels.only(clients) if labels else None,
            )
            try:
                for index, loss, gradient in propagated:
                    self._loss += weights[index] * loss
                    if clients[index] not in given:
                        given.add(clients[index])
                        yield clients[index], gradient
            except UnusableBatchError as error:
                if len(error.reasons) == len(clients):
                    raise
                if len(clients) - len(error.reasons) < self.session.config.clients.minimum:
                    which = ", ".join(str(clients[index]) for index in error.reasons)
                    raise DivergedError(f"client(s) {which} of {len(clients)}: {error}") from error
                if not error.reasons:  # nothing has been propagated
                    log.warning("step %d: the server does not move: %s", self.step, error)
                    break
                for index, why in error.reasons.items():
                    self.drop(clients[index], ClientError(why))
                self.check_enough()
            except LostClientsError as error:
                for index, reason in error.errors.items():
                    self.drop(clients[index], reason)
                self.check_enough()
            else:
                break
        clean.clear()

    def done(self) -> None:
        """The step is complete: those still here took part in it."""
        self.session.participation.took_part.update(self.partitions)

    def drop(self, partition: int, error: Exception) -> None:
        """Leave a client out of the rest of the step."""
        self.partitions.remove(partition)
        self._reasons.append(str(error))
        self.session.participation.drop(self.step, partition, str(error))
        log.warning("step %d goes on without client %d: %s", self.step, partition, error)

    def check_enough(self) -> None:
        """ClientError when fewer than min-clients are left."""
        least = self.session.config.clients.minimum
        if len(self.partitions) < least:
            reasons = "; ".join(self._reasons[:_MOST_REASONS])
            raise ClientError(
                f"step {self.step}: {len(self.partitions)} client(s) left, min-clients = {least}; "
                f"{reasons or 'no other is connected: are their SuperNodes up?'}"
            )


class Question:
    """One request to each client of some cohorts, on its way; the replies are taken cohort by
    cohort, in the order they were asked. A client that fails once answers no later cohort."""

    def __init__(self, session: Session, link: Link):
        self.session, self.link = session, link
        self._queued: list[Request] = []
        # by step and partition
        self._streams: dict[tuple[int, int], Generator[Any, None, None]] = {}
        self._undescribed: set[int] = set()  # whose first reply is a description
        self._failed: dict[int, Exception] = {}
        self._until = Deadline()

    def add(self, *requests: Request) -> None:
        """Send requests with all others, when the first answer is wanted."""
        self._queued.extend(requests)

    def send(self, request: Request) -> None:
        """Send a request now, where the link can do that at no extra cost."""
        self.add(request)
        if self.link.pipelined:
            self._flush()

    def _flush(self) -> None:
        """Send what is queued. A client that has not been met yet describes itself first."""
        wanted: dict[int, list[Request]] = {}
        met = self.session.participation.clients.keys()
        for request in self._queued:
            own = wanted.setdefault(request.partition, [])
            if not (own or request.partition in met | self._undescribed):
                self._undescribed.add(request.partition)
                own.append(Describe(**self.session.at(request.step, request.partition)))
            own.append(request)
        streams = self.link.exchange(wanted, self._until)
        for request in self._queued:
            self._streams[request.step, request.partition] = streams[request.partition]
        self._queued.clear()

    def answers(self, cohort: Cohort) -> dict[int, Any]:
        """Replies by partition, of those who answered; the others are dropped.

        With a step-deadline, clients that are late are left out as soon as it has passed and
        min-clients have answered. Raises ClientError when too few are left, DriftError when that
        is because they are not what their ledgers say, DivergedError when it is because their
        numbers are out of range.
        """
        self._flush()
        config = self.session.config
        replies: dict[int, Any] = {}
        errors: list[Exception] = []
        spare = len(cohort.partitions) - config.clients.minimum
        for partition, reply in arrivals(
            cohort.partitions,
            partial(self._next, cohort.step),
            self._until,
            config.deadlines.step,
            spare,
        ):
            if isinstance(reply, Exception):
                self._fail(cohort, partition, reply)
                errors.append(reply)
            else:
                replies[partition] = reply
        replies = {m: replies[m] for m in cohort.partitions}  # in their order, not that of arrival
        too_few = len(cohort.partitions) < config.clients.minimum
        if too_few and errors and all(isinstance(error, OutOfRangeError) for error in errors):
            raise DivergedError(
                f"the numbers of {len(errors)} of {len(errors) + len(replies)} clients are out of "
                f"range, training has diverged ({errors[0]}); lower server-learning-rate or "
                "client-learning-rate"
            )
        if too_few and errors and all(isinstance(error, DriftError) for error in errors):
            raise errors[0]
        cohort.check_enough()
        return replies

    def _fail(self, cohort: Cohort, partition: int, error: Exception) -> None:
        """One client answers nothing more of this question."""
        self._failed[partition] = error
        for key in [key for key in self._streams if key[1] == partition]:
            self._streams.pop(key).close()
        cohort.drop(partition, error)

    def _next(self, step: int, partition: int) -> Any:
        """The reply of a step, or NOT_YET."""
        if partition in self._failed:
            raise self._failed[partition]
        stream = self._streams[step, partition]
        if partition in self._undescribed:
            described = next(stream)
            if described is NOT_YET:
                return NOT_YET
            assert isinstance(described, Described)  # Link has checked it
            self.session.participation.clients[partition] = described
            self._undescribed.remove(partition)
        reply = next(stream)
        if reply is not NOT_YET:
            del self._streams[step, partition]
        return reply
