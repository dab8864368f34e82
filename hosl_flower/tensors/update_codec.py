"""How what a client has computed of its trainable parameters is written for the wire.

A gradient or a change of weights travels row by row, where a row is one of a matrix [out, in] or
a whole vector. RowLayout that are zero do not travel: of a token embedding's gradient only those of
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
from typing import Protocol

import torch
from torch import Tensor

from hosl_flower.errors import OutOfRangeError, ProtocolError
from hosl_flower.tensors.raw_bytes import LARGEST_SCALAR, check_vector, dtype_name, largest
from hosl_flower.tensors.rounding import quantize

_ROWS_AT_A_TIME = 4096  # widened while a vector is put together
_DTYPES = {"exact": torch.float32, "int8": torch.int8}


class Fields(Protocol):
    """What a message and `Coded` have in common."""

    @property
    def present(self) -> Tensor: ...

    @property
    def values(self) -> Tensor: ...

    @property
    def scales(self) -> Tensor: ...


@dataclass(frozen=True)
class Coded:
    """present bool [R]: which rows of all parameters, in name order, are not zero; values: those
    rows one after the other, float32 or int8 [m]; scales float32 [present rows], or [0]."""

    present: Tensor
    values: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.present.nbytes + self.values.nbytes + self.scales.nbytes


class RowLayout:
    """The rows of a client's trainable parameters. shapes: name -> shape, in name order."""

    def __init__(self, shapes: Mapping[str, torch.Size]):
        self.shapes = {name: _as_rows(shape) for name, shape in shapes.items()}
        self.count = sum(rows for rows, _ in self.shapes.values())
        self.elements = sum(rows * width for rows, width in self.shapes.values())

    def widths(self) -> Tensor:
        """Of each row: int64 [R]."""
        shapes = self.shapes.values()
        counts = torch.tensor([rows for rows, _ in shapes], dtype=torch.int64)
        columns = torch.tensor([width for _, width in shapes], dtype=torch.int64)
        return columns.repeat_interleave(counts)

    def parts(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A vector [n] of all parameters -> (name, its part as [rows, width])."""
        start = 0
        for name, (rows, width) in self.shapes.items():
            yield name, vector[start : start + rows * width].view(rows, width)
            start += rows * width

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


def encode_update(
    rows: RowLayout, parts: Iterable[tuple[str, Tensor]], codec: str, seed: int
) -> Coded:
    """parts: (name, float32 of its shape, dense or as sparse rows), in any order, taken one at a
    time; a name that does not come is zero. seed: of the rounding, of this update alone."""
    spans = {name: (span, width) for name, span, width in rows.spans()}
    present = torch.zeros(rows.count, dtype=torch.bool)
    whole = torch.empty(rows.elements, dtype=_DTYPES[codec])
    slots = dict(rows.parts(whole))
    used: dict[str, int] = {}  # numbers in each slot, from its beginning
    scales: dict[str, Tensor] = {}
    for name, part in parts:
        span, width = spans[name]
        where, own = _rows_of(part, width)
        present[span][where] = True
        if codec == "int8":
            own, scale = quantize(own, seed, span.start, torch.int8)
            scales[name] = scale.cpu()
        used[name] = own.numel()
        slots[name][: len(own)].copy_(own)
    order = [name for name in rows.shapes if name in used]
    end = 0
    for name in order:  # close the gaps; numpy, which may copy to where it reads from
        piece = slots[name].flatten()[: used[name]].numpy()
        whole.numpy()[end : end + used[name]] = piece
        end += used[name]
    own_scales = [scales[name] for name in order if name in scales]
    return Coded(present, whole[:end], torch.cat([torch.empty(0), *own_scales]))


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


def decode_update(rows: RowLayout, coded: Fields) -> Tensor:
    """float32 [n]: all parameters one after the other, in name order. coded: of these rows."""
    whole = torch.zeros(rows.elements)
    parts = dict(rows.parts(whole))
    for name, piece in pieces_of(rows, coded):
        for start in range(0, len(piece.where), _ROWS_AT_A_TIME):
            where, own = piece.rows(slice(start, start + _ROWS_AT_A_TIME))
            parts[name][where] = own
    return whole


@dataclass(frozen=True)
class RowPiece:
    """The rows of one parameter that are there. where: ascending int64 [r]; values [r, width] as
    they came; scales [r] or [0]."""

    where: Tensor
    values: Tensor
    scales: Tensor

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(which of its rows start..stop, those rows float32 [r, width])."""
        first, last = torch.searchsorted(self.where, torch.tensor([start, stop])).tolist()
        return self.rows(slice(first, last))

    def rows(self, own: slice) -> tuple[Tensor, Tensor]:
        """(which, those rows float32 [r, width]) of a part of those that are there."""
        values = self.values[own].float()
        if self.scales.numel():
            values.mul_(self.scales[own].unsqueeze(1))
        return self.where[own], values


def pieces_of(rows: RowLayout, coded: Fields) -> Iterator[tuple[str, RowPiece]]:
    """What came of each parameter; no copies."""
    value = scale = 0
    for name, span, width in rows.spans():
        where = coded.present[span].nonzero().flatten()
        values = coded.values[value : value + len(where) * width].view(-1, width)
        yield name, RowPiece(where, values, coded.scales[scale : scale + len(where)])
        value, scale = value + values.numel(), scale + len(where)


def check(
    widths: Tensor, coded: Fields, codec: str, what: str, most: float = LARGEST_SCALAR
) -> None:
    """ProtocolError unless what has arrived is of rows of these widths, in this codec, and of
    numbers of at most `most`."""
    present = coded.present
    if present.dtype != torch.bool or list(present.shape) != [len(widths)]:
        raise ProtocolError(
            f"{what}: expected bool[{len(widths)}] of the rows that are present, got "
            f"{dtype_name(present)}{list(present.shape)}"
        )
    check_vector(what, coded.values, _DTYPES[codec], int(widths[present].sum()))
    scales = int(present.sum()) if codec == "int8" else 0
    check_vector(f"scales of the {what}", coded.scales, torch.float32, scales)
    if not (coded.scales >= 0).all():
        raise OutOfRangeError(f"scales of the {what}: expected 0 or more")
    found = largest(coded.scales) * 127.0 if scales else largest(coded.values)
    if not found <= most:
        raise OutOfRangeError(f"{what}: expected values of at most +-{most:.3g}, got {found:.3g}")
