"""Perturbations: (seed, parameter name, element index) -> the same number everywhere.

torch's generators give different numbers on CPU and CUDA, so a federation that replays
seeds with them drifts apart on mixed hardware. Here every number comes from the published
counter-based generator Philox4x32-10 (Salmon et al., SC 2011), evaluated with integer
operations, so a seed means the same bits on every device, in any language, and however a
tensor is cut into chunks. docs/perturbations.md is the specification, with test vectors.

Three distributions of the direction s, all with E[s] = 0 and E[s s^T] = I:

rank1     (default) s = a b^T with a in {+-1}^out, b in {+-1}^in for a weight matrix, plain
          signs for a vector. out + in bits instead of out * in, and a probe is one dot
          product and one scaled add per token (probe.py).
signs     every element its own sign (Rademacher).
gaussian  every element a standard normal, quantised to 2^-12 so that it too is exact.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

DISTRIBUTIONS = ("rank1", "signs", "gaussian")

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32 round multipliers
_WEYL = (0x9E3779B9, 0xBB67AE85)  # Philox4x32 key increments
_ROUNDS = 10
_BITS_PER_BLOCK = 128  # one Philox block: four 32-bit words
_NORMALS_PER_BLOCK = 8  # 16 bits each
_CHUNK_ELEMENTS = 1 << 18  # drawn and applied at a time: small enough to stay in cache


def derive_seed(seed: int, *labels: object) -> int:
    """A 63-bit seed for one purpose, from the run seed and what names the purpose.

    The first eight bytes (little endian) of SHA-256 over "seed/label/label/...", shifted right by
    one so that it fits the signed integers of every format it travels in.
    """
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _split_words(value: int) -> tuple[int, int]:
    return value & _MASK32, (value >> 32) & _MASK32


@cache
def _label_words(label: str) -> tuple[int, int]:
    """The two counter words that separate one stream from another."""
    return _split_words(int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little"))


def philox(counters: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of every row: counters [n, 4] int64 in [0, 2^32) -> words [n, 4], likewise.

    int64 holds the low 64 bits of a 32 x 32 bit product on every device, which is all
    that is needed: the sign bit is only another bit.
    """
    x0, x1, x2, x3 = counters.unbind(1)
    key0, key1 = _split_words(seed)
    for _ in range(_ROUNDS):
        product0 = x0 * _MULTIPLIERS[0]
        product1 = x2 * _MULTIPLIERS[1]
        x0 = ((product1 >> 32) & _MASK32) ^ x1 ^ key0
        x2 = ((product0 >> 32) & _MASK32) ^ x3 ^ key1
        x1 = product1 & _MASK32
        x3 = product0 & _MASK32
        key0 = (key0 + _WEYL[0]) & _MASK32
        key1 = (key1 + _WEYL[1]) & _MASK32
    return torch.stack((x0, x1, x2, x3), dim=1)


def _counters(label: str, blocks: Tensor) -> Tensor:
    """Counters of the given block numbers [n] of one stream -> [n, 4]."""
    low, high = _label_words(label)
    words = blocks.new_empty((blocks.numel(), 4))
    words[:, 0] = blocks & _MASK32
    words[:, 1] = (blocks >> 32) & _MASK32
    words[:, 2] = low
    words[:, 3] = high
    return words


def _to_signs(words: Tensor) -> Tensor:
    """Words [n, 4] -> signs [n * 128] float32; bit 0 of word 0 first, bit 0 means +1."""
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    # int32 carries the same 32 bits in half the memory of int64; only bits are read from it.
    bits = (words.to(torch.int32).unsqueeze(-1) >> shifts) & 1
    return bits.reshape(-1).to(torch.float32).mul_(-2).add_(1)


@cache
def _normal_table(device: torch.device) -> Tensor:
    """|z| for 15 bits: the half-normal quantile at each midpoint, rounded to 2^-12.

    The rounding, far coarser than float64 error, makes the table the same everywhere.
    """
    quantile = NormalDist().inv_cdf
    values = [round(quantile(0.5 + (m + 0.5) / 65536) * 4096) / 4096 for m in range(32768)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _to_normals(words: Tensor) -> Tensor:
    """Words [n, 4] -> normals [n * 8] float32; low half of word 0 first, bit 15 is the sign."""
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)
    magnitude = _normal_table(words.device)[halves & 0x7FFF]
    return torch.where(halves < 0x8000, magnitude, -magnitude)


@dataclass(frozen=True)
class Stream:
    """An endless sequence of numbers, addressable by element: (seed, label, index) -> number."""

    to_numbers: Callable[[Tensor], Tensor]
    per_block: int  # numbers in one Philox block

    def span(
        self, seed: int, label: str, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Elements start..stop: float32 [stop - start]."""
        first = start // self.per_block
        blocks = torch.arange(first, -(-stop // self.per_block), device=device)
        numbers = self.to_numbers(philox(_counters(label, blocks), seed))
        return numbers[start - first * self.per_block :][: stop - start]

    def rows(self, seed: int, label: str, ids: Tensor, columns: int) -> Tensor:
        """Rows of the sequence laid out as a matrix: ids [n] -> float32 [n, columns]."""
        first = ids * columns // self.per_block
        reach = torch.arange(columns // self.per_block + 2, device=ids.device)
        blocks = (first.unsqueeze(1) + reach).reshape(-1)
        numbers = self.to_numbers(philox(_counters(label, blocks), seed)).view(ids.numel(), -1)
        offsets = (ids * columns - first * self.per_block).unsqueeze(1)
        return numbers.gather(1, offsets + torch.arange(columns, device=ids.device))


SIGNS = Stream(_to_signs, _BITS_PER_BLOCK)
NORMALS = Stream(_to_normals, _NORMALS_PER_BLOCK)


def as_matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """How a parameter is seen: [out, in] for two or more dimensions, [n, 1] for a vector."""
    if len(shape) < 2:
        return shape.numel(), 1
    return shape[0], math.prod(shape[1:])


def row_chunks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, view of the rows) in pieces of about _CHUNK_ELEMENTS elements."""
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield start, matrix[start : start + step]


class Direction:
    """One drawn direction s over all parameters of a layout.

    Holds the sign vectors of a rank-1 direction; full directions are drawn where they are used.
    """

    def __init__(self, layout: "Layout", seed: int, device: torch.device):
        self.layout, self.seed, self.device = layout, seed, device
        self._streams: dict[str, Tensor] | None = None
        if layout.distribution == "rank1":
            self._streams = layout._draw_streams(seed, device)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(a [out], b [in]) of a rank-1 direction; float32 signs."""
        assert self._streams is not None
        return self._streams[f"{name}#out"], self._streams[f"{name}#in"]

    def is_rank1(self, name: str) -> bool:
        return self._streams is not None and len(self.layout.shapes[name]) >= 2

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of s seen as a matrix: float32 [stop - start, columns]."""
        columns = as_matrix_shape(self.layout.shapes[name])[1]
        if self._streams is not None:
            if self.is_rank1(name):
                a, b = self.factors(name)
                return torch.outer(a[start:stop], b)
            return self._streams[name][start:stop].unsqueeze(1)
        stream = self.layout.stream
        flat = stream.span(self.seed, name, start * columns, stop * columns, self.device)
        return flat.view(-1, columns)

    def gather(self, name: str, ids: Tensor) -> Tensor:
        """The given rows of s, for an embedding lookup: ids [...] -> float32 [..., columns].

        Only the rows that occur are ever drawn.
        """
        if self.is_rank1(name):
            a, b = self.factors(name)
            return a[ids].unsqueeze(-1) * b
        unique, inverse = torch.unique(ids, return_inverse=True)
        columns = as_matrix_shape(self.layout.shapes[name])[1]
        return self.layout.stream.rows(self.seed, name, unique, columns)[inverse]

    def dense(self, name: str) -> Tensor:
        """All of s for one parameter, float32, in the parameter's shape. For tests and tools."""
        shape = self.layout.shapes[name]
        return self.rows(name, 0, as_matrix_shape(shape)[0]).view(shape)

    def shifted(self, name: str, value: Tensor, coefficient: float) -> Tensor:
        """value + coefficient * s as a new tensor of the same dtype, made in chunks of rows."""
        out = value.detach().to(torch.float32, copy=True)
        matrix = out.view(as_matrix_shape(value.shape))
        for start, block in row_chunks(matrix):
            self.subtract_(block, name, start, -coefficient)
        return out.to(value.dtype)

    def subtract_(self, block: Tensor, name: str, start: int, coefficient: float) -> None:
        """block -= coefficient * s[start : start + len(block)], block float32 [rows, columns].

        One IEEE operation per element for signs (coefficient * +-1 is exact), a product and a
        difference for normals: the same bits on every device.
        """
        stop = start + block.shape[0]
        if self.is_rank1(name):
            a, b = self.factors(name)
            block.addr_(a[start:stop], b, alpha=-coefficient)
        else:
            # not in place: the signs of a vector are kept for the next pass
            block.sub_(self.rows(name, start, stop).mul(coefficient))


class Layout:
    """The named parameters a direction spans, and the distribution it is drawn from.

    shapes: canonical parameter name (as in the unsplit model's state dict) -> shape. Names,
    not positions, select the random stream: the same parameter gets the same perturbation
    whatever the cut layer or the order of iteration.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], distribution: str = "rank1"):
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
        self.shapes = dict(shapes)
        self.distribution = distribution
        self.stream = NORMALS if distribution == "gaussian" else SIGNS
        self._plan: dict[torch.device, tuple[Tensor, list[tuple[str, int, int]]]] = {}

    def draw(self, seed: int, device: torch.device | str = "cpu") -> Direction:
        """The direction of this seed."""
        return Direction(self, seed, torch.device(device))

    def _streams(self) -> list[tuple[str, int]]:
        streams = []
        for name, shape in self.shapes.items():
            if len(shape) >= 2:
                out, inner = as_matrix_shape(shape)
                streams += [(f"{name}#out", out), (f"{name}#in", inner)]
            else:
                streams.append((name, shape.numel()))
        return streams

    def _draw_streams(self, seed: int, device: torch.device) -> dict[str, Tensor]:
        """All sign vectors of a rank-1 direction from one Philox call (hundreds of small ones
        would cost more than the forward they perturb)."""
        if device not in self._plan:
            counters, spans, offset = [], [], 0
            for label, count in self._streams():
                blocks = torch.arange(-(-count // _BITS_PER_BLOCK), device=device)
                counters.append(_counters(label, blocks))
                spans.append((label, offset, offset + count))
                offset += blocks.numel() * _BITS_PER_BLOCK
            stacked = torch.cat(counters) if counters else torch.empty((0, 4), dtype=torch.int64)
            self._plan[device] = (stacked, spans)
        words, spans = self._plan[device]
        flat = _to_signs(philox(words, seed))
        return {label: flat[start:stop] for label, start, stop in spans}


def permutation(count: int, seed: int) -> list[int]:
    """0..count-1 shuffled, the same everywhere: sorted by 64-bit keys from the generator."""
    words = philox(_counters("permutation", torch.arange(-(-count // 2))), seed).view(-1, 2)[:count]
    keys = (words[:, 0] << 31) ^ words[:, 1]  # 63 bits, so never negative
    return torch.argsort(keys, stable=True).tolist()
