"""Activations of a client's mini-batches: Forward, Probe, Evaluate -> Activations."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar, NamedTuple

from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.messages.base import STRICT, Count, Finite, Reply, Request
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.protocol.sequences import check_labels, check_sequences, check_values
from hosl_flower.tensors.raw_bytes import DTYPES, raw_bytes
from hosl_flower.zo.estimator import Point


@dataclass(frozen=True, config=STRICT)
class Activations(Reply):
    """Activations of a mini-batch of R sequences, with its labels.

    On the wire activations and scales are as the run's codec writes them; the link hands them
    on decoded, without scales. R is B, the number of examples, or B * C where answer words are
    scored by their tokens (tasks/answer_words.py).

    Attributes:
        activations: [R, S, H].
        attention_mask: [R, S] bool.
        labels: [B] int64 in 0..C-1, or [0] where they are the client's. Where answers are
            generated, [B, A]: the tokens of the last A positions (tasks/generated_answers.py).
    """

    kind = "activations"
    activations: Tensor
    scales: Tensor
    attention_mask: Tensor
    labels: Tensor

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless it is a batch this run can use: shapes, dtypes, finite."""
        check_sequences(self.activations, self.scales, self.attention_mask, limits, limits.shortest)
        batch, length = self.activations.shape[:2]
        check_labels(self.labels, batch, length, limits)
        check_values(self.activations, self.scales, limits)

    @classmethod
    def largest(cls, request: Any, limits: ReplyLimits, state: ClientState) -> int:
        """Bytes of the activations."""
        item = DTYPES[limits.dtype].itemsize
        return limits.batch * limits.length * limits.hidden * item


@dataclass(frozen=True, config=STRICT)
class Forward(Request):
    """Asks for the activations of a training mini-batch.

    Attributes:
        batch: number of the client's own mini-batch.
        anchor: its cut gradient will come back, and probes of it start from these activations,
            which a client may remember.
    """

    kind = "forward"
    reply: ClassVar[type[Reply]] = Activations
    batch: Count
    anchor: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, config=STRICT)
class Probe(Forward):
    """Asks for the same at theta + coefficient * s(seed)."""

    kind = "probe"
    reply = Activations
    seed: Count
    coefficient: Finite

    @property
    def point(self) -> Point:
        """Where the client submodel is evaluated."""
        return Point(self.seed, self.coefficient)


@dataclass(frozen=True, config=STRICT)
class Evaluate(Request):
    """Asks for the activations of a held-out batch, by its number."""

    kind = "evaluate"
    reply: ClassVar[type[Reply]] = Activations
    batch: Count


class BatchKey(NamedTuple):
    """What the replies about one mini-batch have in common."""

    shape: tuple[int, ...]
    mask: bytes
    labels: tuple[int, ...]

    @classmethod
    def of(cls, reply: Activations) -> "BatchKey":
        """The key of a reply, which need not be kept for it."""
        mask = bytes(raw_bytes(reply.attention_mask))
        return cls(tuple(reply.activations.shape), mask, tuple(reply.labels.flatten().tolist()))


def check_same_batch(keys: Sequence[BatchKey], step: int) -> None:
    """ProtocolError unless all replies of a step are about the same mini-batch."""
    if len(set(keys)) > 1:
        raise ProtocolError(
            f"step {step}: the client's activations are of {len(set(keys))} different mini-batches"
        )
