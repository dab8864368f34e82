"""Running a submodel at theta + c * s without touching theta.

`perturbed(...)` is a context in which every use of a trainable parameter sees its perturbed
value. The parameter itself is never written, so nothing has to be restored and nothing
drifts, in any dtype:

- a linear map with a rank-1 direction: W x + c a (b^T x), one dot product and one scaled
  add per token, no matrix;
- a convolution with a rank-1 direction, of its weights [out, in, height, width] as a matrix
  [out, in * height * width]: W * x + c a (b * x), one convolution of a single channel;
- an embedding lookup: only the rows of the batch are perturbed;
- anything else (norm weights, biases, full directions): w + c * s is materialised for the one
  operation that uses it, then dropped.

It works on torch functions, not on module types, so that no use of a parameter can escape it
and a new model family needs nothing here.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosl_flower.zo.directions import Direction

# Reading these from a parameter reveals no value, so they need no other one.
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


class ParameterUses(TorchFunctionMode):
    """Has every use of a listed parameter go another way, by a direction.

    special: the torch functions of (x, weight, ...) that need no whole weight, and what to call
    with (self, name, x, weight, ...) instead. All others are given `replaced` parameters.
    """

    # of the class: bound methods would tie the direction's vectors into a cycle, and nothing would
    # free them when the pass is over
    special: ClassVar[Mapping[Callable[..., Any], Callable[..., Any]]] = {}

    def __init__(self, parameters: Mapping[str, nn.Parameter], direction: Direction):
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.direction = direction

    @abstractmethod
    def replaced(self, name: str, parameter: nn.Parameter) -> Tensor:
        """What a listed parameter is replaced by."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        if func in self.special and len(args) >= 2 and (name := self._name(args[1])):
            return self.special[func](self, name, *args, **kwargs)
        args = tuple(self.value(arg) for arg in args)
        kwargs = {key: self.value(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _name(self, value: Any) -> str | None:
        return self._names.get(id(value)) if isinstance(value, nn.Parameter) else None

    def value(self, value: Any) -> Any:
        """An argument with listed parameters replaced; anything else unchanged."""
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            items = [self.value(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        name = self._name(value)
        return value if name is None else self.replaced(name, value)


class _Perturbed(ParameterUses):
    """Each listed parameter acts as theta + c * s."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], direction: Direction, coefficient: float
    ):
        super().__init__(parameters, direction)
        self.coefficient = coefficient

    def replaced(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Its perturbed value."""
        return self.direction.shifted(name, parameter, self.coefficient)

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.direction.is_rank1(name):
            return F.linear(x, self.value(weight), self.value(bias))
        a, b = self.direction.factors(name)
        y = F.linear(x, weight, self.value(bias))
        projection = (x @ b.to(x.dtype)).unsqueeze(-1)  # b^T x, [..., 1]
        return y.addcmul_(projection, a.to(y.dtype), value=self.coefficient)

    def _conv2d(
        self,
        name: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        inputs = weight.shape[1]
        if not self.direction.is_rank1(name) or inputs != x.shape[-3]:  # or a grouped one
            return F.conv2d(x, self.value(weight), self.value(bias), *args, **kwargs)
        a, b = self.direction.factors(name)
        y = F.conv2d(x, weight, self.value(bias), *args, **kwargs)
        kernel = b.to(x.dtype).view(1, *weight.shape[1:])
        projection = F.conv2d(x, kernel, None, *args, **kwargs)  # [..., 1, height, width]
        return y.addcmul_(projection, a.to(y.dtype).view(-1, 1, 1), value=self.coefficient)

    def _embedding(
        self, name: str, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        rows = F.embedding(ids, weight, *args, **kwargs)
        shift = self.direction.gather(name, ids).mul_(self.coefficient)
        return shift.add_(rows).to(rows.dtype)

    special = {F.linear: _linear, F.embedding: _embedding, F.conv2d: _conv2d}  # noqa: RUF012


@contextmanager
def perturbed(
    parameters: Mapping[str, nn.Parameter], direction: Direction, coefficient: float
) -> Iterator[None]:
    """Within this context the named parameters act as theta + coefficient * s.

    Forward passes only: gradients are switched off inside, since a probe needs none.
    """
    with torch.no_grad(), _Perturbed(parameters, direction, coefficient):
        yield
