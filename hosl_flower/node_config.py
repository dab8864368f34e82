"""A SuperNode's own configuration, `flower-supernode --node-config`.

partition-id (required), num-partitions, data-path, model-path and device. `{partition}` in
data-path stands for the client's number, where a node serves several.
"""

PLACEHOLDER = "{partition}"  # in data-path: the number of the client it is for


def shared_between_partitions(data_path: str) -> bool:
    """Whether a node's data-path is the same data for every client the node serves."""
    return bool(data_path) and PLACEHOLDER not in data_path
