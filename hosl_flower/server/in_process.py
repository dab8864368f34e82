"""The link without a network: requests are function calls. The oracle the others must equal."""

from collections.abc import Iterator, Mapping, Sequence

from hosl_flower.client.client import Client
from hosl_flower.protocol.checks import Limits
from hosl_flower.protocol.messages.registry import Reply, Request
from hosl_flower.server.history import History
from hosl_flower.server.link import Link


class InProcessLink(Link):
    """One Client object serves every partition, one reply at a time, computed when asked for."""

    def __init__(self, client: Client, history: History, limits: Limits):
        super().__init__(history, limits)
        self.client = client

    def describe_client(self, partition: int) -> str:
        return f"client {partition}"

    def _deliver(self, requests: Mapping[int, Sequence[Request]]) -> dict[int, Iterator[Reply]]:
        return {partition: self.client.answer(own) for partition, own in requests.items()}
