"""Endless sequences of numbers, addressable by (seed, label, index), the same everywhere.

Philox4x32-10 (Salmon et al., SC 2011), evaluated with integer operations, and what is made of
its bits: signs and quantised normals. docs/reference/perturbations.md is the specification.

A sequence is drawn in two sizes. Philox runs on many blocks at a time, since each of its 80
operations costs a call; the numbers, 32 times as many bytes for signs, are then made of its
words in pieces that stay in a cache. Signs come from a table by bytes: one lookup gives eight
of them, already scaled, so that drawing and scaling is one pass over the numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from hosl_flower.tensors.philox_rounds import MASK32, label_words, rounds

_DRAWN_BLOCKS = 1 << 14  # Philox blocks drawn at a time: half a megabyte of words
_PIECE_ELEMENTS = 1 << 18  # numbers made at a time: one megabyte


def philox(counters: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of every row: counters [n, 4] int64 in [0, 2^32) -> words [n, 4], likewise."""
    columns = counters.t().contiguous().unbind(0)
    return torch.stack(rounds(columns, seed), dim=1).bitwise_and_(MASK32)


def counters_of(label: str, blocks: Tensor) -> Tensor:
    """Counters of the given block numbers [n] of one stream -> [n, 4]."""
    low, high = label_words(label)
    words = blocks.new_empty((blocks.numel(), 4))
    words[:, 0] = blocks & MASK32
    words[:, 1] = (blocks >> 32) & MASK32
    words[:, 2] = low
    words[:, 3] = high
    return words


@cache
def _sign_table(device: torch.device) -> Tensor:
    """The eight signs of each byte, bit 0 first, 0 means +1: float32 [256, 8]."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (1 - 2 * (bits & 1)).to(torch.float32)


def _to_signs(words: Tensor, scale: float) -> Tensor:
    """Words [n, 4] -> scale * signs [n * 128] float32; bit 0 of word 0 first."""
    shifts = torch.arange(0, 32, 8, device=words.device, dtype=torch.int32)
    # int32 carries the same 32 bits in half the memory of int64; only bits are read from it.
    octets = (words.to(torch.int32).unsqueeze(-1) >> shifts).bitwise_and_(0xFF).reshape(-1)
    return (_sign_table(words.device) * scale).index_select(0, octets).view(-1)


@cache
def _normal_table(device: torch.device) -> Tensor:
    """z for 16 bits: the half-normal quantile at each midpoint, rounded to 2^-12; bit 15 is the
    sign.

    The rounding, far coarser than float64 error, makes the table the same everywhere.
    """
    quantile = NormalDist().inv_cdf
    values = [round(quantile(0.5 + (m + 0.5) / 65536) * 4096) / 4096 for m in range(32768)]
    magnitude = torch.tensor(values, dtype=torch.float32, device=device)
    return torch.cat((magnitude, -magnitude))


def _halves(words: Tensor) -> Tensor:
    """Words [n, 4] -> 16-bit integers [n * 8], low half of word 0 first."""
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)


def _to_normals(words: Tensor, scale: float) -> Tensor:
    """Words [n, 4] -> scale * normals [n * 8] float32."""
    return _normal_table(words.device).index_select(0, _halves(words)).mul_(scale)


def _to_halves(words: Tensor, scale: float) -> Tensor:
    """Words [n, 4] -> scale * uniform integers of [0, 2^16), [n * 8] float32."""
    return _halves(words).to(torch.float32).mul_(scale)


@dataclass(frozen=True)
class Stream:
    """An endless sequence of numbers, addressable by element: (seed, label, index) -> number."""

    to_numbers: Callable[[Tensor, float], Tensor]
    per_block: int  # numbers in one Philox block

    def pieces(
        self,
        seed: int,
        label: str,
        start: int,
        stop: int,
        device: torch.device | str = "cpu",
        scale: float = 1.0,
    ) -> Iterator[tuple[int, Tensor]]:
        """scale * elements start..stop, in order: (index of the first one less start, float32
        [n]) with n of at most a piece. Never more than a piece exists."""
        end = -(-stop // self.per_block)
        step = max(1, _PIECE_ELEMENTS // self.per_block)
        for first in range(start // self.per_block, end, _DRAWN_BLOCKS):
            blocks = torch.arange(first, min(first + _DRAWN_BLOCKS, end), device=device)
            words = philox(counters_of(label, blocks), seed)
            for at in range(0, words.shape[0], step):
                begin = (first + at) * self.per_block - start  # of this piece; may lie before 0
                numbers = self.to_numbers(words[at : at + step], scale)
                yield max(0, begin), numbers[max(0, -begin) : stop - start - begin]

    def span(
        self, seed: int, label: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Elements start..stop: float32 [stop - start]."""
        out = torch.empty(stop - start, device=device)
        for begin, numbers in self.pieces(seed, label, start, stop, device):
            out[begin : begin + numbers.numel()] = numbers
        return out

    def rows(self, seed: int, label: str, ids: Tensor, columns: int) -> Tensor:
        """Rows of the sequence laid out as a matrix: ids [n] -> float32 [n, columns]."""
        first = ids * columns // self.per_block
        reach = torch.arange(columns // self.per_block + 2, device=ids.device)
        blocks = (first.unsqueeze(1) + reach).reshape(-1)
        words = philox(counters_of(label, blocks), seed)
        numbers = self.to_numbers(words, 1.0).view(ids.numel(), -1)
        offsets = (ids * columns - first * self.per_block).unsqueeze(1)
        return numbers.gather(1, offsets + torch.arange(columns, device=ids.device))


SIGNS = Stream(_to_signs, 128)  # four 32-bit words, a bit each
NORMALS = Stream(_to_normals, 8)  # 16 bits each
HALVES = Stream(_to_halves, 8)
