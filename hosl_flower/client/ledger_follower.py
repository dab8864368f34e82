"""How a client follows the run: its own copy of what is trained, brought along the ledger."""

from collections.abc import Callable
from typing import Any

import torch

from hosl_flower.client.work import Work
from hosl_flower.errors import DriftError, ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.ledger.ledger import Entry, chain, chain_entries, fingerprint
from hosl_flower.protocol.messages.base import Behind, Reply
from hosl_flower.protocol.messages.gradients import Adopt
from hosl_flower.protocol.messages.ledger import Applied, ApplyDeltas, CatchUp, Losses, Restore
from hosl_flower.tensors.seeds import derive_seed
from hosl_flower.zo.estimator import clip, projected_gradients

UNKNOWN = "0" * 16  # a digest that no ledger has
ReplyParts = tuple[type[Reply], dict[str, Any]]  # kind of reply and its own fields


class LedgerFollower:
    """The position of a client in the ledger. Every method that takes a request answers one that
    moves the client there, which changes all of it or nothing that is relied on.

    Args:
        work: the client's submodel and state.
    """

    def __init__(self, work: Work):
        self.work = work

    @property
    def state(self) -> ClientState:
        """Trained parameters, optimizer and position."""
        return self.work.state

    def adopt(self, request: Adopt) -> ReplyParts:
        """The weights the client has come to by itself are everybody's."""
        own = fingerprint(self.state.parameters)
        if own != request.weights:
            raise DriftError(
                f"step {request.step}: this client's weights have fingerprint {own}, those it sent "
                f"{request.weights}"
            )
        self.state.arrive(request.position + 1, request.digest_after, request.step)
        self.work.local_weights.clear()
        return self.applied()

    def update(self, request: Losses) -> ReplyParts:
        """Phase 3 of HOSL: regenerate each direction from its seed, step along it."""
        scalars = torch.tensor(projected_gradients(request.losses, request.epsilon))
        bounded = tuple(clip(scalars, request.clip).tolist())
        entry = Entry(request.step, request.seeds, bounded, request.learning_rate)
        digest = chain(self.state.digest, entry.pack())
        if digest != request.digest_after:
            raise DriftError(
                f"step {request.step}: this client's update gives ledger {digest}, "
                f"the server's {request.digest_after}"
            )
        self.apply([entry])
        return self.applied()

    def already_applied(self, request: Losses | Adopt) -> bool:
        """Whether this update has been made: by another partition of this process, or the receipt
        was lost."""
        if self.state.position == request.position + 1:
            return self.state.digest == request.digest_after
        return self.state.position > request.position

    def catch_up(self, request: CatchUp, start_over: Callable[[], "LedgerFollower"]) -> ReplyParts:
        """Apply what is missing of the entries; what was applied already must be the same.

        start_over: goes back to the base checkpoint and returns the follower that is there then.
        """
        entries, state = request.entries, self.state  # validated before anything is lost
        digests = chain_entries(request.digest, entries)
        done = state.position - request.position
        known = 0 <= done < len(digests) and digests[done] == state.digest
        if not (known and self.work.local_weights.at_shared):
            if request.position:
                return Behind, {"position": state.position, "digest": state.digest}
            del state  # its weights go before those of the base checkpoint come
            return start_over().from_the_start(request, entries)  # another history
        self.apply(entries[done:])
        return self.applied()

    def from_the_start(self, request: CatchUp, entries: list[Entry]) -> ReplyParts:
        """Apply a whole history to the base checkpoint."""
        if self.state.digest != request.digest:
            raise ProtocolError("catch-up: the entries are of another run")
        self.apply(entries)
        return self.applied()

    def move(self, request: ApplyDeltas) -> ReplyParts:
        """Make what is missing of the changes; that the weights are the server's then, fingerprints
        tell."""
        state, changes = self.state, request.changes(self.state.rows)  # before anything is lost
        digests = (request.digest, *request.digests)
        done = state.position - request.position
        known = 0 <= done < len(digests) and digests[done] == state.digest
        if not (known and self.work.local_weights.at_shared):
            return Behind, {"position": state.position, "digest": state.digest}
        self.work.moved()
        self.work.local_weights.clear()
        try:
            with self.work.phase("exchange", state.elements, request.values):
                for step, digest, change in changes[done:]:
                    state.move(change, derive_seed(step, "shift"))
                    state.land(state.position + 1, digest, step)
                state.forget_optimizer()
        except BaseException:
            state.land(0, UNKNOWN, request.step)  # half moved: nobody's weights
            raise
        return self.applied()

    def restore(self, request: Restore) -> ReplyParts:
        """Become what the server's copy is, whatever there was before."""
        here = (self.state.position, self.state.digest) == (request.position, request.digest)
        if not (here and self.work.local_weights.at_shared):
            self.work.moved()
            tensors = (request.weights, request.moments)
            try:
                with self.work.phase("exchange", self.state.elements, *tensors):
                    self.state.restore(request.snapshot, request.step)
            except ValueError as error:
                raise ProtocolError(f"restore: {error}") from error
            self.work.local_weights.clear()
        return self.applied()

    def apply(self, entries: list[Entry]) -> None:
        """Make the updates of ledger entries that follow on the position."""
        if entries:
            self.work.moved()
            self.work.local_weights.clear()
            directions = max(len(entry.seeds) for entry in entries)
            with self.work.phase("update", directions):
                self.state.apply(entries)

    def applied(self) -> ReplyParts:
        """The receipt: where the client is now."""
        return Applied, {"position": self.state.position, "digest": self.state.digest}
