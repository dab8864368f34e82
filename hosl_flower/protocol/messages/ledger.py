"""What brings a client that is behind to where the run is: see messages.py for the protocol."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.ledger.client_state import Snapshot
from hosl_flower.ledger.ledger import Entry, Ledger, entries_from_columns
from hosl_flower.ledger.weight_deltas import DeltaSpan
from hosl_flower.protocol.messages.requests import STRICT, Count, Counts, Digests, Finites, Request
from hosl_flower.tensors.raw_bytes import dtype_name
from hosl_flower.tensors.update_codec import Coded, RowLayout, check


@dataclass(frozen=True, config=STRICT)
class CatchUp(Request):
    """Entries from `position` on, as columns: seeds int64 [n], scalars float32 [n] ..."""

    kind: ClassVar[str] = "catch-up"
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
    present [steps, R], values and scales one after the other (update_codec.py). digests: of the
    ledger after each."""

    kind: ClassVar[str] = "move"
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
    """The client state at `position` as weights [n] and optimizer moments [k, m] (state.py)."""

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
