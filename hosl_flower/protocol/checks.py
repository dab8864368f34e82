"""What replies must be beyond their form: shapes, ranges, finite numbers, one mini-batch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import OutOfRangeError, ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.messages.registry import (
    Activations,
    Continue,
    Continued,
    Described,
    Fingerprint,
    Fingerprinted,
    Grade,
    Graded,
    Gradient,
    HeldOutStates,
    HiddenGradient,
    HiddenStates,
    LocalProbe,
    Reply,
    Scalars,
    Scored,
    Update,
    Weights,
)
from hosl_flower.tasks.generated_answers import IGNORED
from hosl_flower.tensors.activation_codec import has_scales, wire_dtype
from hosl_flower.tensors.raw_bytes import (
    DTYPES,
    LARGEST_LOSS,
    LARGEST_SCALAR,
    check_vector,
    dtype_name,
    largest,
    raw_bytes,
)
from hosl_flower.tensors.update_codec import RowLayout, check

_MOST_EXAMPLES = 10**9
_MOST_HELD_OUT = 10**6  # each of their batches is a request of the server's, at every evaluation
_MOST_UPDATES = 10**12
_MOST_BYTES = 2**46  # 64 TiB


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
    scalars. All are many times what an honest client sends (reference.py)."""

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


def check_measures(reply: Reply) -> None:
    """ProtocolError when a client claims more memory than any machine has."""
    most = max(reply.peak_bytes, *reply.tensor_peaks)
    if most > _MOST_BYTES:
        raise ProtocolError(f"memory: expected at most {_MOST_BYTES} bytes, got {most}")


def check_update(reply: Update, rows: RowLayout, limits: ReplyLimits) -> None:
    """ProtocolError unless a gradient or a change of weights is of these rows, and none of its
    values would change a weight by more than `limits.step`."""
    rate = limits.rate if isinstance(reply, Gradient) else 1.0
    check(rows.widths(), reply, limits.update_codec, reply.kind, _most(limits.step, rate))


def _most(step: float, rate: float) -> float:
    """Most that a value may be which, times the learning rate, changes a weight."""
    return min(LARGEST_SCALAR, step / rate) if rate else LARGEST_SCALAR


def check_described(reply: Described, limits: ReplyLimits) -> None:
    """ProtocolError unless a client's numbers of examples fit each other and the run."""
    train, held_out, counts = reply.train_examples, reply.held_out_examples, reply.label_counts
    if not limits.label_counts:
        if counts or not 0 < train <= _MOST_EXAMPLES:
            raise ProtocolError(
                f"described: expected 1 or more training examples and no label counts, which stay "
                f"on the client; got {train} and {len(counts)} counts"
            )
    elif len(counts) != limits.classes or sum(counts) != train or not 0 < train <= _MOST_EXAMPLES:
        raise ProtocolError(
            f"described: expected {limits.classes} label counts that sum to the number of training "
            f"examples, 1 or more; got {list(counts[:8])} and {train}"
        )
    if not 0 < held_out <= limits.held_out:
        raise ProtocolError(
            f"described: expected 1 to {limits.held_out} held-out examples, got {held_out} "
            "(eval-examples uses fewer)"
        )
    overlap = reply.held_out_overlap
    if overlap and (
        len(overlap) != 4 or not overlap[1] <= overlap[0] <= held_out or not overlap[0]
    ):
        raise ProtocolError(
            f"described: expected held_out_overlap to be () or (examples, shared, row, row) with "
            f"shared <= examples <= {held_out}, got {overlap[:8]}"
        )


def check_activations(reply: Activations, limits: ReplyLimits) -> None:
    """ProtocolError unless the reply is a batch this run can use: shapes, dtypes, finite."""
    _check_sequences(reply, limits, limits.shortest)
    batch, length = reply.activations.shape[:2]
    _check_labels(reply.labels, batch, length, limits)
    _check_values(reply, limits)


def check_continued(reply: Continued, request: Continue, limits: ReplyLimits) -> None:
    """ProtocolError unless the reply is of whole prompts, or of a token after each."""
    _check_sequences(reply, limits, 1)
    batch, length = reply.activations.shape[:2]
    given, done = request.tokens.shape
    if done and (batch != given or length != 1):
        raise ProtocolError(
            f"activations: expected {given} sequences of 1, got {batch} of {length}"
        )
    _check_values(reply, limits)


def check_graded(reply: Graded, request: Grade) -> None:
    """ProtocolError unless there are two scores of each of the request's answers."""
    expected, found = [len(request.tokens), 2], reply.scores
    if found.dtype != torch.float32 or list(found.shape) != expected:
        raise ProtocolError(
            f"scores: expected float32{expected}, got {dtype_name(found)}{list(found.shape)}"
        )
    if not ((found >= 0) & (found <= 1)).all():  # also false for what is not a number
        raise OutOfRangeError("scores: expected 0 to 1")


def _check_sequences(reply: Activations | Continued, limits: ReplyLimits, shortest: int) -> None:
    """Form of activations [B, S, H], of sequences of `shortest` tokens or more, and their mask."""
    h, mask = reply.activations, reply.attention_mask
    wanted = str(wire_dtype(limits.codec, DTYPES[limits.dtype])).removeprefix("torch.")
    if h.dim() != 3 or dtype_name(h) != wanted or h.shape[2] != limits.hidden:
        raise ProtocolError(
            f"activations: expected {wanted}[B, S, {limits.hidden}], got "
            f"{dtype_name(h)}{list(h.shape)}"
        )
    scales = h.shape[:2] if has_scales(limits.codec) else torch.Size([0])
    if reply.scales.dtype != torch.float32 or reply.scales.shape != scales:
        raise ProtocolError(
            f"scales: expected float32{list(scales)}, got {dtype_name(reply.scales)}"
            f"{list(reply.scales.shape)}"
        )
    batch, length = h.shape[:2]
    if not (0 < batch <= limits.batch and shortest <= length <= limits.length):
        raise ProtocolError(
            f"activations: expected at most {limits.batch} sequences of {shortest} to "
            f"{limits.length} tokens, got {batch} of {length}"
        )
    if mask.dtype != torch.bool or mask.shape != h.shape[:2] or not _is_left_padded(mask):
        raise ProtocolError(
            f"attention_mask: expected bool{[batch, length]}, left-padded, "
            f"got {dtype_name(mask)}{list(mask.shape)}"
        )


def _is_left_padded(used: Tensor) -> bool:
    """Whether each row of a mask bool [B, S] is used from some place on to its end."""
    return bool((used.long().diff(dim=1) >= 0).all() and used[:, -1].all())


def _check_values(reply: Activations | Continued, limits: ReplyLimits) -> None:
    h = reply.activations
    found = largest(reply.scales) * 127.0 if has_scales(limits.codec) else largest(h)
    if not math.isfinite(found):
        bad = int((~torch.isfinite(h)).sum())
        raise OutOfRangeError(f"activations: {bad} of {h.numel()} values are not finite")
    if found > limits.activation:
        raise OutOfRangeError(
            f"activations: expected at most +-{limits.activation:.3g}, got {found:.3g}"
        )


def _check_labels(labels: Tensor, batch: int, length: int, limits: ReplyLimits) -> None:
    """Of the examples of `batch` sequences of `length` tokens."""
    examples, rest = divmod(batch, limits.each)
    if limits.private_labels:
        if labels.numel() or rest:
            raise ProtocolError(
                f"labels: expected none, they stay on the client, and {limits.each} sequences per "
                f"example; got {labels.numel()} with {batch} sequences"
            )
        return
    if limits.vocabulary:
        _check_tokens(labels, batch, length, limits)
        return
    if labels.dtype != torch.int64 or labels.shape != (examples,) or rest:
        raise ProtocolError(
            f"labels: expected int64[{examples}], one for {limits.each} of {batch} sequences, got "
            f"{dtype_name(labels)}{list(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= limits.classes:
        raise ProtocolError(
            f"labels: expected 0..{limits.classes - 1}, got {labels.unique().tolist()}"
        )


def _check_tokens(labels: Tensor, batch: int, length: int, limits: ReplyLimits) -> None:
    """Labels that are the tokens of answers, left-padded."""
    most = min(limits.longest, length)
    fits = labels.dtype == torch.int64 and labels.dim() == 2 and len(labels) == batch
    if not fits or not 0 < labels.shape[1] <= most:
        raise ProtocolError(
            f"labels: expected int64[{batch}, A] with A at most {most}, got "
            f"{dtype_name(labels)}{list(labels.shape)}"
        )
    tokens = labels != IGNORED
    own = labels[tokens]
    if not _is_left_padded(tokens) or int(own.min()) < 0 or int(own.max()) >= limits.vocabulary:
        raise ProtocolError(
            f"labels: expected tokens 0..{limits.vocabulary - 1}, left-padded with {IGNORED}, got "
            f"{labels.unique().tolist()[:8]}"
        )


def check_hidden_gradient(
    reply: HiddenGradient, request: HiddenStates, most: float = LARGEST_SCALAR
) -> None:
    """ProtocolError unless there is a loss, and one float32 of at most `most` per value of the
    states where a gradient was wanted."""
    shape = [0] if request.losses_only else list(request.states.shape)
    gradient = reply.gradient
    if gradient.dtype != torch.float32 or list(gradient.shape) != shape:
        raise ProtocolError(
            f"gradient: expected float32{shape}, got {dtype_name(gradient)}{list(gradient.shape)}"
        )
    _check_loss("loss", reply.loss)
    if not largest(gradient) <= most:  # also false for what is not a number
        raise OutOfRangeError(f"gradient: expected values of at most +-{most:.3g}")


def check_scored(reply: Scored, request: HeldOutStates) -> None:
    """ProtocolError unless the counts are of the examples that were sent."""
    examples = len(request.states)
    if reply.correct > examples:
        raise ProtocolError(f"correct: expected at most {examples}, got {reply.correct}")
    _check_loss("loss_sum", reply.loss_sum, examples)


def _check_loss(what: str, found: float, examples: int = 1) -> None:
    most = LARGEST_LOSS * examples
    if not 0 <= found <= most:
        raise OutOfRangeError(f"{what}: expected 0..{most:g}, got {found}")


def check_scalars(reply: Scalars, request: LocalProbe, step: float = math.inf) -> None:
    """ProtocolError unless there is one float32 per local step and direction, of at most
    LARGEST_SCALAR, and so much that it changes a weight by at most `step`."""
    expected = [len(request.local_seeds), request.directions]
    found = reply.scalars
    if found.dtype != torch.float32 or list(found.shape) != expected:
        raise ProtocolError(
            f"scalars: expected float32{expected}, got {dtype_name(found)}{list(found.shape)}"
        )
    most = _most(step, request.learning_rate)
    if not largest(found) <= most:  # also false for what is not a number
        raise OutOfRangeError(
            f"scalars: expected at most +-{most:.3g}, got {found.flatten()[:8].tolist()}"
        )
    _check_loss("loss", reply.loss)


def check_weights(reply: Weights, state: ClientState, most: float = math.inf) -> None:
    """ProtocolError unless they are all of this client state's, finite, weights at most `most`."""
    check_vector("weights", reply.weights, state.weights_like().dtype, state.elements)
    if not largest(reply.weights) <= most:
        raise OutOfRangeError(f"weights: expected values of at most +-{most:.3g}")
    if reply.updates > _MOST_UPDATES:
        raise ProtocolError(f"updates: expected at most {_MOST_UPDATES}, got {reply.updates}")
    if reply.moments.numel():
        rows, shape = reply.moments, state.moments_shape
        if rows.shape != shape:
            raise ProtocolError(f"moments: expected {list(shape)}, got {list(rows.shape)}")
        for row in rows:
            check_vector("moments", row, torch.float32, shape[1])
        if not (state.second_moments(rows) >= 0).all():
            raise OutOfRangeError("moments: expected second moments of 0 or more")


def check_fingerprints(reply: Fingerprinted, request: Fingerprint) -> None:
    """ProtocolError unless they are of positions since.., in order, the request's last."""
    positions = list(reply.positions)
    fits = len(positions) == len(reply.fingerprints) and positions == sorted(set(positions))
    if not fits or not positions or positions[-1] != request.position:
        raise ProtocolError(
            f"fingerprints: expected positions up to {request.position}, got {positions[-3:]} "
            f"with {len(reply.fingerprints)} fingerprints"
        )


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
