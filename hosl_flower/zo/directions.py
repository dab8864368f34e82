"""Perturbations: (seed, parameter name, element index) -> the same number everywhere.

torch's generators give different numbers on CPU and CUDA, so a federation that replays
seeds with them drifts apart on mixed hardware. Here every number comes from the published
counter-based generator Philox4x32-10 (Salmon et al., SC 2011), evaluated with integer
operations, so a seed means the same bits on every device, in any language, and however a
tensor is cut into chunks. docs/reference/perturbations.md is the specification, with test vectors.

Three distributions of the direction s, all with E[s] = 0 and E[s s^T] = I:

rank1     (default) s = a b^T with a in {+-1}^out, b in {+-1}^in for a weight matrix, plain
          signs for a vector. out + in bits instead of out * in, and a probe is one dot
          product and one scaled add per token (perturbed.py).
signs     every element its own sign (Rademacher).
gaussian  every element a standard normal, quantised to 2^-12 so that it too is exact.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hosl_flower.tensors.philox import NORMALS, SIGNS, counters_of, philox
from hosl_flower.tensors.rows import as_matrix_shape, row_chunks

DISTRIBUTIONS = ("rank1", "signs", "gaussian")


class Direction:
    """One drawn direction s over all parameters of a layout.

    Holds all its vectors, also those a rank-1 matrix is made of; other matrices are drawn where
    they are used.
    """

    def __init__(self, layout: "Layout", seed: int, device: torch.device):
        self.layout, self.seed, self.device = layout, seed, device
        self._vectors = layout._draw_vectors(seed, device)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(a [out], b [in]) of a rank-1 direction; float32 signs."""
        return self._vectors[f"{name}#out"], self._vectors[f"{name}#in"]

    def is_rank1(self, name: str) -> bool:
        return self.layout.distribution == "rank1" and len(self.layout.shapes[name]) >= 2

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of s seen as a matrix: float32 [stop - start, columns]."""
        if name in self._vectors:
            return self._vectors[name][start:stop].unsqueeze(1)
        if self.is_rank1(name):
            a, b = self.factors(name)
            return torch.outer(a[start:stop], b)
        columns = as_matrix_shape(self.layout.shapes[name])[1]
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
        """value + coefficient * s as a new tensor of the same dtype, made in pieces."""
        source = value.detach().view(as_matrix_shape(value.shape))
        out = torch.empty_like(source)
        for start, block in row_chunks(out):
            self._add(source[start : start + block.shape[0]], block, name, start, coefficient)
        return out.view(value.shape)

    def subtract_(self, block: Tensor, name: str, start: int, coefficient: float) -> None:
        """block -= coefficient * s[start : start + len(block)], block float32 [rows, columns].

        One IEEE operation per element for signs (coefficient * +-1 is exact), a product and a
        difference for normals: the same bits on every device.
        """
        self._add(block, block, name, start, -coefficient)

    def _add(self, source: Tensor, out: Tensor, name: str, start: int, coefficient: float) -> None:
        """out = source + coefficient * s[start : start + rows], both [rows, columns] and in one
        dtype, computed in float32; out may be source."""
        stop = start + out.shape[0]
        if self.is_rank1(name):
            a, b = self.factors(name)
            if out.dtype == torch.float32:
                torch.addr(source, a[start:stop], b, alpha=coefficient, out=out)
            else:
                out.copy_(source.float().addr_(a[start:stop], b, alpha=coefficient))
            return
        if name in self._vectors:
            pieces: Iterable[tuple[int, Tensor]] = [
                (0, self._vectors[name][start:stop] * coefficient)
            ]
        else:
            columns, stream = out.shape[1], self.layout.stream
            pieces = stream.pieces(
                self.seed, name, start * columns, stop * columns, self.device, coefficient
            )
        source, out = source.reshape(-1), out.view(-1)
        for begin, numbers in pieces:
            part = slice(begin, begin + numbers.numel())
            if out.dtype == torch.float32:
                torch.add(source[part], numbers, out=out[part])
            else:
                out[part] = numbers.add_(source[part])


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

    def _vectors(self) -> list[tuple[str, int]]:
        """(stream, length) of every vector a direction needs."""
        vectors = []
        for name, shape in self.shapes.items():
            if len(shape) < 2:
                vectors.append((name, shape.numel()))
            elif self.distribution == "rank1":
                out, inner = as_matrix_shape(shape)
                vectors += [(f"{name}#out", out), (f"{name}#in", inner)]
        return vectors

    def _draw_vectors(self, seed: int, device: torch.device) -> dict[str, Tensor]:
        """All vectors of a direction from one Philox call (hundreds of small ones would cost
        more than the forward they perturb)."""
        if device not in self._plan:
            counters, spans, offset = [torch.empty((0, 4), dtype=torch.int64, device=device)], [], 0
            for label, count in self._vectors():
                blocks = torch.arange(-(-count // self.stream.per_block), device=device)
                counters.append(counters_of(label, blocks))
                spans.append((label, offset, offset + count))
                offset += blocks.numel() * self.stream.per_block
            self._plan[device] = (torch.cat(counters), spans)
        words, spans = self._plan[device]
        flat = self.stream.to_numbers(philox(words, seed), 1.0)
        return {label: flat[start:stop] for label, start, stop in spans}
