"""Losses where labels stay on clients: HiddenStates -> HiddenGradient, HeldOutStates -> Scored."""

from dataclasses import field
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import OutOfRangeError, ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.messages.base import STRICT, Count, Finite, Reply, Request
from hosl_flower.protocol.reply_limits import ReplyLimits, check_loss
from hosl_flower.tensors.raw_bytes import dtype_name, largest


@dataclass(frozen=True, config=STRICT)
class HiddenGradient(Reply):
    """The loss of the examples of a HiddenStates, and its gradient.

    Attributes:
        loss: mean cross-entropy.
        gradient: of the loss with respect to the states, float32 [b, M, D], or [0] where only
            losses were wanted.
    """

    kind = "hidden-gradient"
    loss: Finite
    gradient: Tensor

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless there is a loss, and a gradient of the states if it was wanted."""
        shape = [0] if request.losses_only else list(request.states.shape)
        gradient, most = self.gradient, limits.state_gradient
        if gradient.dtype != torch.float32 or list(gradient.shape) != shape:
            raise ProtocolError(
                f"gradient: expected float32{shape}, got "
                f"{dtype_name(gradient)}{list(gradient.shape)}"
            )
        check_loss("loss", self.loss)
        if not largest(gradient) <= most:  # also false for what is not a number
            raise OutOfRangeError(f"gradient: expected values of at most +-{most:.3g}")


@dataclass(frozen=True, config=STRICT)
class Scored(Reply):
    """How many examples of a HeldOutStates were right, and the sum of their losses."""

    kind = "scored"
    correct: Count
    loss_sum: Finite

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless the counts are of the examples that were sent."""
        examples = len(request.states)
        if self.correct > examples:
            raise ProtocolError(f"correct: expected at most {examples}, got {self.correct}")
        check_loss("loss_sum", self.loss_sum, examples)


@dataclass(frozen=True, config=STRICT)
class HiddenStates(Request):
    """The server submodel's last hidden states of some examples of a mini-batch.

    Attributes:
        batch: number of the mini-batch.
        first: the first of the examples, by its place in the mini-batch.
        states: float32 [b, M, D] (tasks/answer_words.py).
        losses_only: no gradient is wanted.
    """

    kind = "hidden-states"
    reply = HiddenGradient
    anywhere = True
    batch: Count
    first: Count
    states: Tensor
    losses_only: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, config=STRICT)
class HeldOutStates(Request):
    """The same of held-out examples, from number `first` on."""

    kind = "held-out-states"
    reply = Scored
    anywhere = True
    first: Count
    states: Tensor
