"""Ways to make one scalar per direction of several clients' scalars.

One signature: scalars [K, ...] and weights [K], which sum to 1, to aggregate [...]. All but
the weighted mean count every client the same: claimed examples buy no influence.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hosl_flower.errors import ConfigError

MEANS = ("weighted-mean", "mean")  # those that merge more than scalars
Aggregate = Callable[[Tensor, Sequence[float]], Tensor]


def make_aggregate(name: str, trim_fraction: float) -> Aggregate:
    """The rule of a config name."""
    rules: dict[str, Aggregate] = {
        "weighted-mean": weighted_mean,
        "mean": mean,
        "median": median,
        "trimmed-mean": partial(trimmed_mean, fraction=trim_fraction),
    }
    return rules[name]


def check_is_mean(name: str, method: str, averaged: str) -> None:
    """ConfigError for a rule that a method which averages something else does not have."""
    if name not in MEANS:
        raise ConfigError(
            f"{method} averages {averaged}: aggregation = {name} is of scalars; use "
            f"{' or '.join(MEANS)}"
        )


def weighted_mean(scalars: Tensor, weights: Sequence[float]) -> Tensor:
    """FedAvg's rule: clients count by their numbers of examples."""
    shares = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (scalars.dim() - 1))
    return (scalars.double() * shares).sum(0)


def mean(scalars: Tensor, weights: Sequence[float]) -> Tensor:
    """Every client counts the same (HO-SFL)."""
    return scalars.double().mean(0)


def median(scalars: Tensor, weights: Sequence[float]) -> Tensor:
    """Of an even number, the mean of the middle two. Bounded whatever a minority sends."""
    ordered = scalars.double().sort(0).values
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(scalars: Tensor, weights: Sequence[float], fraction: float = 0.2) -> Tensor:
    """Mean without the lowest and the highest `fraction` of the clients, of three or more at
    least one each (unless fraction is 0), but always of some."""
    count = len(scalars)
    cut = int(count * fraction)
    if fraction > 0 and count >= 3:
        cut = max(1, cut)
    cut = min(cut, (count - 1) // 2)
    return scalars.double().sort(0).values[cut : count - cut].mean(0)
