"""Differential privacy of a client's training examples, where scalars are all it sends of them.

Of a mini-batch of B examples, of which example i alone would give the projected gradients g_i [P]:

    released = (sum_i clip(g_i) + N(0, (z C)^2)) / B,    clip: to an L2 norm of at most C

that is the Gaussian mechanism with noise multiplier z (dp-noise, dp-clip), for neighbours where
one example counts for nothing instead. Everything else a full ZO run sends or makes follows from
what is released. DP-ZO (arXiv 2401.04343) and DPZero (arXiv 2310.09639) clip and noise the same
scalars in one place; here each client does it itself, so that nobody is trusted with the others.

Sums and noise are whole numbers, of C / 65,536 (discrete_gaussian.py). Noise follows from a secret
of the client's and from what it is for: who asks the same again, after a lost message or a restart,
gets the same answer, not a second sample that could be averaged with the first. What is asked in
another way, or of other data, gets noise of its own.
"""

import hmac
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.privacy.discrete_gaussian import Bits, discrete_gaussian
from hosl_flower.privacy.noise_secret import given
from hosl_flower.tensors.rounding import to_float32
from hosl_flower.zo.estimator import Point, probe_points

UNITS = 1 << 16  # whole numbers that C is
_BELOW = 1 - 2**-40  # of C, so that rounding of float64 leaves no norm above it


@dataclass(frozen=True)
class Mechanism:
    """clip: C. noise: z. secret: the client's own."""

    clip: float
    noise: float
    secret: bytes = field(repr=False)

    def release(self, gradients: Sequence[Sequence[float]], about: dict[str, Any]) -> list[float]:
        """The noisy mean of clipped gradients [B][P], exact float32.

        about: all that the gradients depend on but the data: as JSON. DivergedError for what
        float32 cannot hold.
        """
        columns = zip(*(in_units(own, self.clip) for own in gradients), strict=True)
        totals = [sum(column) for column in columns]
        asked = json.dumps([about, self.clip, self.noise, len(gradients), totals], sort_keys=True)
        bits = Bits(hmac.digest(self.secret, asked.encode(), "sha256"))
        sigma = math.ceil(self.noise * UNITS)
        noisy = [total + discrete_gaussian(sigma, bits) for total in totals]
        return [to_float32(value * self.clip / UNITS / len(gradients)) for value in noisy]


def mechanism_of(spec: ClientSpec, secret: bytes | None) -> Mechanism | None:
    """Of a run; None without dp-noise. ValueError for noise without a secret."""
    if not spec.dp_noise:
        return None
    return Mechanism(spec.dp_clip, spec.dp_noise, given(secret))


def in_units(gradient: Sequence[float], clip: float) -> list[int]:
    """One example's gradient [P], clipped, in units of clip / 65,536 rounded towards zero: its norm
    is at most 65,536. One that is not finite counts for nothing."""
    norm = math.hypot(*gradient)
    if not math.isfinite(norm):
        return [0] * len(gradient)
    factor = UNITS / clip * min(1.0, clip / norm if norm else 1.0) * _BELOW
    return [int(value * factor) for value in gradient]


def example_gradients(
    losses: Callable[[Point], Iterable[float]], seeds: Sequence[int], epsilon: float
) -> list[list[float]]:
    """Each example's projected gradients [B][P], one-sided, with the 1/P inside (zo/estimator.py).

    losses: of all examples at a point. ValueError for epsilon = 0.
    """
    if not epsilon:
        raise ValueError("differences need a probe distance, got epsilon = 0")
    at = [list(losses(point)) for point in probe_points(seeds, epsilon, two_sided=False)]
    scale = epsilon * len(seeds)
    return [[(value - clean) / scale for value in own] for clean, *own in zip(*at, strict=True)]
