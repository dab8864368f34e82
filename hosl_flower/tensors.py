"""Tensors to bytes and back, for every dtype (numpy has no bfloat16)."""

import math

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
LARGEST_SCALAR = 1e12  # its square, in Adam's second moment, is far from float32's end


def dtype_name(tensor: Tensor) -> str:
    """The name a dtype travels under: "float32", "bfloat16" ..."""
    return str(tensor.dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bits of a tensor in row-major order: its own memory if contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_bytes(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor in memory of its own; ProtocolError when bytes, dtype and shape do not fit.

    A copy, not a view of `data`: kernels may round differently on unaligned memory.
    """
    if dtype not in DTYPES:
        raise ProtocolError(f"tensor dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS or not all(0 <= size < 2**40 for size in shape):
        raise ProtocolError(f"tensor shape {shape} is not valid")
    expected = math.prod(shape) * DTYPES[dtype].itemsize  # Python integers do not overflow
    if len(data) != expected:
        raise ProtocolError(f"tensor {dtype}{list(shape)} needs {expected} bytes, got {len(data)}")
    tensor = torch.empty(shape, dtype=DTYPES[dtype])
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
