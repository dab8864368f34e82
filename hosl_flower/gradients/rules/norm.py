"""The rule of a norm, by hand."""

from typing import Any

from torch import Tensor, nn


class Norm:
    """A layer norm, or one of root mean squares, at h [n, H] in float32. unit: h to norm one, less
    its mean for a layer norm; output: what the module makes of h."""

    def __init__(self, module: Any, h: Tensor):
        self.centres = isinstance(module, nn.LayerNorm)
        centred = h - h.mean(1, keepdim=True) if self.centres else h
        eps = module.eps if self.centres else module.variance_epsilon
        self._scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt_()
        self.unit = centred.mul(self._scale)
        self._gamma = None if module.weight is None else module.weight.float()
        self.output = self.unit if self._gamma is None else self.unit * self._gamma
        bias = getattr(module, "bias", None)
        if bias is not None:
            self.output = self.output + bias.float()

    def back(self, g: Tensor) -> Tensor:
        """J^T g, in g's place."""
        if self._gamma is not None:
            g.mul_(self._gamma)
        along = self.unit * (g * self.unit).mean(1, keepdim=True)
        # what is left when spread and, for a layer norm, mean are held
        g -= g.mean(1, keepdim=True) + along if self.centres else along
        return g.mul_(self._scale)
