"""What differentially private training costs: epsilon, by Google's dp-accounting."""

import math

from hosl_flower.errors import ConfigError


def most_uses(batches: int, batch_size: int, examples: int) -> int:
    """In how many of a client's first mini-batches one of its examples can be: they come from one
    shuffled epoch after the other, and one that comes twice in a mini-batch counts once."""
    return math.ceil(batches * min(batch_size, examples) / examples)


def epsilon(noise: float, uses: int, delta: float) -> float:
    """Of `uses` Gaussian mechanisms with this noise multiplier, adaptively, by Renyi divergences.

    ConfigError without dp-accounting.
    """
    if not uses:
        return 0.0
    try:
        import dp_accounting  # slow, and for those runs alone
        from dp_accounting import rdp
    except ImportError:
        raise ConfigError(
            "dp-noise needs dp-accounting: pip install 'hosl-flower[dp]' where the ServerApp runs"
        ) from None
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(noise), uses)
    return float(accountant.get_epsilon(delta))
