"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235): second moments of a matrix, factored.

    R <- b R + (1 - b) mean_j(g_ij^2),  C <- b C + (1 - b) mean_i(g_ij^2)
    u = g / sqrt(R C^T / mean(R)),  theta <- theta - eta u / max(1, rms(u))

b = b2 (1 - b2^(t-1)) / (1 - b2^t) with b2 = 0.999, which is Adam's second moment with its bias
corrected (the paper's section 7), and not the paper's 1 - t^-0.8, which forgets within t^0.8
steps: an embedding's rows are seen more seldom than that.

An [out, in] matrix has out + in numbers of state instead of AdamW's 2 out in; a vector has its
second moments whole. No first moments, no weight decay, no scaling by the parameter's size: eta
is that of Adam. A chunk of rows at a time, in three passes over the gradient: no buffer.

With an average of steps: adafactor_momentum.py.

Of a gradient that is sparse rows (an embedding's) only those are visited: the others' update is
zero, their R decays. That is the dense algorithm's result to rounding, at the cost of the rows.

The sums make results depend, in the last bits, on the device and its number of threads. So it is
for gradients a client computes itself, and not for replaying a ledger (optimizer.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from hosl_flower.optim.gradient import Dense
from hosl_flower.optim.optimizer import Optimizer, Terms
from hosl_flower.tensors.rounding import store
from hosl_flower.tensors.rows import as_matrix_shape, matrix_of, row_chunks

_BETA2, _TINY, _CLIP = 0.999, 1e-30, 1.0

RowIndex = slice | Tensor
Updates = Callable[
    [], Iterator[tuple[RowIndex, Tensor]]
]  # some rows' u at a time, as often as called


class Seen:
    """A parameter's gradient, some rows at a time, as often as wanted. rows: those that are not
    zero, ascending, or None for all."""

    def __init__(self, name: str, matrix: Tensor, terms: Terms):
        self.name, self.matrix, self.terms = name, matrix, terms
        self.rows: Tensor | None = None
        self._values: Tensor | None = None  # of a gradient that is one tensor
        if len(terms) == 1 and isinstance(term := terms[0][1], Dense):
            tensor = term.tensors.get(name)
            if tensor is not None and tensor.is_sparse:
                self.rows, self._values = tensor.indices()[0], tensor.values()
            elif tensor is not None:
                self._values = matrix_of(tensor).to(matrix.device)

    def chunks(self) -> Iterator[tuple[RowIndex, Tensor]]:
        """(which rows, their gradient as a new float32 [rows, in])."""
        for start, block in row_chunks(self.matrix if self._values is None else self._values):
            stop = start + len(block)
            if self._values is not None:
                which = slice(start, stop) if self.rows is None else self.rows[start:stop]
                yield which, block * self.terms[0][0]
                continue
            g = torch.zeros_like(block, dtype=torch.float32)
            for scalar, term in self.terms:
                term.subtract_(g, self.name, start, -scalar)
            yield slice(start, stop), g

    def updates(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[RowIndex, Tensor]]:
        """As chunks, g times rows [out] times columns [in]."""
        for which, g in self.chunks():
            yield which, g.mul_(rows[which].unsqueeze(1)).mul_(columns)


class Adafactor(Optimizer):
    """State per parameter: R [out] and C [in] of a matrix, v [n] of a vector, as one vector."""

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}  # R and C one after the other, float32

    @torch.no_grad()
    def move(
        self, name: str, parameter: Tensor, terms: Terms, learning_rate: float, seed: int
    ) -> None:
        matrix = matrix_of(parameter)
        seen = Seen(name, matrix, terms)
        updates = self.learn(seen, parameter.shape, seed)
        scale = self.scale(updates, parameter.shape)
        start = 0
        for which, u in self.changes(seen, updates, scale, seed):
            u.mul_(learning_rate)
            if matrix.dtype == torch.float32:
                matrix[which] -= u
            else:
                block = matrix[which]
                store(block, block.float().sub_(u), seed, name, start)
                matrix[which] = block
            start += len(u)

    def changes(
        self, seen: Seen, updates: Updates, scale: float, seed: int
    ) -> Iterator[tuple[RowIndex, Tensor]]:
        """Which rows of the parameter are to be changed, and by what in units of eta."""
        for which, u in updates():
            yield which, u.mul_(scale)

    def scale(self, updates: Updates, shape: torch.Size) -> float:
        """1 / max(1, rms(u)). The sum waits on the device, once per parameter."""
        squares = [u.square_().sum() for _, u in updates()]
        square = float(torch.stack(squares).sum()) if squares else 0.0
        return 1.0 / max(1.0, math.sqrt(square / shape.numel()) / _CLIP)

    def kept(self) -> float:
        """b, the part of the second moments that this update keeps."""
        return _BETA2 * (1.0 - _BETA2 ** (self.steps - 1)) / (1.0 - _BETA2**self.steps)

    def learn(self, seen: Seen, shape: torch.Size, seed: int) -> Updates:
        """Bring the second moments up to date; g over their square roots. seed: of what is rounded
        at random."""
        count, width = seen.matrix.shape
        if seen.name not in self.moments:
            self.moments[seen.name] = torch.zeros(state_size(shape), device=seen.matrix.device)
        moments = self.moments[seen.name]
        squares = torch.full_like(moments, _TINY)
        for which, g in seen.chunks():
            g.square_()
            squares[:count][which] += g.mean(1)
            if len(shape) > 1:
                squares[count:] += g.sum(0) / count
        kept = self.kept()
        moments.mul_(kept).add_(squares, alpha=1.0 - kept)
        rows, columns = moments[:count], moments[count:]
        if len(shape) < 2:
            return partial(seen.updates, rows.rsqrt(), rows.new_ones(width))
        # a row without a gradient beside a huge one: no 0 / 0
        rows = (rows / rows.mean()).clamp_(min=_TINY).rsqrt_()
        return partial(seen.updates, rows, columns.rsqrt())

    def tensors(self) -> list[Tensor]:
        return list(self.moments.values())

    def save(self, parameters: Mapping[str, Tensor]) -> Tensor:
        if not self.moments:
            return torch.empty((0, 0))
        own = [
            self.moments[name] if name in self.moments else torch.zeros(state_size(p.shape))
            for name, p in parameters.items()
        ]
        return torch.cat([moments.cpu() for moments in own]).unsqueeze(0)

    def load(self, moments: Tensor, steps: int, parameters: Mapping[str, Tensor]) -> None:
        self.steps = steps if moments.numel() else 0
        self.moments = {}
        start = 0
        for name, parameter in parameters.items() if moments.numel() else ():
            stop = start + state_size(parameter.shape)
            self.moments[name] = moments[0, start:stop].to(parameter.device, copy=True)
            start = stop


def state_size(shape: torch.Size) -> int:
    """Numbers of state of a parameter."""
    rows, columns = as_matrix_shape(shape)
    return rows if len(shape) < 2 else rows + columns
