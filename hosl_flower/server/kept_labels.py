"""Where the server's losses come from: its own head and labels it was sent, or the clients'.

With labels = client (a U-shaped split) the server's forward pass ends at the last hidden states
that predict the answers' tokens. They go to the client that has the labels, which sends the loss
and its gradient there (output_head.py), and the server's backward pass goes on from that. Nothing
else of a step is different.
"""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hosl_flower.errors import (
    ClientError,
    DriftError,
    LostClientsError,
    ProtocolError,
)
from hosl_flower.protocol.messages.activations import Activations, Forward
from hosl_flower.protocol.messages.kept_labels import (
    HeldOutStates,
    HiddenGradient,
    HiddenStates,
    Scored,
)
from hosl_flower.server.cohort import too_late
from hosl_flower.server.link import NOT_YET, Link
from hosl_flower.server.losses import BatchPiece
from hosl_flower.server.scores import ClientTally
from hosl_flower.server.session import Session
from hosl_flower.tasks.answer_words import AnswerWords

STATES_BYTES = 4 << 20  # of held-out examples' hidden states in one request, about
_MOMENT = 0.05  # seconds between two looks at clients that are late


@dataclass(frozen=True)
class KeptLabels:
    """Labels that stay on the clients. asked: the request each mini-batch is the answer to;
    seconds: after which clients are left out of a step as long as `least` remain, 0 for never."""

    answers: AnswerWords
    link: Link
    asked: Sequence[Forward]
    seconds: float = 0.0
    least: int = 1

    def only(self, clients: Collection[int]) -> "KeptLabels":
        """Those of these clients' mini-batches."""
        return replace(self, asked=tuple(r for r in self.asked if r.partition in clients))

    def outputs(self, states: Tensor) -> Tensor:
        """The states themselves."""
        return states

    def backward(
        self, outputs: Tensor, batches: Sequence[Activations], pieces: Sequence[BatchPiece],
        weights: Sequence[float],
    ) -> list[float]:  # fmt: skip
        """All clients of the pieces are asked at once. LostClientsError names those that fail."""
        sizes = [piece.stop - piece.start for piece in pieces]
        parts = outputs.detach().cpu().split(sizes)
        found, failed = self._ask(list(zip(pieces, parts, strict=True)))
        if failed:
            raise LostClientsError(failed)
        gradients, losses = [], []
        for piece, reply in zip(pieces, found, strict=True):
            examples = len(batches[piece.client].activations) // self.answers.sequences
            share = (piece.stop - piece.start) / examples
            gradients.append(reply.gradient * (weights[piece.client] * share))
            losses.append(reply.loss * share)
        outputs.backward(torch.cat(gradients).to(outputs.device))
        return losses

    def losses(self, states: Sequence[Tensor]) -> list[float]:
        """Mean losses of whole mini-batches of one client, given their hidden states [B, M, D]."""
        asked = self.asked[0]
        requests = [self._request(asked, 0, own.cpu(), losses_only=True) for own in states]
        replies: Iterator[Any] = self.link.exchange({asked.partition: requests})[asked.partition]
        return [reply.loss for reply in replies]

    def _ask(
        self, parts: Sequence[tuple[BatchPiece, Tensor]]
    ) -> tuple[list[HiddenGradient], dict[int, Any]]:
        """Replies in order, and the errors of clients that gave none."""
        requests = {}
        for piece, states in parts:
            asked = self.asked[piece.client]
            requests[asked.partition] = [self._request(asked, piece.start, states)]
        streams = self.link.exchange(requests)
        found: dict[int, HiddenGradient] = {}  # by client
        failed: dict[int, Any] = {}
        waiting = [piece.client for piece, _ in parts]
        self.link.until = time.monotonic() + self.seconds if self.seconds else math.inf
        try:
            while waiting:
                waiting = [m for m in waiting if not self._take(m, streams, found, failed)]
                spare = len(self.asked) - self.least - len(failed)
                if spare < 0 or len(waiting) <= spare:
                    break  # else the first of the late are enough, whoever they are
                self.link.until = time.monotonic() + _MOMENT
        finally:
            self.link.until = math.inf
        for client in waiting:
            streams[self.asked[client].partition].close()
            failed[client] = too_late(self.seconds)
        return [found[piece.client] for piece, _ in parts if piece.client in found], failed

    def _take(
        self,
        client: int,
        streams: Mapping[int, Iterator[Any]],
        found: dict[int, HiddenGradient],
        failed: dict[int, Any],
    ) -> bool:
        """One client's reply, or what it failed with; False when it is not there yet."""
        try:
            reply = next(streams[self.asked[client].partition])
        except (ClientError, ProtocolError, DriftError) as error:
            failed[client] = error
            return True
        if reply is NOT_YET:
            return False
        assert isinstance(reply, HiddenGradient)  # Link has checked it
        found[client] = reply
        return True

    def _request(
        self, asked: Forward, first: int, states: Tensor, losses_only: bool = False
    ) -> HiddenStates:
        at = {key: getattr(asked, key) for key in ("step", "partition", "position", "digest")}
        return HiddenStates(
            **at, batch=asked.batch, first=first, states=states, losses_only=losses_only
        )


def kept(session: Session, link: Link, asked: Iterable[Forward]) -> KeptLabels | None:
    """Where the labels of these mini-batches are, if they do not come with the activations."""
    config, answers = session.config, session.encoder.answers
    if config.labels == "server":
        return None
    assert isinstance(answers, AnswerWords)  # inputs.make_inputs has checked it
    return KeptLabels(answers, link, tuple(asked), config.step_deadline, config.min_clients)


def score_by_client(link: Link, at: dict[str, Any], states: Iterable[Tensor]) -> ClientTally:
    """Have a client score all of its held-out examples. at: the fields of a request; states: the
    hidden states [n, M, D] of consecutive batches of them.

    They go in as few requests as their size allows, of like size, so that a total is of many
    examples; but a request has one at least, however large.
    """
    whole = torch.cat([own.cpu() for own in states])
    parts = whole.tensor_split(min(len(whole), -(-whole.nbytes // STATES_BYTES)))
    requests, first = [], 0
    for part in parts:
        requests.append(HeldOutStates(**at, first=first, states=part.contiguous()))
        first += len(part)
    tally = ClientTally(len(whole))
    for reply in link.exchange({at["partition"]: requests})[at["partition"]]:
        assert isinstance(reply, Scored)  # Link has checked it
        tally.correct += reply.correct
        tally.loss_sum += reply.loss_sum
    return tally
