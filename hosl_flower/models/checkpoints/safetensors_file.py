"""Copying one tensor of a safetensors file to where it is wanted, a few MiB at a time.

The file is read, not mapped: the pages of a map count in a process's resident set for as long as
it is open, which would make that twice the weights. The format is a length (8 bytes, little
endian), a JSON header {name: {dtype, shape, data_offsets}} and the data; safetensors itself checks
it first.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy
import torch
from safetensors import safe_open
from torch import Tensor

from hosl_flower.tensors.raw_bytes import raw_bytes

CHUNK_ELEMENTS = 1 << 20  # read and converted at a time
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80}  # their bits


class NotFiniteError(Exception):
    """A tensor holds NaN or infinity; the message says which, and where they come from."""


class Stored(NamedTuple):
    """Where a tensor is: dtype as the file names it, first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def is_floating_point(self) -> bool:
        return self.dtype in _FLOATS


def find(path: Path, key: str) -> Stored:
    """Raises SafetensorError for a damaged file or unknown key, OSError for an unreadable file."""
    with safe_open(path, framework="pt") as file:
        file.get_slice(key)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[key]
    return Stored(entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])


def copy_into(out: Tensor, path: Path, stored: Stored) -> None:
    """Fill `out`, contiguous, of the same shape, any dtype and device. Raises NotFiniteError for
    numbers that are not finite, in the file or in the dtype of `out`."""
    dtype = _FLOATS[stored.dtype]
    with path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        for part in out.view(-1).split(CHUNK_ELEMENTS):
            if part.device.type == "cpu" and part.dtype == dtype:
                _read(file, part)
                _check_finite(part, stored.dtype)
            else:
                buffer = torch.empty(part.shape, dtype=dtype)
                _read(file, buffer)
                _check_finite(buffer, stored.dtype)
                _check_fits(buffer, part.dtype)
                part.copy_(buffer)


def copy_rows(out: Tensor, path: Path, stored: Stored, rows: Sequence[int]) -> None:
    """Fill `out` [n, D], on the CPU, with some rows of a matrix, and read nothing else. Raises
    NotFiniteError as copy_into."""
    buffer = torch.empty(stored.shape[1], dtype=_FLOATS[stored.dtype])
    with path.open("rb", buffering=0) as file:
        for row, own in zip(rows, out, strict=True):
            file.seek(stored.start + row * buffer.nbytes)
            _read(file, buffer)
            _check_finite(buffer, stored.dtype)
            own.copy_(buffer)


def _check_finite(part: Tensor, dtype: str) -> None:
    """By numpy, which needs a bit of the time that reading takes. Of 16 bits: a number is not
    finite where all bits of its exponent are set."""
    if mask := _EXPONENTS.get(dtype):
        bits = numpy.frombuffer(raw_bytes(part), numpy.uint16)
        finite = not (bits & mask == mask).any()
    else:
        finite = bool(numpy.isfinite(part.numpy()).all())
    if not finite:
        raise NotFiniteError(f"NaN or infinity ({dtype})")


def _check_fits(part: Tensor, dtype: torch.dtype) -> None:
    """Whether numbers of more bits stay finite in a dtype."""
    if torch.finfo(dtype).max * 2 < torch.finfo(part.dtype).max:
        largest = part.abs().max()
        if not bool(largest.to(dtype).isfinite()):
            raise NotFiniteError(f"{float(largest):g}, which is beyond {dtype}")


def _read(file: BinaryIO, out: Tensor) -> None:
    view = raw_bytes(out)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise OSError("it ends too early")
        view = view[count:]
