"""The run's changes of weights as clients are told of them, in the 8 bits of
tensors/update_codec.py.

What a change loses is not lost: the server, which has the memory, adds it to the next change of the
same rows (error feedback; Seide et al. 2014). The run's weights are those the clients come to.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from hosl_flower.tensors.update_codec import Coded, RowLayout, decode_update, encode_update


@dataclass(frozen=True)
class WeightDelta:
    """One change, from the ledger position and digest before it to the digest after it."""

    step: int
    position: int
    digest: str
    digest_after: str
    coded: Coded


@dataclass(frozen=True)
class DeltaSpan:
    """Changes that follow on each other. present bool [steps, R]; values and scales one after the
    other; digests: after each."""

    steps: tuple[int, ...]
    position: int
    digest: str
    digests: tuple[str, ...]
    present: Tensor
    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, shifts: list[WeightDelta]) -> "DeltaSpan":
        """Of one or more; the tensors of one are not copied."""
        first, coded = shifts[0], [shift.coded for shift in shifts]
        alone = len(shifts) == 1
        return cls(
            steps=tuple(shift.step for shift in shifts),
            position=first.position,
            digest=first.digest,
            digests=tuple(shift.digest_after for shift in shifts),
            present=torch.stack([own.present for own in coded]),
            values=coded[0].values if alone else torch.cat([own.values for own in coded]),
            scales=coded[0].scales if alone else torch.cat([own.scales for own in coded]),
        )


class WeightDeltas:
    """The latest of a run. lost: float32 [n], of what clients have not been told yet."""

    def __init__(self, rows: RowLayout):
        self.rows = rows
        self.lost: Tensor | None = None
        self._kept: deque[WeightDelta] = deque()
        self._passages: dict[int, DeltaSpan] = {}  # to the latest, by position, for all clients

    def encode(self, change: Tensor, seed: int) -> Coded:
        """A change of the weights, float32 [n], and what earlier ones have lost of its rows."""
        lost = torch.zeros_like(change) if self.lost is None else self.lost
        moving = self._moving(change)
        wanted = torch.where(moving, change + lost, 0.0)
        coded = encode_update(self.rows, self.rows.parts(wanted), "int8", seed)
        self.lost = torch.where(moving, wanted - decode_update(self.rows, coded), lost)
        return coded

    def _moving(self, change: Tensor) -> Tensor:
        """Whether an element's row changes at all: bool [n]."""
        rows = [(part != 0).any(1) for _, part in self.rows.parts(change)]
        if not rows:
            return torch.empty(0, dtype=torch.bool)
        return torch.cat(rows).repeat_interleave(self.rows.widths())

    def keep(self, shift: WeightDelta, limit: int) -> None:
        """For clients that follow step by step; as many of the latest as are `limit` bytes."""
        self._passages.clear()
        self._kept.append(shift)
        while sum(kept.coded.nbytes for kept in self._kept) > limit:
            self._kept.popleft()

    def since(self, position: int, digest: str) -> DeltaSpan | None:
        """From there to the latest; None where one of the changes between is not kept."""
        found = [shift for shift in self._kept if shift.position >= position]
        if not found or (found[0].position, found[0].digest) != (position, digest):
            return None
        if position not in self._passages:
            self._passages[position] = DeltaSpan.of(found)
        return self._passages[position]
