"""How what a client has computed of its trainable parameters is written for the wire.

A gradient or a change of weights travels row by row, where a row is one of a matrix [out, in] or
a whole vector. Rows that are zero do not travel: of a token embedding's gradient only those of
the batch's tokens are not.

    exact   float32
    int8    -127..127 of the row's largest magnitude, and 4 bytes per row for the scale

int8 is rounded at random (rounding.py), so that an update is right on average,

    E[decode(encode(g))] = g

and no client has to keep what was lost for the next time, as error feedback would have it (Seide
et al. 2014; Karimireddy et al. 2019), at four bytes per parameter: more than all else
that residual feedback keeps.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hosl_flower.rounding import quantize

_DTYPES = {"exact": torch.float32, "int8": torch.int8}


@dataclass(frozen=True)
class Coded:
    """present bool [R]: which rows of all parameters, in name order, are not zero; values: those
    rows one after the other, float32 or int8 [m]; scales float32 [present rows], or [0]."""

    present: Tensor
    values: Tensor
    scales: Tensor


class Rows:
    """The rows of a client's trainable parameters. shapes: name -> shape, in name order."""

    def __init__(self, shapes: Mapping[str, torch.Size]):
        self.shapes = {name: _as_rows(shape) for name, shape in shapes.items()}
        self.count = sum(rows for rows, _ in self.shapes.values())

    def widths(self) -> Tensor:
        """Of each row: int64 [R]."""
        shapes = self.shapes.values()
        counts = torch.tensor([rows for rows, _ in shapes], dtype=torch.int64)
        columns = torch.tensor([width for _, width in shapes], dtype=torch.int64)
        return columns.repeat_interleave(counts)

    def spans(self) -> Iterator[tuple[str, slice, int]]:
        """(name, its rows among all, their width) of every parameter."""
        start = 0
        for name, (rows, width) in self.shapes.items():
            yield name, slice(start, start + rows), width
            start += rows


def _as_rows(shape: torch.Size) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[0], math.prod(shape[1:])


def encode(rows: Rows, parts: Iterable[tuple[str, Tensor]], codec: str, seed: int) -> Coded:
    """parts: (name, float32 of its shape, dense or as sparse rows), in any order, taken one at a
    time; a name that does not come is zero. seed: of the rounding, of this update alone."""
    spans = {name: (span, width) for name, span, width in rows.spans()}
    present = torch.zeros(rows.count, dtype=torch.bool)
    values: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, part in parts:
        span, width = spans[name]
        where, own = _rows_of(part, width)
        present[span][where] = True
        if codec == "int8":
            codes, scale = quantize(own, seed, span.start, torch.int8)
            values[name], scales[name] = codes.flatten().cpu(), scale.cpu()
        else:
            values[name] = own.flatten().cpu()
    order = [name for name in rows.shapes if name in values]
    return Coded(
        present,
        torch.cat([torch.empty(0, dtype=_DTYPES[codec]), *(values[name] for name in order)]),
        torch.cat([torch.empty(0), *(scales[name] for name in order if name in scales)]),
    )


def _rows_of(part: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(ascending int64 [r] on the CPU, float32 [r, width]): the rows that are not zero."""
    if part.is_sparse:
        where, own = part.indices()[0], part.values().reshape(-1, width)
    else:
        own = part.reshape(-1, width)
        where = torch.arange(len(own), device=own.device)
    kept = (own != 0).any(1)
    if not kept.all():
        where, own = where[kept], own[kept]
    return where.cpu(), own.float()


def decode(rows: Rows, coded: Coded) -> Tensor:
    """float32 [n]: all parameters one after the other, in name order. coded: of these rows."""
    whole = torch.zeros(sum(count * width for count, width in rows.shapes.values()))
    start = value = scale = 0
    for _, span, width in rows.spans():
        count = span.stop - span.start
        where = coded.present[span].nonzero().flatten()
        own = coded.values[value : value + len(where) * width].view(-1, width).float()
        if coded.scales.numel():
            own = own * coded.scales[scale : scale + len(where)].unsqueeze(1)
        whole[start : start + count * width].view(count, width)[where] = own
        start, value, scale = start + count * width, value + own.numel(), scale + len(where)
    return whole


def expected(rows: Rows, present: Tensor, codec: str) -> tuple[int, torch.dtype, int]:
    """(values, their dtype, scales) that must come with these rows present."""
    there = int(present.sum())
    return (
        int(rows.widths()[present].sum()),
        _DTYPES[codec],
        there if codec == "int8" else 0,
    )
