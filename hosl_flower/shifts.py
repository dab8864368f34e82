"""The run's changes of weights as clients are told of them, in the 8 bits of update_codec.py.

What a change loses is not lost: the server, which has the memory, adds it to the next change of the
same rows (error feedback; Seide et al. 2014). The run's weights are those the clients come to.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from hosl_flower.update_codec import Coded, Rows, decode, encode


@dataclass(frozen=True)
class Shift:
    """One change, from the ledger position and digest before it to those after."""

    step: int
    position: int
    digest: str
    digest_after: str
    coded: Coded


class Shifts:
    """The latest of a run. lost: float32 [n], of what clients have not been told yet."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.lost: Tensor | None = None
        self._kept: deque[Shift] = deque()

    def encode(self, change: Tensor, seed: int) -> Coded:
        """A change of the weights, float32 [n], and what earlier ones have lost of its rows."""
        lost = torch.zeros_like(change) if self.lost is None else self.lost
        wanted = torch.where(self._moving(change), change + lost, 0.0)
        coded = encode(self.rows, self.rows.parts(wanted), "int8", seed)
        self.lost = torch.where(wanted != 0, wanted - decode(self.rows, coded), lost)
        return coded

    def _moving(self, change: Tensor) -> Tensor:
        """Whether an element's row changes at all: bool [n]."""
        rows = [(part != 0).any(1) for _, part in self.rows.parts(change)]
        if not rows:
            return torch.empty(0, dtype=torch.bool)
        return torch.cat(rows).repeat_interleave(self.rows.widths())

    def keep(self, shift: Shift, limit: int) -> None:
        """For clients that follow step by step; as many of the latest as are `limit` bytes."""
        self._kept.append(shift)
        while sum(kept.coded.nbytes for kept in self._kept) > limit:
            self._kept.popleft()

    def since(self, position: int, digest: str) -> list[Shift]:
        """Those that lead from there to the latest; none where one of them is not kept."""
        found = [shift for shift in self._kept if shift.position >= position]
        there = found and (found[0].position, found[0].digest) == (position, digest)
        return found if there else []
