"""A run on the server: what was agreed, the server submodel, the ledger, who holds what."""

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.config.run_config import RunConfig
from hosl_flower.data.encoders.base import ExampleEncoder
from hosl_flower.data.overlap import Overlap
from hosl_flower.errors import DriftError
from hosl_flower.ledger.new_state import load_client_half, new_state
from hosl_flower.models.base_model import Base
from hosl_flower.models.split import client_skeleton
from hosl_flower.models.submodels import AUXILIARY, ClientSubmodel, count
from hosl_flower.privacy.accountant import epsilon, most_uses
from hosl_flower.protocol.messages.describe import Described
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.server.aggregate import MEANS
from hosl_flower.server.history import History
from hosl_flower.server.participation import Participation
from hosl_flower.server.reference import NO_REFERENCE, Reference
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.tensors.activation_codec import encode_activations
from hosl_flower.tensors.device import torch_dtype
from hosl_flower.tensors.seeds import derive_seed, permutation
from hosl_flower.zo.estimator import clip

log = logging.getLogger("hosl_flower")


class Place(NamedTuple):
    """Where a run was before a step: its counters, and what tells whether parameters changed."""

    participation: Participation
    position: int
    versions: list[int]


@dataclass
class Session:
    """State of a run. reference: by which clients' numbers are judged; participation: counters of
    the clients."""

    config: RunConfig
    spec: ClientSpec
    notice: str
    base: Base
    encoder: ExampleEncoder
    server: ServerTrainer
    history: History
    required_clients: int
    reference: Reference = NO_REFERENCE
    participation: Participation = field(default_factory=Participation)
    overlap: Overlap | None = None  # of the scored held-out part with its training part
    sampled: Sequence[int] | None = None  # the clients of every step, where they are not drawn
    done: int = 0  # steps that were completed before this session began

    @property
    def limits(self) -> ReplyLimits:
        """What activations of this run may look like."""
        spec, answers = self.spec, self.encoder.answers
        held_out = [n for n in (spec.eval_examples, spec.held_out_examples) if n]
        return ReplyLimits(
            batch=max(spec.batch_size, spec.eval_batch_size) * answers.sequences,
            length=self.encoder.length,
            hidden=self.base.family.width(self.base.config, spec.cut_layer),
            dtype=spec.dtype,
            classes=len(spec.task.verbalizers) or 1,
            vocabulary=self.base.config.vocab_size if spec.task.target else 0,
            codec=spec.codec,
            each=answers.sequences,
            shortest=self.encoder.shortest,
            longest=answers.longest,
            private_labels=spec.labels == "client",
            label_counts=spec.tells_labels,
            update_codec=spec.update_codec,
            activation=self.reference.activation * (1 + 10 * spec.activation_noise),
            state_gradient=self.reference.head,
            step=self.reference.weight,
            scalar_step=math.inf if self._bounds_scalars else self.reference.weight,
            rate=self.config.client.learning_rate,
            **({"held_out": min(held_out)} if held_out else {}),
        )

    @property
    def _bounds_scalars(self) -> bool:
        """Whether a client's scalars are made harmless where they are merged."""
        return self.config.aggregation.scalar_clip > 0 or self.config.aggregation.rule not in MEANS

    @property
    def activation_bytes_per_token(self) -> int:
        """Bytes of one position's activation as the client sends it."""
        return self.limits.hidden * torch_dtype(self.spec.dtype).itemsize

    def place(self) -> Place:
        """Where the run is."""
        return Place(self.participation.mark(), len(self.history.ledger), self._versions())

    def return_to(self, place: Place) -> bool:
        """Take back what an unfinished step has counted; False when it has changed parameters,
        which cannot be taken back."""
        if len(self.history.ledger) != place.position or self._versions() != place.versions:
            return False
        self.participation.return_to(place.participation)
        return True

    def _versions(self) -> list[int]:
        """torch counts the changes of every tensor."""
        return [parameter._version for parameter in self.server.trained.values()]

    def note_overlap(self, described: Described) -> None:
        """Keep, and say once, how much of the held-out part about to be scored was trained on."""
        overlap = Overlap.from_flat(described.held_out_overlap)
        if overlap is not None and overlap.matters and overlap != self.overlap:
            log.warning("%s", overlap)
        self.overlap = overlap

    def at(self, step: int, partition: int) -> dict[str, Any]:
        """The fields every request has, for the ledger as it is now."""
        return {
            "step": step,
            "partition": partition,
            "position": len(self.history.ledger),
            "digest": self.history.ledger.digest(),
        }

    def for_wire(self, gradient: Tensor) -> dict[str, Any]:
        """A cut gradient's fields in a request: written by the run's codec, else in the dtype of
        the activations, with its scale. Cut gradients are small; scaled to at most 1 they do
        not underflow in 16 bits."""
        codec, dtype = self.spec.codec, torch_dtype(self.spec.dtype)
        if codec != "exact" or dtype == torch.float32:
            payload, scales = encode_activations(gradient, codec)
            return {"gradient": payload, "scales": scales, "scale": 1.0}
        scale = float(gradient.abs().max()) or 1.0
        return {"gradient": (gradient / scale).to(dtype), "scales": torch.empty(0), "scale": scale}

    def next_batch(self, partition: int) -> int:
        """Number of the client's next mini-batch: the client takes part."""
        return self.participation.next_batch(partition)

    def clip(self, step: int, partition: int, scalars: Tensor) -> Tensor:
        """A client's scalars, float32, within +-scalar-clip; how many were not is noted."""
        bounded = clip(scalars, self.config.aggregation.scalar_clip)
        if beyond := int((bounded != scalars).sum()):
            self.participation.clip(step, partition, beyond)
        return bounded

    def privacy(self, batches: int = 0) -> dict[str, Any] | None:
        """What differential privacy has cost each client: epsilon at dp-delta, and how often one of
        its examples was used, at most; None without. batches: mini-batches of each, instead of
        those served so far. ConfigError without an accountant."""
        config = self.config
        if not config.privacy.dp_noise:
            return None
        counts = self.participation
        uses = {
            str(p): most_uses(batches or counts.batches[p], config.batch_size, examples)
            + most_uses(counts.retaken, config.batch_size, examples)
            for p, examples in sorted(counts.train_examples.items())
        }
        costs = {
            n: epsilon(config.privacy.dp_noise, n, config.privacy.dp_delta)
            for n in set(uses.values())
        }
        return {
            "noise": config.privacy.dp_noise,
            "clip": config.privacy.dp_clip,
            "delta": config.privacy.dp_delta,
            "simulated": any(client.simulated_noise for client in counts.clients.values()),
            "epsilon": {p: costs[n] for p, n in uses.items()},
            "uses": uses,
        }

    def expel(self, step: int, partition: int, error: DriftError) -> None:
        """Leave a client out of the rest of the run. Raises the error when too few are left."""
        expelled = self.participation.expelled
        left = self.config.clients.count - len(expelled | {partition})
        if left < self.required_clients:
            raise error
        expelled.add(partition)
        self.participation.drop(step, partition, str(error))
        log.warning("the run goes on without client %d: %s", partition, error)

    def turn(self, step: int) -> int:
        """The partition that works at this step: clients take turns of turn-steps (relay)."""
        return (max(step, 1) - 1) // self.config.pace.turn_steps % self.config.clients.count

    def sample(self, step: int, absent: Collection[int] = ()) -> list[int]:
        """The K partitions of a step, ascending: drawn without replacement, by the seed and the
        step alone; the next in the draw stands in for one that is absent."""
        if self.sampled is not None:
            return list(self.sampled)
        count = self.config.clients.count
        order = permutation(count, derive_seed(self.config.seed, "clients", step))
        away = {*absent, *self.participation.expelled}
        there = [partition for partition in order if partition not in away]
        return sorted(there[: self.config.clients.sampled])

    def client_counts(self) -> tuple[int, int]:
        """(all, trainable) elements of the client submodel, without loading it."""
        trained = self.history.state.parameters
        auxiliary = {name: p for name, p in trained.items() if name.startswith(AUXILIARY)}
        return self._held + count(auxiliary), count(trained)

    @cached_property
    def _held(self) -> int:
        """Elements of the client submodel without an auxiliary head."""
        skeleton = client_skeleton(self.base.config, self.spec.cut_layer, self.spec.lora)
        return count(skeleton.canonical_parameters())

    def trained_client(self) -> ClientSubmodel:
        """The client submodel as it is now, made from the base checkpoint and the history."""
        submodel = load_client_half(self.base, self.spec, self.encoder.answers)
        new_state(submodel, self.spec).restore(self.history.snapshot())
        return submodel
