"""HO-SFL: many zeroth-order clients, one first-order server, aggregation of scalars.

Hybrid-order split federated learning, arXiv 2603.14773, https://arxiv.org/abs/2603.14773. One
step, client parameters theta_c (the same on every client), server parameters theta_s:

    0  the server draws K of the N clients; those that missed steps are brought up to date
    1  each client m uploads clean activations z_m = f_c(x_m; theta_c), no graph
    2  the server takes one step on theta_s by sum_m w_m L_m, L_m = loss(f_s(z_m), y_m), and
       sends each client the gradient at the cut, lambda_m = dL_m / dz_m
    3  each client probes its own half, forward passes only, with P seeded directions:
       v_mp = <lambda_m, f_c(x_m; theta_c + eps s_p) - z_m> / (P eps)        (one-sided)
       and uploads P scalars (derivative = forward-mode: what that tends to as eps does to 0)
    4  v_p = sum_m w_m v_mp goes into the ledger; every client's optimizer takes the gradient
       sum_p v_p s_p, the sampled ones now, the others when they are next asked

lambda_m and the probes belong to the weights before step 2. lambda_m is the gradient of client
m's own loss: its weight enters once, in 4. (The published code divides by K in 2 and in 4, which
makes the client gradient K times too small.) No weights are ever sent. The paper weights clients
alike, w_m = 1/K (aggregation = mean); the default here is weighted-mean, by numbers of examples.

local-steps = E > 1: in 3 each client takes E local steps on its surrogate, lambda_m kept, and
uploads E * P scalars; each local step is aggregated and entered on its own. client-seeds =
per-client: every client has its own directions, and a step has K * P of them for the same
number of forward passes; the ledger gets (seed, w_m v_mp).

steps-per-message = S > 1: phases 1 and 3 of S steps are asked at once, so both are taken at
the client weights before the first of them; the server still steps S times. With S = 1 all is
as above. Over a stream a client gets lambda_m, and probes, as soon as its own activations are
through (server-micro-batch cuts them apart), while the server works on the others' and steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hosl_flower.ledger.ledger import Entry
from hosl_flower.methods.method import Method
from hosl_flower.protocol.messages.activations import Forward
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.scalars import CutGradient
from hosl_flower.server.aggregate import make_aggregate
from hosl_flower.server.cohort import Cohort, Question, absent
from hosl_flower.server.kept_labels import kept
from hosl_flower.server.link import Link
from hosl_flower.server.schedule import client_rate
from hosl_flower.server.session import Session
from hosl_flower.tensors.rounding import to_float32
from hosl_flower.tensors.seeds import derive_seed


class HoSfl(Method):
    """Per step and client: activations up, their gradient down, E * P scalars up and down.

    Run-config keys: num-clients (N), clients-per-step (K), min-clients, directions (P),
    epsilon, perturbation, client-seeds, local-steps (E), aggregation, scalar-clip,
    client-optimizer, server-micro-batch, and all that HOSL has except turn-steps.
    """

    name = "ho-sfl"
    keys = frozenset({
        "clients-per-step", "min-clients", "step-deadline", "directions", "epsilon",
        "derivative", "perturbation", "client-seeds", "local-steps", "steps-per-message",
        "aggregation", "trim-fraction", "scalar-clip", "activation-noise", "client-optimizer",
        "client-learning-rate", "server-trainable", "server-optimizer", "server-learning-rate",
        "server-gradient-clip", "server-micro-batch",
    })  # fmt: skip
    tolerates_absence = True
    request: type[CutGradient] = CutGradient
    keeps_labels = True
    anchors = True  # probes start from the clean activations

    def steps(self, session: Session, link: Link, steps: Sequence[int]) -> list[float]:
        """These steps, all of the clients' work at the weights as they are now; the weighted
        losses of the clean forwards."""
        away = absent(session, link)
        cohorts = [Cohort(session, step, session.sample(step, away)) for step in steps]
        losses, probed = self.probe(session, link, cohorts)

        # all answers first: they are about the weights before these steps
        updates = [self.merge(session, cohort, probed.answers(cohort)) for cohort in cohorts]
        for cohort, update in zip(cohorts, updates, strict=True):
            self.commit(session, cohort, update)
            cohort.done()
        return losses

    def merge(self, session: Session, cohort: Cohort, replies: dict[int, Any]) -> Any:
        """What the clients' answers amount to: one ledger entry per local step (4)."""
        scalars = torch.stack([replies[m].scalars for m in cohort.partitions])  # [K, E, P]
        return self.entries(session, cohort, scalars)

    def commit(self, session: Session, cohort: Cohort, update: Any) -> None:
        """Make what `merge` gave part of the run."""
        session.history.commit(update)

    def probe(
        self, session: Session, link: Link, cohorts: Sequence[Cohort]
    ) -> tuple[list[float], Question]:
        """Phases 1 to 3: the losses, and the clients' answers to their cut gradients."""
        forward, probe = Question(session, link), Question(session, link)

        # 1: clean activations
        asked: dict[int, dict[int, Forward]] = {}  # by step and client
        for cohort in cohorts:
            asked[cohort.step] = {
                m: self.forward_request(session, cohort.step, m) for m in cohort.partitions
            }
            forward.add(*asked[cohort.step].values())

        losses = []
        for cohort in cohorts:
            requests, clean = asked[cohort.step], forward.answers(cohort)
            labels = kept(session, link, requests.values())  # else they came with the activations

            # 2: the server propagates; 3: each client probes <lambda, f_c> once it has its lambda
            for m, gradient in cohort.cut_gradients(clean, labels):
                probe.send(self.ask(session, cohort.step, m, requests[m].batch, gradient))
            losses.append(cohort.step_server())
        return losses, probe

    def forward_request(self, session: Session, step: int, partition: int) -> Forward:
        """The request for clean activations of a client's next mini-batch."""
        at = self.at(session, step, partition)
        return Forward(**at, batch=session.next_batch(partition), anchor=self.anchors)

    def at(self, session: Session, step: int, partition: int) -> dict[str, Any]:
        """Where a client must be to answer."""
        return session.at(step, partition)

    def ask(
        self, session: Session, step: int, partition: int, batch: int, gradient: Tensor
    ) -> Request:
        """What a client is asked when its loss gradient at the cut is there."""
        config = session.config
        return self.request(
            **self.at(session, step, partition),
            batch=batch,
            directions=config.zo.directions,
            seeds=tuple(s for own in self.seeds(session, step, partition) for s in own),
            epsilon=config.zo.probe_distance,
            learning_rate=client_rate(config, step),
            **session.for_wire(gradient),
        )

    def seeds(self, session: Session, step: int, partition: int) -> list[list[int]]:
        """Seeds of a client's local steps: `[E][P]`."""
        config = session.config
        own = () if config.zo.client_seeds == "shared" else (partition,)
        return [
            [
                derive_seed(config.seed, "direction", step, e, p, *own)
                for p in range(config.zo.directions)
            ]
            for e in range(config.pace.local_steps)
        ]

    def entries(self, session: Session, cohort: Cohort, scalars: torch.Tensor) -> list[Entry]:
        """Ledger entries [E] of the clients' scalars [K, E, P], which are clipped first."""
        config, step, weights = session.config, cohort.step, cohort.weights
        each = zip(cohort.partitions, scalars, strict=True)
        scalars = torch.stack([session.clip(step, m, own) for m, own in each])
        seeds = {m: self.seeds(session, step, m) for m in cohort.partitions}
        aggregate = make_aggregate(config.aggregation.rule, config.aggregation.trim_fraction)
        rate, entries = client_rate(config, step), []
        for e in range(config.pace.local_steps):
            own = scalars[:, e]  # [K, P]
            if config.zo.client_seeds == "shared":
                directions = seeds[cohort.partitions[0]][e]
                values = aggregate(own, weights)
            else:
                directions = [seed for m in cohort.partitions for seed in seeds[m][e]]
                # the mean of K vectors along different directions is one longer list
                shares = torch.tensor(weights, dtype=torch.float64)
                values = (own.double() * shares.unsqueeze(1)).reshape(-1)
            rounded = tuple(map(to_float32, values.tolist()))
            entries.append(Entry(step, tuple(directions), rounded, rate))
        return entries

    def activations_per_step(self) -> tuple[int, int]:
        """K up, K cut gradients of the same size down."""
        return self.config.clients.sampled, self.config.clients.sampled
