"""Answers that are generated: Continue -> Continued, Grade -> Graded."""

from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import OutOfRangeError, ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.messages.activations import Evaluate
from hosl_flower.protocol.messages.base import STRICT, Reply
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.protocol.sequences import check_sequences, check_values
from hosl_flower.tensors.raw_bytes import dtype_name


@dataclass(frozen=True, config=STRICT)
class Continued(Reply):
    """Activations of prompts [B, S, H] or of one token after each [B, 1, H]; without labels."""

    kind = "continued"
    activations: Tensor
    scales: Tensor
    attention_mask: Tensor

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless it is of whole prompts, or of a token after each."""
        check_sequences(self.activations, self.scales, self.attention_mask, limits, 1)
        batch, length = self.activations.shape[:2]
        given, done = request.tokens.shape
        if done and (batch != given or length != 1):
            raise ProtocolError(
                f"activations: expected {given} sequences of 1, got {batch} of {length}"
            )
        check_values(self.activations, self.scales, limits)


@dataclass(frozen=True, config=STRICT)
class Graded(Reply):
    """Scores float32 [B, 2]: exact match and F1 of each answer, 0 to 1."""

    kind = "graded"
    scores: Tensor

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless there are two scores of each of the request's answers."""
        expected, found = [len(request.tokens), 2], self.scores
        if found.dtype != torch.float32 or list(found.shape) != expected:
            raise ProtocolError(
                f"scores: expected float32{expected}, got {dtype_name(found)}{list(found.shape)}"
            )
        if not ((found >= 0) & (found <= 1)).all():  # also false for what is not a number
            raise OutOfRangeError("scores: expected 0 to 1")


@dataclass(frozen=True, config=STRICT)
class Continue(Evaluate):
    """Asks for activations of the batch's prompts, or of the tokens that follow them.

    Attributes:
        tokens: int64 [B, t], after the prompts: activations of the last of these, or of the
            prompts where t = 0 (then B need not be known: [0, 0]).
    """

    kind = "continue"
    reply = Continued
    tokens: Tensor


@dataclass(frozen=True, config=STRICT)
class Grade(Evaluate):
    """Asks for the scores of answers to the batch's prompts.

    Attributes:
        tokens: int64 [B, t]; what follows the end of an answer counts for nothing.
    """

    kind = "grade"
    reply = Graded
    tokens: Tensor
