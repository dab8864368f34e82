"""What training changes on a client: its trainable parameters, and where in the ledger they
are. Everything else a client holds follows from its base checkpoint and its data.

The same object serves the device, which must be brought to a position, and the server, which
says what every client must be (server/history.py).
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hosl_flower.ledger.ledger import Entry, chain, fingerprint, first_digest
from hosl_flower.optim.by_name import make_optimizer, second_moments, state_shape
from hosl_flower.optim.gradient import Dense, Gradient, Seeded
from hosl_flower.tensors.rounding import store
from hosl_flower.tensors.rows import as_matrix_shape, row_chunks
from hosl_flower.tensors.update_codec import Coded, RowLayout, pieces_of
from hosl_flower.zo.directions import Layout

_TRAIL_ELEMENTS = 1 << 20  # up to so many, every update is fingerprinted (milliseconds)
_TRAIL_LENGTH = 4096


class Mark(NamedTuple):
    """The submodel at one ledger position: the step that led to it, its fingerprint."""

    step: int
    fingerprint: str


@dataclass(frozen=True)
class Snapshot:
    """A client state without its history.

    weights [n]: trainable parameters in name order, in their dtype; moments float32 [k, m]:
    optimizer state, empty where there is none; updates: how many the optimizer has made.
    """

    position: int
    digest: str
    updates: int
    weights: Tensor
    moments: Tensor


class ClientState:
    """Trainable parameters, optimizer and ledger position of a client submodel.

    parameters: canonical name -> tensor, changed in place. genesis: of the run's ledger.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        distribution: str,
        optimizer: str,
        genesis: str,
    ):
        self.parameters = dict(sorted(parameters.items()))
        self.layout = Layout({n: p.shape for n, p in self.parameters.items()}, distribution)
        self.rows = RowLayout(self.layout.shapes)
        self.optimizer_name = optimizer
        self.optimizer = make_optimizer(optimizer)
        self.position, self.digest = 0, first_digest(genesis)
        self.updates = 0
        self.trail: dict[int, Mark] = {}  # by position, the latest last
        self._step = 0

    @property
    def moments_shape(self) -> tuple[int, int]:
        """[k, m] of the optimizer's state as a snapshot has it; k = 0 for none."""
        return state_shape(self.optimizer_name, [p.shape for p in self.parameters.values()])

    def second_moments(self, moments: Tensor) -> Tensor:
        """Those of an optimizer's state of that shape."""
        shapes = [p.shape for p in self.parameters.values()]
        return second_moments(self.optimizer_name, moments, shapes)

    @property
    def elements(self) -> int:
        """Number of trainable elements."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def apply(self, entries: Iterable[Entry]) -> None:
        """Make the updates of ledger entries, bit for bit as everywhere else."""
        for entry in entries:
            self.update(self.seeded(entry.seeds, entry.scalars), entry.learning_rate)
            self.position, self.digest = self.position + 1, chain(self.digest, entry.pack())
            self._step = entry.step
            if self.elements <= _TRAIL_ELEMENTS:
                self.mark()

    def seeded(self, seeds: Sequence[int], scalars: Sequence[float]) -> Seeded:
        """The gradient estimate of these directions and projected gradients."""
        return Seeded(self.layout, seeds, scalars)

    def update(self, gradient: Gradient, learning_rate: float) -> None:
        """One optimizer step that is in no ledger (yet)."""
        self.optimizer.step(self.parameters, gradient, learning_rate)
        self.updates += 1

    def update_each(
        self, gradients: Iterable[tuple[str, Tensor]], learning_rate: float, seed: int
    ) -> None:
        """As update, along gradients that come one parameter at a time and go at once. seed: see
        Dense. Parameters whose gradient does not come stay as they are."""
        self.optimizer.begin()
        for name, gradient in gradients:
            terms = [(1.0, Dense({name: gradient}))]
            self.optimizer.move(name, self.parameters[name], terms, learning_rate, seed)
        self.updates += 1

    def mark(self) -> Mark:
        """The fingerprint here, computed once per position and kept in the trail."""
        if self.position not in self.trail:
            self.trail[self.position] = Mark(self._step, fingerprint(self.parameters))
            if len(self.trail) > _TRAIL_LENGTH:
                del self.trail[next(iter(self.trail))]
        return self.trail[self.position]

    def weights(self) -> Tensor:
        """All trainable parameters as one vector [n], on the CPU."""
        if not self.parameters:
            return torch.empty(0)
        return torch.cat([p.detach().reshape(-1).cpu() for p in self.parameters.values()])

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        """The inverse of `weights`. Raises ValueError when the length or dtype is another."""
        own = self.weights_like()
        if weights.shape != own.shape or weights.dtype != own.dtype:
            raise ValueError(
                f"expected {own.numel()} weights of {own.dtype}, got {weights.numel()} of "
                f"{weights.dtype}"
            )
        start = 0
        for parameter in self.parameters.values():
            stop = start + parameter.numel()
            parameter.detach().copy_(weights[start:stop].view(parameter.shape))
            start = stop

    @torch.no_grad()
    def assign(self, values: Tensor, seed: int) -> None:
        """Take computed values [n], float32 or float64, as weights: 16-bit ones are rounded at
        random (tensors/rounding.py), so that averages closer than their spacing are not lost."""
        start = 0
        for name, parameter in self.parameters.items():
            stop = start + parameter.numel()
            shape = as_matrix_shape(parameter.shape)
            matrix, own = parameter.detach().view(shape), values[start:stop].view(shape).float()
            for row, block in row_chunks(matrix):
                value = own[row : row + len(block)].to(block.device)
                if block.dtype == torch.float32:
                    block.copy_(value)
                else:
                    store(block, value, seed, name, row)
            start = stop

    @torch.no_grad()
    def move(self, change: Coded, seed: int) -> None:
        """Change the weights by what has been written for the wire, the same everywhere: a product
        and a sum. The optimizer starts afresh. seed: of the rounding of 16-bit weights."""
        for name, piece in pieces_of(self.rows, change):
            matrix = self.parameters[name].detach().view(-1, piece.values.shape[1])
            for row, block in row_chunks(matrix):
                where, own = piece.between(row, row + len(block))
                if not len(where):
                    continue
                where, own = (where - row).to(block.device), own.to(block.device)
                value = block if block.dtype == torch.float32 else block.float()
                value[where] += own
                if value is not block:
                    store(block, value, seed, name, row)

    def forget_optimizer(self) -> None:
        """As before the first update."""
        self.optimizer.load(torch.empty(0, 0), 0, self.parameters)
        self.updates = 0

    def weights_like(self) -> Tensor:
        """Shape and dtype of `weights`, without memory."""
        dtypes = [parameter.dtype for parameter in self.parameters.values()]
        widest = functools.reduce(torch.promote_types, dtypes) if dtypes else None
        return torch.empty(self.elements, dtype=widest, device="meta")

    def is_finite(self) -> bool:
        """Whether all weights and optimizer moments are numbers."""
        tensors = [*self.parameters.values(), *self.optimizer.tensors()]
        return all(bool(torch.isfinite(t.detach().float().sum())) for t in tensors)

    def snapshot(self, moments: bool = True) -> Snapshot:
        """A copy of this state, or of all of it but the optimizer's moments."""
        saved = self.optimizer.save(self.parameters) if moments else torch.empty(0, 0)
        return Snapshot(self.position, self.digest, self.updates, self.weights(), saved)

    def restore(self, snapshot: Snapshot, step: int = 0) -> None:
        """Become what the snapshot holds; ValueError when it is of another submodel."""
        expected = self.moments_shape
        if snapshot.moments.numel() and snapshot.moments.shape != expected:
            raise ValueError(
                f"expected optimizer state {list(expected)}, got {list(snapshot.moments.shape)}"
            )
        self.roll_back(snapshot)
        self.land(snapshot.position, snapshot.digest, step)

    def roll_back(self, snapshot: Snapshot) -> None:
        """Undo updates that are in no ledger, made since a snapshot of this very position."""
        self.set_weights(snapshot.weights)
        self.optimizer.load(snapshot.moments, snapshot.updates, self.parameters)
        self.updates = snapshot.updates

    def land(self, position: int, digest: str, step: int) -> None:
        """As arrive, after updates that are not known one by one."""
        self.position, self.digest, self._step = position, digest, step
        self.trail = {}

    def arrive(self, position: int, digest: str, step: int) -> None:
        """The weights as they are now belong to this ledger position."""
        self.position, self.digest, self._step = position, digest, step
        self.mark()
