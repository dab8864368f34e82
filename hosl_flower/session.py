"""A run on the server: what was agreed, the server submodel, the ledger, who holds what."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from hosl_flower.client import Client
from hosl_flower.config import RunConfig
from hosl_flower.errors import CheckpointError
from hosl_flower.ledger import Ledger
from hosl_flower.messages import Described, Limits
from hosl_flower.server import Server
from hosl_flower.spec import ClientSpec, Resolved, pick_device, resolve, torch_dtype, use_threads
from hosl_flower.split import (
    Base,
    check_cut,
    client_skeleton,
    count,
    load_server,
    open_base,
    trainable_parameters,
)
from hosl_flower.tasks import Encoder, load_tokenizer

log = logging.getLogger("hosl_flower")


@dataclass
class Session:
    """State of a run. batches: mini-batches served so far, by partition."""

    config: RunConfig
    spec: ClientSpec
    notice: str
    base: Base
    encoder: Encoder
    server: Server
    ledger: Ledger
    clients: dict[int, Described] = field(default_factory=dict)
    batches: Counter[int] = field(default_factory=Counter)

    @property
    def limits(self) -> Limits:
        """What activations of this run may look like."""
        spec = self.spec
        return Limits(
            batch=max(spec.batch_size, spec.eval_batch_size),
            length=spec.max_length,
            hidden=self.base.config.hidden_size,
            dtype=spec.dtype,
            classes=len(spec.task.verbalizers),
        )

    @property
    def activation_bytes_per_token(self) -> int:
        """Bytes of one token's activation as the client sends it."""
        return self.base.config.hidden_size * torch_dtype(self.spec.dtype).itemsize

    def at(self, step: int, partition: int) -> dict[str, Any]:
        """The fields every request has, for the ledger as it is now."""
        return {
            "step": step,
            "partition": partition,
            "position": len(self.ledger),
            "digest": self.ledger.digest(),
        }

    def next_batch(self, partition: int) -> int:
        """Number of the client's next mini-batch."""
        number = self.batches[partition]
        self.batches[partition] += 1
        return number

    def turn(self, step: int) -> int:
        """The partition that works at this step: clients take turns of turn-steps (relay)."""
        return (max(step, 1) - 1) // self.config.turn_steps % self.config.num_clients

    def client_counts(self) -> tuple[int, int]:
        """(all, trainable) elements of the client submodel, without loading it."""
        skeleton = client_skeleton(self.base.config, self.spec.cut_layer)
        trainable = trainable_parameters(skeleton, self.spec.client_trainable)
        return count(skeleton.canonical_parameters()), count(trainable)

    def own_client(self) -> Client:
        """A client on the server, for central evaluation and merging. It starts from the base
        checkpoint; the first exchange brings it to the ledger's end."""
        return Client(self.spec)


def open_session(config: RunConfig, run: str) -> Session:
    """Settle, check and load everything on the server's side; raises a HoslError before any
    client is asked for anything."""
    use_threads(config.threads)
    resolved: Resolved = resolve(config, run)
    spec = resolved.spec
    for line in resolved.notice.splitlines():  # the first lines of the log: not to be missed
        log.warning(line)
    device = pick_device(config.device)
    base = open_base(spec.model, spec.seed)
    check_cut(base.config, spec.cut_layer)
    positions = base.config.max_position_embeddings
    if spec.max_length > positions:
        raise CheckpointError(f"max-length = {spec.max_length}, but {spec.model} has {positions}")
    encoder = Encoder(spec.task, load_tokenizer(spec.model), spec.max_length)
    encoder.check_vocabulary(base.config.vocab_size)
    submodel = load_server(base, spec.cut_layer, torch.float32, device)
    server = Server(
        submodel, encoder.verbalizer_ids, config.server_optimizer, config.server_learning_rate
    )
    ledger = Ledger(spec.genesis)
    return Session(config, spec, resolved.notice, base, encoder, server, ledger)
