"""Running a submodel at theta + c * s without touching theta.

`perturbed(...)` is a context in which every use of a trainable parameter sees its perturbed
value. The parameter itself is never written, so nothing has to be restored and nothing
drifts, in any dtype:

- a linear map with a rank-1 direction: W x + c a (b^T x), one dot product and one scaled
  add per token, no matrix;
- an embedding lookup: only the rows of the batch are perturbed;
- anything else (norm weights, biases, full directions): w + c * s is materialised for the one
  operation that uses it, then dropped.

It works on torch functions, not on module types, so that no use of a parameter can escape it
and a new model family needs nothing here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosl_flower.perturb import Direction

# Reading these from a parameter reveals no value, so they need no perturbed copy.
METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


class _PerturbedFunctions(TorchFunctionMode):
    """Replaces each use of a listed parameter by its value at theta + c * s."""

    def __init__(self, names: Mapping[int, str], direction: Direction, coefficient: float):
        super().__init__()
        self.names = names  # id(parameter) -> canonical name
        self.direction = direction
        self.coefficient = coefficient

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and self._name(args[1]):
            return self._linear(*args, **kwargs)
        if func is F.embedding and len(args) >= 2 and self._name(args[1]):
            return self._embedding(*args, **kwargs)
        if func in METADATA:
            return func(*args, **kwargs)
        args = tuple(self._value(arg) for arg in args)
        kwargs = {key: self._value(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _name(self, value: Any) -> str | None:
        return self.names.get(id(value)) if isinstance(value, nn.Parameter) else None

    def _value(self, value: Any) -> Any:
        """The perturbed value of a listed parameter; anything else unchanged."""
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            items = [self._value(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        name = self._name(value)
        if name is None:
            return value
        return self.direction.shifted(name, value, self.coefficient)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name = self._name(weight)
        assert name is not None
        if not self.direction.is_rank1(name):
            return F.linear(x, self._value(weight), self._value(bias))
        a, b = self.direction.factors(name)
        y = F.linear(x, weight, self._value(bias))
        projection = (x @ b.to(x.dtype)).unsqueeze(-1)  # b^T x, [..., 1]
        return y.addcmul_(projection, a.to(y.dtype), value=self.coefficient)

    def _embedding(self, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._name(weight)
        assert name is not None
        rows = F.embedding(ids, weight, *args, **kwargs)
        shift = self.direction.gather(name, ids).mul_(self.coefficient)
        return shift.add_(rows).to(rows.dtype)


@contextmanager
def perturbed(
    parameters: Mapping[str, nn.Parameter], direction: Direction, coefficient: float
) -> Iterator[None]:
    """Within this context the named parameters act as theta + coefficient * s.

    Forward passes only: gradients are switched off inside, since a probe needs none.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    with torch.no_grad(), _PerturbedFunctions(names, direction, coefficient):
        yield
