"""A client gradient, as the optimizer takes it: a sum of scalar times term, chunk by chunk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hosl_flower.tensors.rounding import rounding_seed
from hosl_flower.tensors.rows import as_matrix_shape
from hosl_flower.zo.directions import Layout


class Term(Protocol):
    """Something of the shape of the parameters that can be had a few rows at a time."""

    def subtract_(self, block: Tensor, name: str, start: int, coefficient: float) -> None:
        """block -= coefficient * self[start : start + len(block)] of the parameter `name` seen as
        a matrix; block float32 [rows, columns]."""


class Gradient(Protocol):
    """rounding_seed: of the random rounding of 16-bit parameters (tensors/rounding.py)."""

    @property
    def rounding_seed(self) -> int: ...

    def terms(self, device: torch.device) -> Sequence[tuple[float, Term]]:
        """What the gradient is the sum of."""


@dataclass(frozen=True)
class Seeded:
    """A zeroth-order estimate: sum_q scalars[q] * s(seeds[q]), regenerated wherever it is used."""

    layout: Layout
    seeds: Sequence[int]
    scalars: Sequence[float]

    @property
    def rounding_seed(self) -> int:
        return rounding_seed(self.seeds)

    def terms(self, device: torch.device) -> Sequence[tuple[float, Term]]:
        drawn = (self.layout.draw(seed, device) for seed in self.seeds)
        return list(zip(self.scalars, drawn, strict=True))


@dataclass(frozen=True)
class Dense:
    """A gradient that was computed, by parameter name, float32, dense or as sparse rows; no seeds
    and scalars say it.

    rounding_seed: derive it of what is never the same twice, such as the step.
    """

    tensors: Mapping[str, Tensor]
    rounding_seed: int = 0

    def terms(self, device: torch.device) -> Sequence[tuple[float, Term]]:
        return [(1.0, self)]

    def subtract_(self, block: Tensor, name: str, start: int, coefficient: float) -> None:
        """See Term; a parameter that is not named has no gradient."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return
        if tensor.is_sparse:
            rows, values = tensor.indices()[0], tensor.values()
            low, high = torch.searchsorted(rows, rows.new_tensor([start, start + len(block)]))
            own = slice(int(low), int(high))
            scaled = values[own].to(block.device) * coefficient
            block[(rows[own] - start).to(block.device)] -= scaled
            return
        matrix = tensor.reshape(as_matrix_shape(tensor.shape))[start : start + len(block)]
        block.sub_(matrix.to(block.device) * coefficient)


def sparse_rows(rows: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """A gradient [n, columns] that is zero but for some rows, ascending: values [r, columns]."""
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, tuple(shape), is_coalesced=True, check_invariants=False
    )
