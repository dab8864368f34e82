"""Learning rates over a run, the same shape on both sides.

Step t of T counts from 1, W = warmup-steps. A rate is the configured one times

    t <= W      t / W
    constant    1
    linear      (T - t + 1) / (T - W)
    cosine      (1 + cos(pi (t - W - 1) / (T - W))) / 2

so the first step after the warm-up is a full one and none is empty. Clients are told the rate of
each update, and the ledger records it: they need not know the schedule.
"""

import math

from hosl_flower.config.run_config import RunConfig


def rate_factor(config: RunConfig, step: int) -> float:
    """What step 1..steps multiplies the learning rates by, in (0, 1]."""
    warmup, steps = config.learning_rate.warmup_steps, config.steps
    if step <= warmup:
        return step / warmup
    gone = (step - warmup - 1) / (steps - warmup)  # of what follows the warm-up, [0, 1)
    if config.learning_rate.schedule == "linear":
        return 1.0 - gone
    if config.learning_rate.schedule == "cosine":
        return (1.0 + math.cos(math.pi * gone)) / 2
    return 1.0


def client_rate(config: RunConfig, step: int) -> float:
    """The client optimizer's learning rate in a step."""
    return config.client.learning_rate * rate_factor(config, step)
