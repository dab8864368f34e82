"""The zeroth-order estimator (MeZO's SPSA; HOSL Def. 3, Eq. 6-7).

One estimator serves every method; methods differ in the scalar they probe, the surrogate:
HOSL asks the server for the true loss, HO-SFL takes an inner product with the cut gradient.

    two-sided  g_q = (f(theta + eps s_q) - f(theta - eps s_q)) / (2 eps Q)
    one-sided  g_q = (f(theta + eps s_q) - f(theta)) / (eps Q)
    exact      g_q = d/dt f(theta + t s_q) / Q at t = 0, by forward-mode (forward_mode.py)
    gradient   sum_q g_q s_q, which the client's optimizer applies (optim/optimizer.py)

The 1/Q sits in the scalar, as in HOSL's Alg. 1, so a ledger of (seed, g) pairs is complete.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hosl_flower.tensors.rounding import to_float32


@dataclass(frozen=True)
class Point:
    """Where a surrogate is evaluated: theta + coefficient * s(seed). coefficient 0 is theta."""

    seed: int
    coefficient: float


def probe_points(seeds: Sequence[int], epsilon: float, two_sided: bool = True) -> list[Point]:
    """The points one estimate needs, in the order the values are expected.

    Two-sided: +eps, -eps per seed. One-sided: theta itself first, then +eps per seed.
    """
    if two_sided:
        return [Point(seed, sign * epsilon) for seed in seeds for sign in (1, -1)]
    return [Point(0, 0.0), *(Point(seed, epsilon) for seed in seeds)]


def projected_gradients(
    values: Sequence[float], epsilon: float, two_sided: bool = True
) -> list[float]:
    """Surrogate values, ordered as `probe_points`, -> projected gradients [Q], exact float32.

    Raises ValueError when a value is not finite, epsilon is 0 or their number does not fit.
    """
    if not epsilon:
        raise ValueError("differences need a probe distance, got epsilon = 0")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"surrogate values must be finite, got {list(values)}")
    if two_sided:
        if len(values) < 2 or len(values) % 2:
            raise ValueError(f"two-sided probing needs 2 values per seed, got {len(values)}")
        directions = len(values) // 2
        differences = [values[2 * q] - values[2 * q + 1] for q in range(directions)]
        return [to_float32(d / (2 * epsilon * directions)) for d in differences]
    directions = len(values) - 1
    if directions < 1:
        raise ValueError(f"one-sided probing needs 1 + Q values, got {len(values)}")
    return [to_float32((v - values[0]) / (epsilon * directions)) for v in values[1:]]


def directional(derivative: Callable[[int], float], seeds: Sequence[int]) -> list[float]:
    """Projected gradients [Q] where the derivative along a seed's direction is known: what
    `estimate` tends to as epsilon does to zero. ValueError when one is not finite."""
    values = [derivative(seed) for seed in seeds]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"derivatives must be finite, got {values}")
    return [to_float32(value / len(seeds)) for value in values]


def clip(scalars: Tensor, bound: float) -> Tensor:
    """Projected gradients, each within +-bound, so that nobody's weigh more than that; 0 is no
    bound."""
    return scalars.clamp(-bound, bound) if bound else scalars


def estimate(
    surrogate: Callable[[Sequence[Point]], Iterable[float]],
    seeds: Sequence[int],
    epsilon: float,
    two_sided: bool = True,
) -> list[float]:
    """Projected gradients [Q] of a surrogate along the directions of `seeds`.

    surrogate: given points, yields its value at each, in order. It may be lazy: values are
    consumed one at a time, so a remote surrogate never holds two activations at once.
    """
    values = list(surrogate(probe_points(seeds, epsilon, two_sided)))
    return projected_gradients(values, epsilon, two_sided)
