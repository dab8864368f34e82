"""The server's record of the client submodel: the ledger of the run, the state it gives, and
how to bring a client there."""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from hosl_flower.errors import DivergedError, DriftError
from hosl_flower.ledger.client_state import ClientState, Snapshot
from hosl_flower.ledger.ledger import Entry, Ledger, fingerprint
from hosl_flower.ledger.weight_deltas import WeightDelta, WeightDeltas
from hosl_flower.optim.gradient import Dense
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.ledger import ApplyDeltas, CatchUp, Fingerprinted, Restore
from hosl_flower.protocol.wire import wire_bytes
from hosl_flower.tensors.seeds import derive_seed

_REQUEST_BYTES = 400  # header of a Restore, roughly


class History:
    """state: the server's own copy of what clients train, at the end of the ledger.

    The ledger is compacted as it grows: entries that together are longer than a snapshot
    help nobody, so a long run holds no more than twice the client's trainable weights; changes
    of weights in 8 bits (ledger/weight_deltas.py) that would be longer neither, and there what they
    have lost is held besides.

    private_optimizer: its state is of the server's own updates (`descend`) and no client's.
    """

    def __init__(self, state: ClientState, genesis: str):
        self.state = state
        self.ledger = Ledger(genesis)
        self.private_optimizer = False
        self.deltas = WeightDeltas(state.rows)
        self._snapshot: Snapshot | None = None

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a client state as weights and moments."""
        weights = self.state.weights_like()
        moments = 0 if self.private_optimizer else 4 * math.prod(self.state.moments_shape)
        return _REQUEST_BYTES + weights.numel() * weights.dtype.itemsize + moments

    def commit(self, entries: Iterable[Entry]) -> None:
        """Make updates part of the run. Raises DivergedError when they lead out of the numbers."""
        for entry in entries:
            self.state.apply([entry])
            self.ledger.append(entry)
        self._check_finite()
        self.ledger.compact(self.snapshot_bytes)

    def jump(
        self, step: int, weights: Tensor, moments: Tensor | None = None, updates: int = 0
    ) -> None:
        """Make new weights [n], which no seeds and scalars can say, part of the run; with the
        state of the optimizer that led to them, or with a fresh one. Weights in another dtype
        than the client's are rounded to it (ClientState.assign)."""
        if weights.dtype == self.state.weights_like().dtype:
            self.state.set_weights(weights)
        else:
            self.state.assign(weights, derive_seed(step, "jump"))
        fresh = torch.empty(0, 0) if moments is None else moments
        self.state.optimizer.load(fresh, updates, self.state.parameters)
        self.state.updates = updates
        self._arrive(step)

    def shift(self, step: int, change: Tensor) -> None:
        """Make a change of the weights, float32 [n], part of the run as far as 8 bits say it, so
        that clients can be told of it in as many; the rest is made up for later
        (ledger/weight_deltas.py)."""
        seed, state = derive_seed(step, "shift"), self.state
        coded = self.deltas.encode(change, seed)
        position, digest = state.position, state.digest
        state.move(coded, seed)
        if not self.private_optimizer:
            state.forget_optimizer()
        self._arrive(step)
        shift = WeightDelta(step, position, digest, state.digest, coded)
        like = state.weights_like()
        self.deltas.keep(shift, like.numel() * like.dtype.itemsize)

    def descend(
        self, step: int, gradient: Dense, learning_rate: float, codec: str = "exact"
    ) -> None:
        """Make an update along a gradient part of the run; clients get the new weights only, or
        with codec = int8 their change."""
        self.private_optimizer = True
        if codec == "exact":
            self.state.update(gradient, learning_rate)
            self._arrive(step)
            return
        before = self.state.weights()
        self.state.update(gradient, learning_rate)
        change = self.state.weights().float() - before.float()
        self.state.set_weights(before)
        self.shift(step, change)

    def _arrive(self, step: int) -> None:
        self.ledger.jump(step, fingerprint(self.state.parameters))
        self.state.arrive(len(self.ledger), self.ledger.digest(), step)
        self._check_finite()

    def _check_finite(self) -> None:
        if not self.state.is_finite():
            raise DivergedError(
                "the client submodel's weights or optimizer state are not finite any more, "
                "training has diverged; lower client-learning-rate, or use aggregation = median "
                "if a client may be sending nonsense"
            )

    def catch_up(self, position: int, digest: str, stop: int, cause: Request) -> Request:
        """What brings a client that is at `position` to `stop` (or, by changes or a snapshot, to
        the end), so that it can answer `cause`: the entries or changes it lacks or a snapshot,
        whichever is fewer bytes. A client with another history starts over from its base
        checkpoint."""
        if passage := self.deltas.since(position, digest):
            return ApplyDeltas.of(passage, cause)  # kept as long as it is fewer bytes
        if not self.ledger.knows(position, digest):
            position = 0
        if self.ledger.start <= position:
            replay = CatchUp.of(self.ledger, position, stop, cause)
            if wire_bytes(replay) <= self.snapshot_bytes:
                return replay
        return Restore.of(self.snapshot(), cause)

    def snapshot(self) -> Snapshot:
        """The state at the end of the ledger; made once per position."""
        if self._snapshot is None or self._snapshot.digest != self.state.digest:
            now = self.state.snapshot()
            if self.private_optimizer:
                now = replace(now, updates=0, moments=torch.empty(0, 0))
            self._snapshot = now
        return self._snapshot

    def check(self, reply: Fingerprinted, who: str) -> None:
        """DriftError unless the client's submodel is this one wherever both know it; it says
        at which step the client went its own way."""
        agreed: int | None = None
        for position, found in zip(reply.positions, reply.fingerprints, strict=True):
            mark = self.state.trail.get(position)
            if mark is None:
                continue
            if mark.fingerprint == found:
                agreed = position
                continue
            raise DriftError(
                f"{who}: the client submodel drifted {self._where(position, agreed)}: at ledger "
                f"position {position} it has fingerprint {found}, the ledger gives "
                f"{mark.fingerprint}; its base checkpoint, memory or arithmetic differs"
            )

    def _where(self, position: int, agreed: int | None) -> str:
        step = self.state.trail[position].step
        if position == 0:
            return "before the first step"
        if agreed is None:
            return f"at or before step {step}"
        if agreed == position - 1:
            return f"at step {step}"
        return f"after step {self.state.trail[agreed].step} and by step {step}"
