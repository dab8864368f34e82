"""The optimizers by their names in a run config."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hosl_flower.optim.adafactor import Adafactor, state_size
from hosl_flower.optim.adafactor_momentum import (
    AdafactorMomentum,
    momentum_size,
    second_moments_size,
)
from hosl_flower.optim.optimizer import AdamW, Optimizer, Sgd

_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": Sgd,
    "adamw": AdamW,
    "adafactor": Adafactor,
    "adafactor-momentum": AdafactorMomentum,
}


def make_optimizer(name: str) -> Optimizer:
    """A fresh one."""
    return _OPTIMIZERS[name]()


def state_shape(name: str, shapes: Sequence[torch.Size]) -> tuple[int, int]:
    """[k, m] of the state over parameters of these shapes, as `save` gives it."""
    whole = sum(shape.numel() for shape in shapes)
    if name.startswith("adafactor"):
        size = momentum_size if name == "adafactor-momentum" else state_size
        return 1, sum(map(size, shapes))
    return {"sgd": 0, "adamw": 2}[name], whole


def second_moments(name: str, moments: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """Of a state [k, m] that `save` gave: what says a mean of squares, so never below zero."""
    if name == "adafactor-momentum":
        return moments[0, : sum(map(second_moments_size, shapes))]
    return moments[-1]
