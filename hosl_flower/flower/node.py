"""Whether this process is part of a simulation."""

import sys


def is_simulated() -> bool:
    """Whether this process is one of the simulation engine's workers: they, and nobody else, have
    Ray up. No message can make it so."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
