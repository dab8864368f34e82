"""HOSL: a zeroth-order client, a first-order server, the true loss as surrogate.

Hybrid-order split learning, arXiv 2601.10940, https://arxiv.org/abs/2601.10940, Algorithms 1-3.
One step, client parameters theta_c, server parameters theta_s, one mini-batch (x, y):

    1  for q = 1..Q: the client probes theta_c +- eps s_q and uploads both activations; the
       server, unchanged, answers with their losses                     (Alg. 1 L6-25, Alg. 2 L11)
       g_q = (L+ - L-) / (2 eps Q)                                      (Eq. 6-7)
    2  the client uploads clean activations; the server steps theta_s
       by back-propagation; no gradient goes down                      (Alg. 1 L27-30)
    3  the client regenerates each s_q from its seed:
       theta_c <- theta_c - eta_c sum_q g_q s_q                         (Alg. 1 L32-35, Alg. 3)

All probes and both gradients are taken at the same (theta_c, theta_s). With several clients
they take turns, as in split-learning relay; the client submodel is handed on as ledger
entries, never as weights. steps-per-message = S > 1 probes S mini-batches at the same theta_c; the
server still steps S times.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosl_flower.ledger.ledger import Entry
from hosl_flower.methods.method import Method
from hosl_flower.protocol.messages.activations import BatchKey, Forward, Probe, check_same_batch
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.ledger import Losses
from hosl_flower.server.kept_labels import KeptLabels, kept
from hosl_flower.server.link import Link
from hosl_flower.server.schedule import client_rate, rate_factor
from hosl_flower.server.session import Session
from hosl_flower.tensors.seeds import derive_seed
from hosl_flower.zo.estimator import probe_points, projected_gradients


class Probed(NamedTuple):
    """What a step has found: the loss of the clean forward, the losses [2Q] of the probes, the
    projected gradients [Q]."""

    loss: float
    losses: list[float]
    scalars: list[float]


class Hosl(Method):
    """Per step 2Q + 1 activations go up and 2Q losses come down.

    Run-config keys: directions (Q), epsilon, perturbation, client-learning-rate,
    client-trainable, server-learning-rate, server-optimizer, num-clients, turn-steps,
    scalar-clip.
    """

    name = "hosl"
    keys = frozenset({
        "turn-steps", "directions", "epsilon", "perturbation", "steps-per-message",
        "scalar-clip", "client-optimizer", "client-learning-rate", "server-trainable",
        "server-optimizer", "server-learning-rate", "server-gradient-clip",
    })  # fmt: skip
    keeps_labels = True

    def steps(self, session: Session, link: Link, steps: Sequence[int]) -> list[float]:
        """These steps, all probed at the client weights as they are now; the losses of the clean
        forwards."""
        requests: dict[int, list[Request]] = {}
        for step in steps:
            requests.setdefault(session.turn(step), []).extend(self.requests(session, step))
        replies = link.exchange(requests)
        clean = {r.step: r for own in requests.values() for r in own if type(r) is Forward}
        done = [
            self.step(
                session, step, replies[session.turn(step)], kept(session, link, [clean[step]])
            )
            for step in steps
        ]

        # 3: losses to the client, which updates itself; the ledger records the same update
        for step, probed in zip(steps, done, strict=True):
            self.update(session, link, step, probed)
        return [probed.loss for probed in done]

    def requests(self, session: Session, step: int) -> list[Request]:
        """The probes of a step, then the clean forward, all of one mini-batch."""
        client = session.turn(step)
        at, batch = session.at(step, client), session.next_batch(client)
        probes = [
            Probe(**at, batch=batch, seed=point.seed, coefficient=point.coefficient)
            for point in probe_points(self.seeds(step), self.config.zo.epsilon)
        ]
        return [*probes, Forward(**at, batch=batch)]

    def step(
        self, session: Session, step: int, replies: Iterator[Any], labels: KeptLabels | None
    ) -> Probed:
        """Phases 1 and 2 of Algorithm 1. labels: where they are, if they have not been sent."""
        server = session.server

        # 1: the surrogate is the true loss of the frozen server; one activation held at a time
        batches: list[BatchKey] = []
        losses: list[float] = []
        states: list[Tensor] = []
        for _ in range(2 * self.config.zo.directions):
            probe = next(replies)
            batches.append(BatchKey.of(probe))
            if labels is None:
                losses.append(server.loss(probe))
            else:
                states.append(server.states(probe))
            del probe
        if labels is not None:
            losses = labels.losses(states)
        scalars = projected_gradients(losses, self.config.zo.epsilon)

        # 2: first-order step of the server on the clean activations
        clean = next(replies)
        check_same_batch([*batches, BatchKey.of(clean)], step)
        loss = server.train_step(clean, rate_factor(self.config, step), labels)
        return Probed(loss, losses, scalars)

    def update(self, session: Session, link: Link, step: int, probed: Probed) -> None:
        """Phase 3: both sides make the same ledger entry."""
        config, history = session.config, session.history
        client, seeds = session.turn(step), tuple(self.seeds(step))
        at, rate = session.at(step, client), client_rate(config, step)
        scalars = session.clip(step, client, torch.tensor(probed.scalars))
        history.commit([Entry(step, seeds, tuple(scalars.tolist()), rate)])
        link.post(
            Losses(
                **at,
                seeds=seeds,
                losses=tuple(probed.losses),
                epsilon=config.zo.epsilon,
                learning_rate=rate,
                digest_after=history.ledger.digest(),
                clip=config.aggregation.scalar_clip,
            )
        )
        session.participation.took_part[client] += 1

    def seeds(self, step: int) -> list[int]:
        """Seeds [Q] of a step's directions."""
        config = self.config
        return [derive_seed(config.seed, "direction", step, q) for q in range(config.zo.directions)]

    def activations_per_step(self) -> tuple[int, int]:
        """2Q + 1 up, none down: the losses that come down are a few bytes per direction."""
        return 2 * self.config.zo.directions + 1, 0
