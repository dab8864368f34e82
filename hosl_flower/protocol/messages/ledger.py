"""The ledger on its way: what brings a client to where the run is, and shows that it is there.

Losses, CatchUp, ApplyDeltas, Restore -> Applied, Fingerprint -> Fingerprinted.
"""

from dataclasses import field
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.ledger.client_state import ClientState, Snapshot
from hosl_flower.ledger.ledger import Entry, Ledger, entries_from_columns
from hosl_flower.ledger.weight_deltas import DeltaSpan
from hosl_flower.protocol.messages.base import (
    STRICT,
    Count,
    Counts,
    Digest,
    Digests,
    Finite,
    Finites,
    Reply,
    Request,
)
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.tensors.raw_bytes import dtype_name
from hosl_flower.tensors.update_codec import Coded, RowLayout, check


@dataclass(frozen=True, config=STRICT)
class Applied(Reply):
    """The ledger position and digest the client is at now."""

    kind = "applied"
    position: Count
    digest: Digest


@dataclass(frozen=True, config=STRICT)
class CatchUp(Request):
    """Entries from `position` on, as columns: seeds int64 [n], scalars float32 [n] ..."""

    kind = "catch-up"
    reply = Applied
    private = True
    steps: Counts
    counts: Counts
    learning_rates: Finites
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
        _check_column("seeds", self.seeds, "int64")
        _check_column("scalars", self.scalars, "float32")
        if (self.seeds < 0).any():
            raise ProtocolError(f"catch-up: seeds: expected 0 or more, got {int(self.seeds.min())}")
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


def _check_column(what: str, column: Tensor, dtype: str) -> None:
    if column.dim() != 1 or dtype_name(column) != dtype:
        got = f"{dtype_name(column)}{list(column.shape)}"
        raise ProtocolError(f"catch-up: {what}: expected {dtype}[n], got {got}")


@dataclass(frozen=True, config=STRICT)
class ApplyDeltas(Request):
    """What the weights have changed by from `position` on, of each step in turn, in 8 bits:
    present [steps, R], values and scales one after the other (tensors/update_codec.py). digests: of
    the ledger after each."""

    kind = "move"
    reply = Applied
    private = True
    steps: Annotated[Counts, Field(min_length=1)]
    present: Tensor
    values: Tensor
    scales: Tensor
    digests: Digests

    @classmethod
    def of(cls, passage: DeltaSpan, cause: Request) -> "ApplyDeltas":
        """The request that carries a passage, so that `cause` can be answered."""
        return cls(step=cause.step, partition=cause.partition, **vars(passage))

    def changes(self, rows: RowLayout) -> list[tuple[int, str, Coded]]:
        """(step, digest after it, change) of each; ProtocolError when they are of other rows."""
        if len(self.digests) != len(self.steps):
            raise ProtocolError(
                f"move: expected a digest for each of {len(self.steps)} steps, got "
                f"{len(self.digests)}"
            )
        shape = [len(self.steps), rows.count]
        if list(self.present.shape) != shape:
            raise ProtocolError(
                f"move: expected bool{shape} of the rows that are present, got "
                f"{dtype_name(self.present)}{list(self.present.shape)}"
            )
        widths = rows.widths()
        whole = Coded(self.present.flatten(), self.values, self.scales)
        check(widths.repeat(len(self.steps)), whole, "int8", self.kind)
        found, value, scale = [], 0, 0
        for step, digest, present in zip(self.steps, self.digests, self.present, strict=True):
            values, scales = int(widths[present].sum()), int(present.sum())
            own = slice(value, value + values), slice(scale, scale + scales)
            change = Coded(present, self.values[own[0]], self.scales[own[1]])
            found.append((step, digest, change))
            value, scale = value + values, scale + scales
        return found


@dataclass(frozen=True, config=STRICT)
class Restore(Request):
    """The client state at `position` as weights [n] and optimizer moments [k, m]
    (ledger/client_state.py)."""

    kind = "restore"
    reply = Applied
    private = True
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


@dataclass(frozen=True, config=STRICT)
class Losses(Request):
    """Losses of the probes of each seed, of which the client makes its update.

    Attributes:
        seeds: [Q].
        losses: [2Q], at +eps and -eps of each seed.
        epsilon: the probe distance.
        learning_rate: of the update.
        digest_after: of the ledger with the update.
        clip: the bound of the scalars, 0 for none.
    """

    kind = "losses"
    reply = Applied
    private = True
    seeds: Counts
    losses: Finites
    epsilon: Finite
    learning_rate: Finite
    digest_after: Digest
    clip: Annotated[Finite, Field(ge=0)] = field(default=0.0, kw_only=True)


@dataclass(frozen=True, config=STRICT)
class Fingerprinted(Reply):
    """Fingerprints (ledger.fingerprint) at the ledger positions the client has kept them of,
    in order, that of the request last."""

    kind = "fingerprinted"
    positions: Counts
    fingerprints: Digests

    def check(self, request: Any, limits: ReplyLimits, state: ClientState) -> None:
        """ProtocolError unless they are of positions since.., in order, the request's last."""
        positions = list(self.positions)
        fits = len(positions) == len(self.fingerprints) and positions == sorted(set(positions))
        if not fits or not positions or positions[-1] != request.position:
            raise ProtocolError(
                f"fingerprints: expected positions up to {request.position}, got {positions[-3:]} "
                f"with {len(self.fingerprints)} fingerprints"
            )


@dataclass(frozen=True, config=STRICT)
class Fingerprint(Request):
    """Asks for the hashes of the trainable client parameters from position `since` on."""

    kind = "fingerprint"
    reply = Fingerprinted
    private = True
    since: Count
