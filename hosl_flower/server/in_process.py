"""The link without a network: requests are function calls. The oracle the others must equal."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from hosl_flower.protocol.messages.base import Reply, Request
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.server.history import History
from hosl_flower.server.link import Deadline, Link


class InProcessLink(Link):
    """One client serves every partition, one reply at a time, computed when asked for.

    answer: `Client.answer`, which takes requests and yields their replies.
    """

    def __init__(
        self,
        answer: Callable[[Iterable[Request]], Iterator[Reply]],
        history: History,
        limits: ReplyLimits,
    ):
        super().__init__(history, limits)
        self._answer = answer

    def describe_client(self, partition: int) -> str:
        return f"client {partition}"

    def _deliver(
        self, requests: Mapping[int, Sequence[Request]], until: Deadline
    ) -> dict[int, Iterator[Reply]]:
        return {partition: self._answer(own) for partition, own in requests.items()}
