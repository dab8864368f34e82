"""Checks of activations and of the labels beside them."""

import math

import torch
from torch import Tensor

from hosl_flower.errors import OutOfRangeError, ProtocolError
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.tasks.generated_answers import IGNORED
from hosl_flower.tensors.activation_codec import has_scales, wire_dtype
from hosl_flower.tensors.raw_bytes import DTYPES, dtype_name, first_of, largest


def check_sequences(
    h: Tensor, scales: Tensor, mask: Tensor, limits: ReplyLimits, shortest: int
) -> None:
    """ProtocolError unless activations [B, S, H] have the form of the run, and their mask.

    Args:
        h: the activations, as the codec writes them.
        scales: of the codec.
        mask: of the tokens that are used.
        limits: the bounds of the run.
        shortest: the fewest tokens of a sequence.
    """
    wanted = str(wire_dtype(limits.codec, DTYPES[limits.dtype])).removeprefix("torch.")
    if h.dim() != 3 or dtype_name(h) != wanted or h.shape[2] != limits.hidden:
        raise ProtocolError(
            f"activations: expected {wanted}[B, S, {limits.hidden}], got "
            f"{dtype_name(h)}{list(h.shape)}"
        )
    expected = h.shape[:2] if has_scales(limits.codec) else torch.Size([0])
    if scales.dtype != torch.float32 or scales.shape != expected:
        raise ProtocolError(
            f"scales: expected float32{list(expected)}, got {dtype_name(scales)}"
            f"{list(scales.shape)}"
        )
    batch, length = h.shape[:2]
    if not (0 < batch <= limits.batch and shortest <= length <= limits.length):
        raise ProtocolError(
            f"activations: expected at most {limits.batch} sequences of {shortest} to "
            f"{limits.length} tokens, got {batch} of {length}"
        )
    if mask.dtype != torch.bool or mask.shape != h.shape[:2] or not is_left_padded(mask):
        raise ProtocolError(
            f"attention_mask: expected bool{[batch, length]}, left-padded, "
            f"got {dtype_name(mask)}{list(mask.shape)}"
        )


def is_left_padded(used: Tensor) -> bool:
    """Whether each row of a mask bool [B, S] is used from some place on to its end."""
    return bool((used.long().diff(dim=1) >= 0).all() and used[:, -1].all())


def check_values(h: Tensor, scales: Tensor, limits: ReplyLimits) -> None:
    """OutOfRangeError unless activations are finite and not too large."""
    found = largest(scales) * 127.0 if has_scales(limits.codec) else largest(h)
    if not math.isfinite(found):
        bad = int((~torch.isfinite(h)).sum())
        raise OutOfRangeError(f"activations: {bad} of {h.numel()} values are not finite")
    if found > limits.activation:
        raise OutOfRangeError(
            f"activations: expected at most +-{limits.activation:.3g}, got {found:.3g}"
        )


def check_labels(labels: Tensor, batch: int, length: int, limits: ReplyLimits) -> None:
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
        check_tokens(labels, batch, length, limits)
        return
    if labels.dtype != torch.int64 or labels.shape != (examples,) or rest:
        raise ProtocolError(
            f"labels: expected int64[{examples}], one for {limits.each} of {batch} sequences, got "
            f"{dtype_name(labels)}{list(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= limits.classes:
        outside = (labels < 0) | (labels >= limits.classes)
        raise ProtocolError(
            f"labels: expected 0..{limits.classes - 1}, got {first_of(labels, outside)}"
        )


def check_tokens(labels: Tensor, batch: int, length: int, limits: ReplyLimits) -> None:
    """Labels that are the tokens of answers, left-padded."""
    most = min(limits.longest, length)
    fits = labels.dtype == torch.int64 and labels.dim() == 2 and len(labels) == batch
    if not fits or not 0 < labels.shape[1] <= most:
        raise ProtocolError(
            f"labels: expected int64[{batch}, A] with A at most {most}, got "
            f"{dtype_name(labels)}{list(labels.shape)}"
        )
    tokens = labels != IGNORED
    if not is_left_padded(tokens):
        raise ProtocolError(f"labels: expected tokens in each row, left-padded with {IGNORED}")
    own = labels[tokens]
    if int(own.min()) < 0 or int(own.max()) >= limits.vocabulary:
        outside = tokens & ((labels < 0) | (labels >= limits.vocabulary))
        raise ProtocolError(
            f"labels: expected tokens 0..{limits.vocabulary - 1}, left-padded with {IGNORED}, got "
            f"{first_of(labels, outside)}"
        )
