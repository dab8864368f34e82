"""Surrogates a client can evaluate alone: the scalar functions its probes are taken of.

HOSL's surrogate, the true loss, needs the server and lives in strategies/hosl.py.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hosl_flower.zo import Point


def linear(
    forward: Callable[[Point], Tensor], gradient: Tensor, reference: Tensor
) -> Callable[[Sequence[Point]], Iterator[float]]:
    """HO-SFL's surrogate <lambda, f_c(x; theta)>, less its value at theta (arXiv 2603.14773).

    forward: activations [B, S, H] at a point. gradient: lambda [B, S, H], the loss gradient at
    the cut, float32. reference: activations at theta itself, which are not computed again.
    The gradient of this scalar at the anchor is the back-propagated client gradient.
    """

    def values(points: Sequence[Point]) -> Iterator[float]:
        for point in points:
            if point.coefficient == 0:
                yield 0.0
                continue
            # the difference first: <lambda, h> - <lambda, z> would cancel badly
            difference = forward(point).float().sub_(reference)
            per_token = difference.mul_(gradient).sum(-1)  # float32 [B, S]
            yield float(per_token.cpu().to(torch.float64).sum())

    return values
