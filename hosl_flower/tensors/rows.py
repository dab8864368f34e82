"""A parameter as a matrix, in chunks of rows."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# of a parameter, updated at a time; in 16 bits some pieces are widened and rounded besides
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_16_BITS = 1 << 21, 1 << 18


def as_matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """How a parameter is seen: [out, in] for two or more dimensions, [n, 1] for a vector."""
    if len(shape) < 2:
        return shape.numel(), 1
    return shape[0], math.prod(shape[1:])


def row_chunks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, view of the rows) in pieces of some hundred thousand to two million elements."""
    elements = _CHUNK_ELEMENTS if matrix.itemsize > 2 else _CHUNK_ELEMENTS_16_BITS
    step = max(1, elements // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield start, matrix[start : start + step]


def matrix_of(parameter: Tensor) -> Tensor:
    """A parameter as [out, in]; the same memory."""
    return parameter.detach().view(as_matrix_shape(parameter.shape))


def unflat(vector: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A vector [n] of all parameters, in their order -> by name, in their shapes."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts = vector.split(sizes)
    return {
        name: part.view(parameter.shape)
        for (name, parameter), part in zip(parameters.items(), parts, strict=True)
    }
