"""The bounds of a run's replies."""

import math

from pydantic.dataclasses import dataclass

from hosl_flower.errors import OutOfRangeError
from hosl_flower.tensors.raw_bytes import LARGEST_LOSS, LARGEST_SCALAR

_MOST_HELD_OUT = 10**6  # each of their batches is a request of the server's, at every evaluation


@dataclass(frozen=True)
class ReplyLimits:
    """What a run's replies may look like: activations of at most `batch` sequences of `length`
    tokens, of width `hidden` and `dtype`, written by `codec`, with labels of `classes` classes;
    `each` sequences per example, of `shortest` tokens or more, so that an answer has its place;
    at most `held_out` held-out examples. vocabulary: of answers that are generated, whose labels
    are up to `longest` tokens; else 0. private_labels: none are sent; label_counts: numbers of
    examples per label are. update_codec: of gradients and changes of weights.

    activation, state_gradient: most that a value of activations, and of gradients of hidden states,
    may be. step: most that an update of plain gradient descent may change a weight by, at learning
    rate `rate` where the request names none; scalar_step: the same where the update is seeds and
    scalars. All are many times what an honest client sends (server/reference.py)."""

    batch: int
    length: int
    hidden: int
    dtype: str
    classes: int
    held_out: int = _MOST_HELD_OUT
    codec: str = "exact"
    each: int = 1
    shortest: int = 1
    longest: int = 1
    vocabulary: int = 0
    private_labels: bool = False
    label_counts: bool = True
    update_codec: str = "exact"
    activation: float = math.inf
    state_gradient: float = LARGEST_SCALAR
    step: float = math.inf
    scalar_step: float = math.inf
    rate: float = 0.0


def most_per_update(step: float, rate: float) -> float:
    """The most that a value may be which, times the learning rate, changes a weight by `step`."""
    return min(LARGEST_SCALAR, step / rate) if rate else LARGEST_SCALAR


def check_loss(name: str, found: float, examples: int = 1) -> None:
    """OutOfRangeError unless a loss, or the sum of those of `examples` examples, can be one."""
    most = LARGEST_LOSS * examples
    if not 0 <= found <= most:
        raise OutOfRangeError(f"{name}: expected 0..{most:g}, got {found}")
