"""The exact derivative of a submodel along a direction, by forward-mode differentiation.

Within `along(...)` every use of a trainable parameter theta carries the tangent s of a direction,
and what is computed carries its derivative along s (torch.autograd.forward_ad): one pass gives
f(theta) and d f(theta + t s) / dt at t = 0, with no probe distance t. No graph, nothing is kept
for a pass back; the price over a probe (perturbed.py) is a second stream of activations beside the
first, about twice the time and twice the memory of activations.

As for a probe there is no second set of weights:

- a linear map with a rank-1 direction: the tangent of W x is W dx + a (b^T x);
- an embedding lookup: only the rows of the batch;
- anything else (norm weights, biases, full directions): s is materialised for the one operation
  that uses it, then dropped.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hosl_flower.zo.directions import Direction
from hosl_flower.zo.perturbed import ParameterUses


class _Tangents(ParameterUses):
    """Each listed parameter carries its tangent."""

    def replaced(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Itself, with its tangent."""
        tangent = self.direction.dense(name).to(parameter.dtype)
        return forward_ad.make_dual(parameter.detach(), tangent)

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, self.value(bias))
        known = forward_ad.unpack_dual(x).primal
        if self.direction.is_rank1(name):
            a, b = self.direction.factors(name)
            own = (known @ b.to(known.dtype)).unsqueeze(-1) * a.to(y.dtype)
        else:
            own = F.linear(known, self.direction.dense(name).to(known.dtype))
        return _with_tangent(y, own)

    def _embedding(
        self, name: str, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        rows = F.embedding(ids, weight, *args, **kwargs)
        return _with_tangent(rows, self.direction.gather(name, ids).to(rows.dtype))

    special = {F.linear: _linear, F.embedding: _embedding}  # noqa: RUF012


def _with_tangent(y: Tensor, own: Tensor) -> Tensor:
    """y with `own` added to the tangent it has."""
    primal, tangent = forward_ad.unpack_dual(y)
    return forward_ad.make_dual(primal, own if tangent is None else own.add_(tangent))


@contextmanager
def along(parameters: Mapping[str, nn.Parameter], direction: Direction) -> Iterator[None]:
    """Within this context forward passes carry their derivative along the direction; `derivative`
    takes it out. No graph is built."""
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),  # the fused kernels know no tangents
        _Tangents(parameters, direction),
    ):
        yield


def derivative(value: Tensor) -> Tensor:
    """What a tensor computed within `along` carries; zeros when no parameter reached it."""
    with torch._C.DisableTorchFunction():
        primal, tangent = forward_ad.unpack_dual(value)
        return torch.zeros_like(primal) if tangent is None else tangent
