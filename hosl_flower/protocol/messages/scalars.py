"""Scalars that a client finds by itself.

CutGradient, HeadProbe -> Scalars, LocalTrain -> Change.
"""

from dataclasses import field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import OutOfRangeError, ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.messages.activations import Forward
from hosl_flower.protocol.messages.base import STRICT, Counts, Finite, Reply
from hosl_flower.protocol.messages.gradients import Backward, Change
from hosl_flower.protocol.reply_limits import ReplyLimits, check_loss, most_per_update
from hosl_flower.tensors.raw_bytes import dtype_name, first_of, largest


@dataclass(frozen=True, config=STRICT)
class Scalars(Reply):
    """Projected gradients of the client's own surrogate.

    Attributes:
        scalars: float32 [E, P], the 1/P inside.
        loss: of the auxiliary head before the steps, where that is the surrogate.
    """

    kind = "scalars"
    scalars: Tensor
    loss: Finite = field(default=0.0, kw_only=True)

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless there is one per local step and direction, not too large."""
        expected = [len(request.local_seeds), request.directions]
        found = self.scalars
        if found.dtype != torch.float32 or list(found.shape) != expected:
            raise ProtocolError(
                f"scalars: expected float32{expected}, got {dtype_name(found)}{list(found.shape)}"
            )
        most = most_per_update(limits.scalar_step, request.learning_rate)
        if not largest(found) <= most:  # also false for what is not a number
            beyond = ~(found.double().abs() <= most)
            raise OutOfRangeError(
                f"scalars: expected at most +-{most:.3g}, got {first_of(found, beyond)}"
            )
        check_loss("loss", self.loss)


@dataclass(frozen=True, config=STRICT)
class LocalProbe(Forward):
    """The base of probes of a surrogate that needs no server, in E local steps.

    Attributes:
        directions: P, the seeds of one local step.
        seeds: E * P, step after step.
        epsilon: the probe distance; 0, of a CutGradient, is the derivative itself.
        learning_rate: of the local updates between the steps, which the client takes back.
    """

    directions: Annotated[int, Field(ge=1, lt=2**31)]
    seeds: Counts
    epsilon: Finite
    learning_rate: Finite

    @property
    def local_seeds(self) -> list[tuple[int, ...]]:
        """Seeds of each local step; ProtocolError when they do not fit."""
        steps, rest = divmod(len(self.seeds), self.directions)
        if rest or not steps:
            raise ProtocolError(
                f"{self.kind}: {len(self.seeds)} seeds are no steps of {self.directions} directions"
            )
        size = self.directions
        return [self.seeds[i * size : (i + 1) * size] for i in range(steps)]


@dataclass(frozen=True, config=STRICT)
class HeadProbe(LocalProbe):
    """The surrogate is the loss of the client's auxiliary head.

    Each local step has a mini-batch of its own, the next in turn from `batch` on.
    """

    kind = "head-probe"
    reply = Scalars
    private = True


@dataclass(frozen=True, config=STRICT)
class CutGradient(LocalProbe, Backward):
    """The loss gradient lambda at the activations: the surrogate is <lambda, f_c>.

    lambda and the mini-batch are the same in all local steps.
    """

    kind = "cut-gradient"
    reply: ClassVar[type[Reply]] = Scalars


@dataclass(frozen=True, config=STRICT)
class LocalTrain(CutGradient):
    """The same; the client sends how its weights changed, then takes the change back."""

    kind = "local-train"
    reply = Change
