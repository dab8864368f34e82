"""Gradients and weights of a client.

Backward -> Gradient, LocalStep -> Stepped, Fetch -> Weights, Adopt -> Applied.
"""

from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import OutOfRangeError, ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.messages.activations import Forward
from hosl_flower.protocol.messages.base import STRICT, Count, Digest, Finite, Reply, Request
from hosl_flower.protocol.messages.ledger import Applied
from hosl_flower.protocol.reply_limits import ReplyLimits, most_per_update
from hosl_flower.tensors.raw_bytes import check_vector, largest
from hosl_flower.tensors.update_codec import check

_MOST_UPDATES = 10**12


@dataclass(frozen=True, config=STRICT)
class Update(Reply):
    """Something of the shape of the trainable parameters, as the run's update-codec writes it.

    See tensors/update_codec.py. A subclass with `scaled` is multiplied by the learning rate before
    it changes a weight.
    """

    scaled: ClassVar[bool] = False
    present: Tensor
    values: Tensor
    scales: Tensor

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless it is of the state's rows, and changes weights by little enough."""
        most = most_per_update(limits.step, limits.rate if self.scaled else 1.0)
        check(state.rows.widths(), self, limits.update_codec, self.kind, most)

    @classmethod
    def largest(cls, request: Any, limits: ReplyLimits, state: ClientState) -> int:
        """Bytes of one float32 per trainable parameter."""
        return 4 * state.elements


@dataclass(frozen=True, config=STRICT)
class Change(Update):
    """Trainable weights after local training minus those before."""

    kind = "change"


@dataclass(frozen=True, config=STRICT)
class Gradient(Update):
    """Loss gradient of the trainable parameters."""

    kind = "gradient"
    scaled = True


@dataclass(frozen=True, config=STRICT)
class Stepped(Reply):
    """How many steps of its own the client has taken now."""

    kind = "stepped"
    local: Count

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless it is one step more."""
        if self.local != request.local + 1:
            raise ProtocolError(
                f"expected {request.local + 1} local steps, the client is at {self.local}"
            )


@dataclass(frozen=True, config=STRICT)
class Weights(Reply):
    """A client's weights and the state of its optimizer.

    Attributes:
        updates: how many the optimizer has made.
        weights: the trainable ones [n], in name order and their dtype.
        moments: float32 [k, m] (ledger/client_state.py), or [0].
    """

    kind = "weights"
    updates: Count
    weights: Tensor
    moments: Tensor

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless they are all of this client state's, finite and not too large."""
        check_vector("weights", self.weights, state.weights_like().dtype, state.elements)
        if not largest(self.weights) <= limits.step:
            raise OutOfRangeError(f"weights: expected values of at most +-{limits.step:.3g}")
        if self.updates > _MOST_UPDATES:
            raise ProtocolError(f"updates: expected at most {_MOST_UPDATES}, got {self.updates}")
        if self.moments.numel():
            rows, shape = self.moments, state.moments_shape
            if rows.shape != shape:
                raise ProtocolError(f"moments: expected {list(shape)}, got {list(rows.shape)}")
            for row in rows:
                check_vector("moments", row, torch.float32, shape[1])
            if not (state.second_moments(rows) >= 0).all():
                raise OutOfRangeError("moments: expected second moments of 0 or more")

    @classmethod
    def largest(cls, request: Any, limits: ReplyLimits, state: ClientState) -> int:
        """Bytes of the weights, and of the moments where they were asked for."""
        moments = state.moments_shape[0] * state.moments_shape[1] if request.moments else 0
        return 4 * (state.elements + moments)


@dataclass(frozen=True, config=STRICT)
class Backward(Forward):
    """The loss gradient lambda [B, S, H] at the activations of a mini-batch: asks for theirs.

    Attributes:
        gradient: lambda / scale, as the run's codec writes it (tensors/activation_codec.py).
        scales: of the codec.
        scale: see `gradient`.
    """

    kind = "backward"
    reply: ClassVar[type[Reply]] = Gradient
    gradient: Tensor
    scales: Tensor
    scale: Finite


@dataclass(frozen=True, config=STRICT)
class LocalStep(Backward):
    """The same; the client's own optimizer takes a step along the gradient, in place."""

    kind = "local-step"
    reply = Stepped
    learning_rate: Finite


@dataclass(frozen=True, config=STRICT)
class Fetch(Request):
    """Asks for the weights after `local` steps, and with `moments` for the optimizer's state."""

    kind = "fetch"
    reply = Weights
    private = True
    moments: bool


@dataclass(frozen=True, config=STRICT)
class Adopt(Request):
    """Makes the weights after `local` steps the run's: they are those of position + 1.

    Attributes:
        weights: their fingerprint.
        digest_after: of the ledger there.
    """

    kind = "adopt"
    reply = Applied
    private = True
    weights: Digest
    digest_after: Digest
