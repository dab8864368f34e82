"""Where the server's losses come from: its own head and labels it was sent, or the clients'.

With labels = client (a U-shaped split) the server's forward pass ends at the last hidden states
that predict the answers' tokens. They go to the client that has the labels, which sends the loss
and its gradient there (models/label_head.py), and the server's backward pass goes on from that.
Nothing else of a step is different.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hosl_flower.errors import LostClientsError
from hosl_flower.protocol.messages.activations import Activations, Forward
from hosl_flower.protocol.messages.kept_labels import (
    HeldOutStates,
    HiddenGradient,
    HiddenStates,
    Scored,
)
from hosl_flower.server.cohort import arrivals
from hosl_flower.server.link import Deadline, Link
from hosl_flower.server.losses import BatchPiece
from hosl_flower.server.scores import ClientTally
from hosl_flower.server.session import Session
from hosl_flower.tasks.answer_words import AnswerWords

STATES_BYTES = 4 << 20  # of held-out examples' hidden states in one request, about


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
        requests = {
            piece.client: self._request(self.asked[piece.client], piece.start, states)
            for piece, states in parts
        }
        until, spare = Deadline(), len(self.asked) - self.least
        by_partition = self.link.exchange({r.partition: [r] for r in requests.values()}, until)
        streams = {m: by_partition[request.partition] for m, request in requests.items()}
        found: dict[int, HiddenGradient] = {}  # by client
        failed: dict[int, Any] = {}
        for client, reply in arrivals(
            requests, lambda m: next(streams[m]), until, self.seconds, spare
        ):
            if isinstance(reply, Exception):
                streams[client].close()
                failed[client] = reply
            else:
                assert isinstance(reply, HiddenGradient)  # Link has checked it
                found[client] = reply
        return [found[piece.client] for piece, _ in parts if piece.client in found], failed

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
    if config.task.labels == "server":
        return None
    assert isinstance(answers, AnswerWords)  # inputs.make_inputs has checked it
    return KeptLabels(answers, link, tuple(asked), config.deadlines.step, config.clients.minimum)


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
