"""Tensors to bytes and back, for every dtype (numpy has no bfloat16)."""

import math
import reprlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hosl_flower.errors import OutOfRangeError, ProtocolError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int8,
        torch.bool,
    )
}
MAX_DIMENSIONS = 4
_MOST_ELEMENTS = 2**40  # of a tensor on the wire
LARGEST_SCALAR = 1e12  # its square, in Adam's second moment, is far from float32's end
LARGEST_LOSS = 1e3  # nats, mean of a batch: a model that guesses has the log of the classes


def dtype_name(tensor: Tensor) -> str:
    """The name a dtype travels under: "float32", "bfloat16" ..."""
    return str(tensor.dtype).removeprefix("torch.")


def largest(tensor: Tensor) -> float:
    """The largest absolute value, without a copy; not a number if one element is none."""
    if not tensor.numel():
        return 0.0
    low, high = map(float, torch.aminmax(tensor.detach()))
    return max(-low, high)  # of two that are no numbers, the first


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of a tensor with values that are not finite; "" when there is none."""
    bad = (
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not math.isfinite(largest(tensor))
    )
    return next(bad, "")


def first_of(tensor: Tensor, bad: Tensor) -> str:
    """The first of the elements that are bad, and its place, for a message."""
    place = bad.nonzero()[0].tolist()
    value = tensor[tuple(place)].item()
    return f"{value:.6g} at {place}" if isinstance(value, float) else f"{value} at {place}"


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bits of a tensor in row-major order: its own memory if contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor, dtype and shape being what a remote says; ProtocolError unless there can
    be such a tensor."""
    if dtype not in DTYPES:
        raise ProtocolError(f"tensor dtype {reprlib.repr(dtype)} is none of {', '.join(DTYPES)}")
    fits = len(shape) <= MAX_DIMENSIONS and all(type(size) is int and size >= 0 for size in shape)
    # without its zeros: an empty tensor has strides, too, which must not overflow 64 bits
    if not fits or math.prod(filter(None, shape)) > _MOST_ELEMENTS:
        raise ProtocolError(
            f"tensor shape {reprlib.repr(shape)}: expected at most {MAX_DIMENSIONS} sizes of 0 or "
            f"more, whose product without zeros is at most 2**{_MOST_ELEMENTS.bit_length() - 1}"
        )
    return math.prod(shape) * DTYPES[dtype].itemsize


def tensor_from_bytes(data: bytes | memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
    """A tensor in memory of its own; ProtocolError when bytes, dtype and shape do not fit.

    A copy, not a view of `data`: kernels may round differently on unaligned memory.
    """
    expected = tensor_size(dtype, shape)
    if len(data) != expected:
        raise ProtocolError(f"tensor {dtype}{list(shape)} needs {expected} bytes, got {len(data)}")
    tensor = torch.empty(tuple(shape), dtype=DTYPES[dtype])
    raw_bytes(tensor)[:] = data
    return tensor


def check_vector(what: str, found: Tensor, dtype: torch.dtype, elements: int) -> None:
    """ProtocolError unless a tensor that has arrived is [elements] of a dtype, and finite."""
    if found.dtype != dtype or list(found.shape) != [elements]:
        expected = str(dtype).removeprefix("torch.")
        raise ProtocolError(
            f"{what}: expected {expected}[{elements}], got {dtype_name(found)}{list(found.shape)}"
        )
    if not torch.isfinite(found).all():
        bad = int((~torch.isfinite(found)).sum())
        raise OutOfRangeError(f"{what}: {bad} of {found.numel()} values are not finite")
