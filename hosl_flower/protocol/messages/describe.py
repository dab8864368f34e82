"""The data and the device of a client: Describe -> Described."""

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from hosl_flower.errors import ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.messages.base import STRICT, Count, Counts, Reply, Request
from hosl_flower.protocol.reply_limits import ReplyLimits

_MOST_EXAMPLES = 10**9


@dataclass(frozen=True, config=STRICT)
class Described(Reply):
    """What a client has.

    Attributes:
        train_examples: its training examples.
        held_out_examples: its held-out examples.
        label_counts: training examples per label, none where labels are the client's.
        memory_meter: what tensor_peaks measures.
        simulated_noise: the noise of what it sends follows from the run's seed.
        held_out_overlap: an overlap.Overlap, flat, or nothing where the held-out part is the
            data's own or the server is told nothing of it.
    """

    kind = "described"
    train_examples: Count
    held_out_examples: Count
    label_counts: Counts
    memory_meter: Literal["live_storages", "cuda_allocated"]
    simulated_noise: bool = field(default=False, kw_only=True)
    held_out_overlap: Counts = field(default=(), kw_only=True)

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless the numbers of examples fit each other and the run."""
        train, held_out, counts = self.train_examples, self.held_out_examples, self.label_counts
        can_train = 0 < train <= _MOST_EXAMPLES
        if not limits.label_counts:
            if counts or not can_train:
                raise ProtocolError(
                    f"described: expected 1 or more training examples and no label counts, which "
                    f"stay on the client; got {train} and {len(counts)} counts"
                )
        elif len(counts) != limits.classes or sum(counts) != train or not can_train:
            raise ProtocolError(
                f"described: expected {limits.classes} label counts that sum to the number of "
                f"training examples, 1 or more; got {list(counts[:8])} and {train}"
            )
        if not 0 < held_out <= limits.held_out:
            raise ProtocolError(
                f"described: expected 1 to {limits.held_out} held-out examples, got {held_out} "
                "(eval-examples uses fewer)"
            )
        overlap = self.held_out_overlap
        if overlap and (
            len(overlap) != 4 or not overlap[1] <= overlap[0] <= held_out or not overlap[0]
        ):
            raise ProtocolError(
                f"described: expected held_out_overlap to be () or (examples, shared, row, row) "
                f"with shared <= examples <= {held_out}, got {overlap[:8]}"
            )


@dataclass(frozen=True, config=STRICT)
class Describe(Request):
    """Asks for what a client has."""

    kind = "describe"
    reply = Described
    anywhere = True
    private = True
