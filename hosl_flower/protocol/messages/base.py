"""Requests and replies: the fields that all have, and what a class says of its messages."""

from dataclasses import field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, FailFast, Field
from pydantic.dataclasses import dataclass

from hosl_flower.errors import ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.tensors.memory import PHASES

Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
# the first bad element is enough: an error for each would be a hundred times the message's size
Counts = Annotated[tuple[Count, ...], FailFast()]
Finites = Annotated[tuple[Finite, ...], FailFast()]
Digests = Annotated[tuple[Digest, ...], FailFast()]
# summed up over a run, so that a sum stays a number; nobody computes for longer than eleven days
Seconds = Annotated[Finite, Field(ge=0, le=1e6)]
Peaks = Annotated[Counts, Field(min_length=len(PHASES), max_length=len(PHASES))]
STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)

MOST_MEMORY = 2**46  # bytes, 64 TiB: no client has so much, whatever it says

REPLIES: dict[str, "type[Reply]"] = {}  # by kind
REQUESTS: dict[str, "type[Request]"] = {}


@dataclass(frozen=True, config=STRICT)
class Reply:
    """What a client answers.

    A subclass that has a `kind` is a message; its `check` says what it must be beyond the form of
    its fields, and `largest` how large it can be.

    Attributes:
        kind: its name on the wire.
        step: the training step of the request.
        seconds: of client compute.
        peak_bytes: resident set of the client's process so far.
        tensor_peaks: bytes of its tensors, in the order of memory.PHASES.
    """

    kind: ClassVar[str]
    step: Count
    seconds: Seconds
    peak_bytes: Count
    tensor_peaks: Peaks = field(default=(0,) * len(PHASES), kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            REPLIES[cls.kind] = cls

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """Check the reply against its request, the run's limits and the server's client state.

        Raises:
            ProtocolError: when it is not what was asked for.
        """

    def check_measures(self) -> None:
        """ProtocolError when a client claims more memory than any machine has."""
        most = max(self.peak_bytes, *self.tensor_peaks)
        if most > MOST_MEMORY:
            raise ProtocolError(f"memory: expected at most {MOST_MEMORY} bytes, got {most}")

    @classmethod
    def largest(cls, request: Any, limits: ReplyLimits, state: ClientState) -> int:
        """The bytes of its large tensors, at most; 0 for replies that are small."""
        return 0


@dataclass(frozen=True, config=STRICT)
class Request:
    """What the server asks a client. A subclass that has a `kind` is a message.

    Attributes:
        kind: its name on the wire.
        reply: the class of the answer.
        anywhere: it can be answered at any ledger position.
        private: a client with dp-noise answers it. Others may tell of examples.
        step: the training step it belongs to.
        partition: the client whose data it is about.
        position: the ledger position it must be answered at.
        digest: of the ledger there.
        local: steps of its own that the client has taken since (LocalStep), which are in no ledger.
    """

    kind: ClassVar[str]
    reply: ClassVar[type[Reply]]
    anywhere: ClassVar[bool] = False
    private: ClassVar[bool] = False
    step: Count
    partition: Count
    position: Count
    digest: Digest
    local: Count = field(default=0, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            REQUESTS[cls.kind] = cls


Message = Request | Reply


@dataclass(frozen=True, config=STRICT)
class Behind(Reply):
    """The client's ledger is this one, not the one the request is for: catch it up first."""

    kind = "behind"
    position: Count
    digest: Digest


@dataclass(frozen=True, config=STRICT)
class Failure(Reply):
    """What went wrong on the client, in one line."""

    kind = "failure"
    error: Annotated[str, Field(max_length=4000)]
