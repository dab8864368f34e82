"""The protocol: what the server asks a client, what the client answers.

Messages are frozen dataclasses whose fields pydantic checks when they are made, also when
they are made from what arrived; wire.py turns them into bytes and back.

    Describe     what data do you have?                             -> Described
    Forward      activations of a training batch at theta           -> Activations
    Probe        the same at theta + c * s(seed)                    -> Activations
    Evaluate     activations of a held-out batch                    -> Activations
    Losses       the true losses of your probes: update theta       -> Applied
    CutGradient  the loss gradient at the cut: probe your half      -> Scalars
    LocalTrain   the same, but train on it and send the change      -> Change
    CatchUp      ledger entries you have missed                     -> Applied
    Restore      the same as weights, where those are fewer bytes   -> Applied
    Fingerprint  hashes of your submodel                            -> Fingerprinted

Any request may be answered by Behind (the client's ledger is shorter or another one: send
CatchUp or Restore) or Failure.
"""

from dataclasses import field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.ledger import Entry, Ledger, entries_from_columns
from hosl_flower.memory import PHASES
from hosl_flower.state import Snapshot
from hosl_flower.zo import Point

Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Peaks = Annotated[tuple[Count, ...], Field(min_length=len(PHASES), max_length=len(PHASES))]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, config=_STRICT)
class Request:
    """step: training step it belongs to; partition: which client's data; position and digest:
    the ledger it must be answered at."""

    kind: ClassVar[str]
    step: Count
    partition: Count
    position: Count
    digest: Digest


@dataclass(frozen=True, config=_STRICT)
class Describe(Request):
    """Answered at any position."""

    kind: ClassVar[str] = "describe"


@dataclass(frozen=True, config=_STRICT)
class Forward(Request):
    """batch: number of the client's own mini-batch."""

    kind: ClassVar[str] = "forward"
    batch: Count


@dataclass(frozen=True, config=_STRICT)
class Probe(Forward):
    """At theta + coefficient * s(seed)."""

    kind: ClassVar[str] = "probe"
    seed: Count
    coefficient: Finite

    @property
    def point(self) -> Point:
        """Where the client submodel is evaluated."""
        return Point(self.seed, self.coefficient)


@dataclass(frozen=True, config=_STRICT)
class Evaluate(Request):
    """batch: number of the held-out batch."""

    kind: ClassVar[str] = "evaluate"
    batch: Count


@dataclass(frozen=True, config=_STRICT)
class Losses(Request):
    """Losses [2Q] of the probes +eps, -eps of each seed: the client makes its update of them.

    digest_after: of the ledger with that update.
    """

    kind: ClassVar[str] = "losses"
    seeds: tuple[Count, ...]
    losses: tuple[Finite, ...]
    epsilon: Finite
    learning_rate: Finite
    digest_after: Digest


@dataclass(frozen=True, config=_STRICT)
class CutGradient(Request):
    """Loss gradient lambda [B, S, H] at the client's activations of mini-batch `batch`: probe
    <lambda, f_c> with `directions` seeds in each of len(seeds) / directions local steps.

    gradient, scales: lambda / scale, as the run's codec writes it (codec.py). learning_rate: of
    the local updates between the steps, which the client takes back at the end.
    """

    kind: ClassVar[str] = "cut-gradient"
    batch: Count
    directions: Annotated[int, Field(ge=1, lt=2**31)]
    seeds: tuple[Count, ...]
    epsilon: Finite
    learning_rate: Finite
    gradient: Tensor
    scales: Tensor
    scale: Finite

    @property
    def local_seeds(self) -> list[tuple[int, ...]]:
        """Seeds of each local step; ProtocolError when they do not fit."""
        steps, rest = divmod(len(self.seeds), self.directions)
        if rest or not steps:
            raise ProtocolError(
                f"{self.kind}: {len(self.seeds)} seeds are no steps of {self.directions} directions"
            )
        size = self.directions
        return [self.seeds[i * size : (i + 1) * size] for i in range(steps)]


@dataclass(frozen=True, config=_STRICT)
class LocalTrain(CutGradient):
    """As CutGradient; the client sends how its weights changed, then takes the change back."""

    kind: ClassVar[str] = "local-train"


@dataclass(frozen=True, config=_STRICT)
class CatchUp(Request):
    """Entries from `position` on, as columns: seeds int64 [n], scalars float32 [n] ..."""

    kind: ClassVar[str] = "catch-up"
    steps: tuple[Count, ...]
    counts: tuple[Count, ...]
    learning_rates: tuple[Finite, ...]
    seeds: Tensor
    scalars: Tensor

    @classmethod
    def of(cls, ledger: Ledger, start: int, stop: int, cause: Request) -> "CatchUp":
        """The request that carries entries start..stop, so that `cause` can be answered."""
        entries = ledger.since(start, stop)
        return cls(
            step=cause.step,
            partition=cause.partition,
            position=start,
            digest=ledger.digest(start),
            steps=tuple(entry.step for entry in entries),
            counts=tuple(len(entry.seeds) for entry in entries),
            learning_rates=tuple(entry.learning_rate for entry in entries),
            seeds=torch.tensor([s for e in entries for s in e.seeds], dtype=torch.int64),
            scalars=torch.tensor([s for e in entries for s in e.scalars], dtype=torch.float32),
        )

    @property
    def entries(self) -> list[Entry]:
        """The ledger entries carried; ProtocolError when the columns do not fit together."""
        try:
            return entries_from_columns(
                self.steps,
                self.counts,
                self.seeds.tolist(),
                self.scalars.tolist(),
                self.learning_rates,
            )
        except ValueError as error:
            raise ProtocolError(f"catch-up: {error}") from error


@dataclass(frozen=True, config=_STRICT)
class Restore(Request):
    """The client state at `position` as weights [n] and optimizer moments [k, n] (state.py)."""

    kind: ClassVar[str] = "restore"
    updates: Count
    weights: Tensor
    moments: Tensor

    @classmethod
    def of(cls, snapshot: Snapshot, cause: Request) -> "Restore":
        """The request that carries a snapshot, so that `cause` can be answered."""
        return cls(step=cause.step, partition=cause.partition, **vars(snapshot))

    @property
    def snapshot(self) -> Snapshot:
        """The state carried."""
        return Snapshot(self.position, self.digest, self.updates, self.weights, self.moments)


@dataclass(frozen=True, config=_STRICT)
class Fingerprint(Request):
    """Asks for the hashes of the trainable client parameters from position `since` on."""

    kind: ClassVar[str] = "fingerprint"
    since: Count


@dataclass(frozen=True, config=_STRICT)
class Reply:
    """seconds: of client compute; peak_bytes: resident set of the client's process so far;
    tensor_peaks: of its tensors, in the order of memory.PHASES."""

    kind: ClassVar[str]
    step: Count
    seconds: Finite
    peak_bytes: Count
    tensor_peaks: Peaks = field(default=(0,) * len(PHASES), kw_only=True)


@dataclass(frozen=True, config=_STRICT)
class Described(Reply):
    """label_counts: training examples per label; memory_meter: what tensor_peaks measures."""

    kind: ClassVar[str] = "described"
    train_examples: Count
    held_out_examples: Count
    label_counts: tuple[Count, ...]
    memory_meter: Literal["live_storages", "cuda_allocated"]


@dataclass(frozen=True, config=_STRICT)
class Activations(Reply):
    """activations [R, S, H]; attention_mask [R, S] bool; labels [B] int64 in 0..C-1. R is B, or
    B * C where answer words are scored by their tokens (answers.py).

    On the wire activations and scales are as the run's codec writes them; the link hands them
    on decoded, without scales.
    """

    kind: ClassVar[str] = "activations"
    activations: Tensor
    scales: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True, config=_STRICT)
class Applied(Reply):
    """The ledger position and digest the client is at now."""

    kind: ClassVar[str] = "applied"
    position: Count
    digest: Digest


@dataclass(frozen=True, config=_STRICT)
class Scalars(Reply):
    """Projected gradients float32 [E, P] of the client's own surrogate, the 1/P inside."""

    kind: ClassVar[str] = "scalars"
    scalars: Tensor


@dataclass(frozen=True, config=_STRICT)
class Change(Reply):
    """Trainable weights after local training minus those before: float32 [n], in name order."""

    kind: ClassVar[str] = "change"
    change: Tensor


@dataclass(frozen=True, config=_STRICT)
class Fingerprinted(Reply):
    """Fingerprints (ledger.fingerprint) at the ledger positions the client has kept them of,
    in order, that of the request last."""

    kind: ClassVar[str] = "fingerprinted"
    positions: tuple[Count, ...]
    fingerprints: tuple[Digest, ...]


@dataclass(frozen=True, config=_STRICT)
class Behind(Reply):
    """The client's ledger is this one, not the one the request is for: catch it up first."""

    kind: ClassVar[str] = "behind"
    position: Count
    digest: Digest


@dataclass(frozen=True, config=_STRICT)
class Failure(Reply):
    """What went wrong on the client, in one line."""

    kind: ClassVar[str] = "failure"
    error: Annotated[str, Field(max_length=4000)]


Message = Request | Reply
REQUESTS: dict[str, type[Request]] = {
    cls.kind: cls
    for cls in (
        Describe,
        Forward,
        Probe,
        Evaluate,
        Losses,
        CutGradient,
        LocalTrain,
        CatchUp,
        Restore,
        Fingerprint,
    )
}
REPLIES: dict[str, type[Reply]] = {
    cls.kind: cls
    for cls in (
        Described,
        Activations,
        Applied,
        Scalars,
        Change,
        Fingerprinted,
        Behind,
        Failure,
    )
}
