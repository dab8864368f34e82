"""Surrogates a client can evaluate alone: the scalar functions its probes are taken of.

    linear     <lambda, f_c(x)>, of the loss gradient at the cut            (HO-SFL)
    head_loss  the loss of the client's own auxiliary head                  (HERON-SFL, DeComFL)

HOSL's surrogate, the true loss, needs the server and lives in strategies/hosl.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from hosl_flower.tensors.cut_gradient import Cotangent, Pieces
from hosl_flower.zo.estimator import Point

Surrogate = Callable[[Sequence[Point]], Iterator[float]]


def linear(
    pieces: Callable[[Point], Pieces], gradient: Cotangent, anchor: float | None = None
) -> Surrogate:
    """HO-SFL's surrogate <lambda, f_c(x; theta)> (arXiv 2603.14773).

    pieces: activations at a point. anchor: the value at theta itself, where it is known. The
    gradient of this scalar at the anchor is the back-propagated client gradient.
    """

    def values(points: Sequence[Point]) -> Iterator[float]:
        for point in points:
            if point.coefficient == 0 and anchor is not None:
                yield anchor
            else:
                yield gradient.inner(pieces(point))

    return values


def head_loss(
    losses: Callable[[Point], Iterable[float]], note: Callable[[float], object]
) -> Surrogate:
    """The mean loss of the auxiliary head (arXiv 2601.09076).

    losses: each example's at a point, float64. note: is told the value at theta itself.
    """

    def values(points: Sequence[Point]) -> Iterator[float]:
        for point in points:
            own = list(losses(point))
            value = math.fsum(own) / len(own)
            if point.coefficient == 0:
                note(value)
            yield value

    return values
