"""The rule of a linear map, its adapters included, by hand.

    y = (W + s B A) x + b with g at y:  W: g x^T,  b: g,  B: s g (A x)^T,  A: s (B^T g) x^T
    at x: W^T g + s A^T (B^T g)                                             s = alpha / r

Tokens are rows, so that x is [n, in] and g [n, out]. W + s B A is never formed.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hosl_flower.models.int8_weights import dequantised


class Sums:
    """Gradients of the parameters that are wanted, by name, float32, as pieces add to them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = parameters
        self._sums: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor | None:
        """The sum so far; None where it is not wanted."""
        if name not in self.parameters:
            return None
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(self.parameters[name], dtype=torch.float32)
        return self._sums[name]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The sums, each let go as it is handed out."""
        for name in list(self._sums):
            yield name, self._sums.pop(name)


class LinearMap:
    """One of a block's modules. name: canonical; transposed: W is stored [in, out]."""

    def __init__(self, module: Any, name: str, transposed: bool, sums: Sums):
        self.name, self._transposed, self._sums = name, transposed, sums
        adapted = hasattr(module, "lora_A")  # by peft
        self._module: Any = module.base_layer if adapted else module
        self._low: Any = module.lora_A["default"].weight if adapted else None
        self._high: Any = module.lora_B["default"].weight if adapted else None
        self._scale: float = module.scaling["default"] if adapted else 0.0
        self._wide: Tensor | None = None

    @property
    def outputs(self) -> int:
        """Numbers in y."""
        return self._module.weight.shape[1 if self._transposed else 0]

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Within it W is there in float32, once, for any number of tokens."""
        weight = dequantised(self._module.weight).float()
        self._wide = weight.T if self._transposed else weight
        try:
            yield
        finally:
            self._wide = None

    def forward(self, x: Tensor) -> Tensor:
        """y [n, out] of float32 x [n, in]."""
        y = x @ self._matrix.T
        if self._low is not None:
            y.addmm_(x @ self._low.T, self._high.T, alpha=self._scale)
        bias = getattr(self._module, "bias", None)
        return y if bias is None else y.add_(bias.float())

    def back(self, g: Tensor, onto: Tensor | None = None) -> Tensor:
        """From g [n, out] at y to that at x [n, in]; added to `onto` where that is given."""
        found = g @ self._matrix if onto is None else onto.addmm_(g, self._matrix)
        if self._low is not None:
            found.addmm_(g @ self._high, self._low, alpha=self._scale)
        return found

    def learn(self, g: Tensor, x: Tensor) -> None:
        """Add what some tokens say of the parameters."""
        if (total := self._sums.of(f"{self.name}.weight")) is not None:
            if self._transposed:
                total.addmm_(x.T.float(), g)
            else:
                total.addmm_(g.T, x.float())
        if (total := self._sums.of(f"{self.name}.bias")) is not None:
            total += g.sum(0)
        if (total := self._sums.of(f"{self.name}.lora_B.weight")) is not None:
            total.addmm_(g.T, x.float() @ self._low.T, alpha=self._scale)
        if (total := self._sums.of(f"{self.name}.lora_A.weight")) is not None:
            total.addmm_((g @ self._high).T, x.float(), alpha=self._scale)

    @property
    def _matrix(self) -> Tensor:
        assert self._wide is not None  # at_hand is around every use
        return self._wide


@contextmanager
def at_hand(maps: Iterable[LinearMap]) -> Iterator[None]:
    """LinearMap.at_hand of several."""
    with contextlib.ExitStack() as all_of_them:
        for each in maps:
            all_of_them.enter_context(each.at_hand())
        yield
