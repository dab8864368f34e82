"""The optimizers by their names in a run config."""

from collections.abc import Sequence

import torch

from hosl_flower.adafactor import Adafactor, state_size
from hosl_flower.optimizer import AdamW, Optimizer, Sgd

_OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": Sgd, "adamw": AdamW, "adafactor": Adafactor}


def make_optimizer(name: str) -> Optimizer:
    """A fresh one."""
    return _OPTIMIZERS[name]()


def state_shape(name: str, shapes: Sequence[torch.Size]) -> tuple[int, int]:
    """[k, m] of the state over parameters of these shapes, as `save` gives it."""
    if name == "adafactor":
        return 1, sum(map(state_size, shapes))
    return {"sgd": 0, "adamw": 2}[name], sum(shape.numel() for shape in shapes)
