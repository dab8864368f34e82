"""Storing an updated float32 value in a 16-bit parameter without losing the update.

One step of SGD is often far smaller than the spacing of 16-bit numbers. Rounded to the nearest
it is lost, in every step anew; rounded at random, up with the probability of its distance, it is
kept on average:

    E[stored] = value

The random numbers are the generator's, by (the step's first direction seed, parameter, element),
so a replay rounds as the training did, on every device. As with rank-1 directions an [out, in]
matrix is given out + in of them: element (i, j) takes r = (u_i + v_j) mod 2^16, which is uniform,
and independent of any one other element's. docs/reference/perturbations.md is the specification.

What is kept in 8 bits (optim/adafactor_momentum.py) is rounded in the same way; no replay needs its
bits.
"""

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from hosl_flower.errors import DivergedError
from hosl_flower.tensors.philox import HALVES

_SMALLEST_NORMAL = 2.0**-14  # of float16; below it numbers are 2^-24 apart
_TINY, _PERIOD = 1e-38, 4096  # r of 8 bits repeats after so many rows and columns
OTHER_ROWS = _PERIOD // 2  # where a second matrix of the same update starts


def rounding_seed(seeds: Sequence[int]) -> int:
    """Of an update along these directions: the first one's; 0 for none."""
    return seeds[0] if seeds else 0


def store(block: Tensor, value: Tensor, seed: int, name: str, start: int) -> None:
    """block = value, rounded at random: block [rows, columns] of a 16-bit dtype, rows start.. of
    the parameter `name`; value float32 [rows, columns]."""
    rows, columns = block.shape
    u = HALVES.span(seed, f"{name}#round-out", start, start + rows, block.device)
    v = HALVES.span(seed, f"{name}#round-in", 0, columns, block.device)
    r = (u.to(torch.int32).unsqueeze(1) + v.to(torch.int32)).bitwise_and_(0xFFFF)
    if block.dtype == torch.bfloat16:
        block.copy_(_drop_bits(value, r, 16))
        return
    normal = _drop_bits(value, r & 0x1FFF, 13)
    small = torch.floor(value * 2.0**24 + r * 2.0**-16) * 2.0**-24
    block.copy_(torch.where(value.abs() < _SMALLEST_NORMAL, small, normal))


def quantize(value: Tensor, seed: int, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(int8 or uint8 [rows, columns], its scale per row, float32 [rows]) of a float32 value, rows
    start.. of any parameter, rounded at random: codes times scale are the value on average. A
    row's largest is 127 or 255 times its scale. uint8 is for what is never below zero."""
    most = float(torch.iinfo(dtype).max)
    scales = value.abs().amax(1).div_(most)
    u, v = _dither(seed, value.device)
    rows = torch.arange(start, start + len(value), device=value.device) % _PERIOD
    columns = torch.arange(value.shape[1], device=value.device) % _PERIOD
    r = (u[rows].unsqueeze(1) + v[columns]).bitwise_and_(0xFFFF)
    steps = (value / scales.clamp(min=_TINY).unsqueeze(1)).add_(r, alpha=2.0**-16)
    return steps.floor_().clamp_(-most if dtype.is_signed else 0.0, most).to(dtype), scales


@functools.lru_cache(maxsize=1)
def _dither(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """u and v, int32 [_PERIOD], the same for all parameters of an update."""
    u, v = (HALVES.span(seed, f"int8-{kind}", 0, _PERIOD, device) for kind in ("out", "in"))
    return u.to(torch.int32), v.to(torch.int32)


def _drop_bits(value: Tensor, r: Tensor, bits: int) -> Tensor:
    """float32 with the last bits zero: away from zero if the bits dropped and r, uniform in
    [0, 2^bits), carry. Sums of integers; what follows, a change of dtype, is then exact."""
    kept = (value.view(torch.int32) + r).bitwise_right_shift_(bits).bitwise_left_shift_(bits)
    return kept.view(torch.float32)


def to_float32(value: float) -> float:
    """The nearest float32, as a Python float: what is stored, sent and replayed.

    Raises DivergedError for what float32 cannot hold.
    """
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        raise DivergedError(
            f"projected gradient {value:g} is beyond float32; lower client-learning-rate",
            public="a projected gradient is beyond float32; lower client-learning-rate",
        ) from None
