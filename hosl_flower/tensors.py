"""Tensors to bytes and back, for every dtype (numpy has no bfloat16)."""

import math

import torch
from torch import Tensor

from hosl_flower.errors import ProtocolError

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
