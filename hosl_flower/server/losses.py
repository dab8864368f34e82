"""Where a step's losses come from: labels that clients sent, or clients that keep them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.tasks.generated_answers import targets
from hosl_flower.tasks.scoring import Scoring


class BatchPiece(NamedTuple):
    """Examples start..stop of one client's mini-batch, number `client`."""

    client: int
    start: int
    stop: int


class LossSource(Protocol):
    """What ends a forward pass and begins the backward pass."""

    def only(self, clients: Collection[int]) -> "LossSource":
        """The source of these clients' losses alone."""

    def outputs(self, states: Tensor) -> Tensor:
        """Hidden states [n, M, D] -> [n, ...], what the loss is a function of."""

    def backward(
        self, outputs: Tensor, batches: Sequence[Activations], pieces: Sequence[BatchPiece],
        weights: Sequence[float],
    ) -> list[float]:  # fmt: skip
        """Back-propagate, from outputs [n, ...] of the pieces' examples, the sum of the clients'
        mean losses, each times its weight; each piece's part of its client's mean loss."""


@dataclass(frozen=True)
class SentLabels:
    """Labels that came with the activations. head: the LM head [V, D]; rows, bias:
    tasks/answer_words.py."""

    answers: Scoring
    head: Tensor
    rows: Tensor
    bias: Tensor | None = None

    def only(self, clients: Collection[int]) -> "SentLabels":
        """Itself: each batch has its labels."""
        return self

    def outputs(self, states: Tensor) -> Tensor:
        """Scores, see tasks/answer_words.py: of labels [n, C], of tokens [n, V, A]."""
        return self.answers.scores_of(states, self.head, self.rows, self.bias)

    def backward(
        self, outputs: Tensor, batches: Sequence[Activations], pieces: Sequence[BatchPiece],
        weights: Sequence[float],
    ) -> list[float]:  # fmt: skip
        """Cross-entropy of the scores."""
        total, row, losses = torch.zeros((), device=outputs.device), 0, []
        for piece in pieces:
            batch = batches[piece.client]
            labels = batch.labels[piece.start : piece.stop].to(outputs.device)
            scores = outputs[row : row + len(labels)]
            if labels.dim() == 2:  # of answers shorter than another client's longest
                scores = scores[..., outputs.shape[-1] - labels.shape[1] :]
            own = F.cross_entropy(scores, labels)
            share = targets(labels) / targets(batch.labels)
            total = total + own * (weights[piece.client] * share)
            losses.append(float(own.detach()) * share)
            row += len(labels)
        total.backward()
        return losses
