"""A SuperNode's own configuration, `flower-supernode --node-config`.

partition-id (required), num-partitions, data-path, model-path, device and noise-secret.
`{partition}` in data-path stands for the client's number, where a node serves several.
"""

import sys

PLACEHOLDER = "{partition}"  # in data-path: the number of the client it is for


def shared_between_partitions(data_path: str) -> bool:
    """Whether a node's data-path is the same data for every client the node serves."""
    return bool(data_path) and PLACEHOLDER not in data_path


def is_simulated() -> bool:
    """Whether this process is one of the simulation engine's workers: they, and nobody else, have
    Ray up."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
