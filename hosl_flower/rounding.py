"""Storing an updated float32 value in a 16-bit parameter without losing the update.

One step of SGD is often far smaller than the spacing of 16-bit numbers. Rounded to the nearest
it is lost, in every step anew; rounded at random, up with the probability of its distance, it is
kept on average:

    E[stored] = value

The random numbers are the generator's, by (the step's first direction seed, parameter, element),
so a replay rounds as the training did, on every device. As with rank-1 directions an [out, in]
matrix is given out + in of them: element (i, j) takes r = (u_i + v_j) mod 2^16, which is uniform,
and independent of any one other element's. docs/perturbations.md is the specification.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hosl_flower.streams import HALVES

_SMALLEST_NORMAL = 2.0**-14  # of float16; below it numbers are 2^-24 apart
_TINY = 1e-38


def rounding_seed(seeds: Sequence[int]) -> int:
    """Of an update along these directions: the first one's; 0 for none."""
    return seeds[0] if seeds else 0


def store(block: Tensor, value: Tensor, seed: int, name: str, start: int) -> None:
    """block = value, rounded at random: block [rows, columns] of a 16-bit dtype, rows start.. of
    the parameter `name`; value float32 [rows, columns]."""
    r = _uniform(value, seed, f"{name}#round", start)
    if block.dtype == torch.bfloat16:
        block.copy_(_drop_bits(value, r, 16))
        return
    normal = _drop_bits(value, r & 0x1FFF, 13)
    small = torch.floor(value * 2.0**24 + r * 2.0**-16) * 2.0**-24
    block.copy_(torch.where(value.abs() < _SMALLEST_NORMAL, small, normal))


def quantize(value: Tensor, seed: int, name: str, start: int) -> tuple[Tensor, Tensor]:
    """(int8 [rows, columns], its scale per row, float32 [rows]) of a float32 value, as store.
    Codes times scale are the value on average; a row's largest is 127 times its scale."""
    scales = value.abs().amax(1).div_(127.0)
    r = _uniform(value, seed, f"{name}#int8", start)
    steps = value / scales.clamp(min=_TINY).unsqueeze(1) + r * 2.0**-16
    return steps.floor_().clamp_(-127.0, 127.0).to(torch.int8), scales


def _uniform(value: Tensor, seed: int, stream: str, start: int) -> Tensor:
    """int32 [rows, columns] in [0, 2^16), for rows start.. of a parameter."""
    rows, columns = value.shape
    u = HALVES.span(seed, f"{stream}-out", start, start + rows, value.device)
    v = HALVES.span(seed, f"{stream}-in", 0, columns, value.device)
    return (u.to(torch.int32).unsqueeze(1) + v.to(torch.int32)).bitwise_and_(0xFFFF)


def _drop_bits(value: Tensor, r: Tensor, bits: int) -> Tensor:
    """float32 with the last bits zero: away from zero if the bits dropped and r, uniform in
    [0, 2^bits), carry. Sums of integers; what follows, a change of dtype, is then exact."""
    kept = (value.view(torch.int32) + r).bitwise_right_shift_(bits).bitwise_left_shift_(bits)
    return kept.view(torch.float32)
