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
entries, never as weights.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from hosl_flower.checks import BatchKey, check_same_batch
from hosl_flower.ledger import Entry
from hosl_flower.link.base import Link
from hosl_flower.messages import Forward, Losses, Probe
from hosl_flower.perturb import derive_seed
from hosl_flower.session import Session
from hosl_flower.strategy import SplitStrategy
from hosl_flower.zo import Point, estimate, probe_points


class Hosl(SplitStrategy):
    """Per step 2Q + 1 activations go up and 2Q losses come down.

    Run-config keys: directions (Q), epsilon, perturbation, client-learning-rate,
    client-trainable, server-learning-rate, server-optimizer, num-clients, turn-steps.
    """

    name = "hosl"
    unused = (
        "clients-per-step",
        "min-clients",
        "client-seeds",
        "local-steps",
        "aggregation",
        "trim-fraction",
        "server-micro-batch",
    )

    def step(self, session: Session, link: Link, step: int) -> float:
        """One step of Algorithm 1; the loss of the clean forward."""
        config, server, history = session.config, session.server, session.history
        client = session.turn(step)
        batch = session.next_batch(client)
        at = session.at(step, client)
        seeds = [derive_seed(config.seed, "direction", step, q) for q in range(config.directions)]
        points = probe_points(seeds, config.epsilon)
        probes = [
            Probe(**at, batch=batch, seed=point.seed, coefficient=point.coefficient)
            for point in points
        ]
        replies: Iterator[Any] = link.exchange({client: [*probes, Forward(**at, batch=batch)]})[
            client
        ]

        # 1: the surrogate is the true loss of the frozen server; one activation held at a time
        losses: list[float] = []
        batches: list[BatchKey] = []

        def true_loss(points: Sequence[Point]) -> Iterator[float]:
            for _ in points:
                reply = next(replies)
                batches.append(BatchKey.of(reply))
                losses.append(server.loss(reply))
                yield losses[-1]

        scalars = estimate(true_loss, seeds, config.epsilon)

        # 2: first-order step of the server on the clean activations
        clean = next(replies)
        check_same_batch([*batches, BatchKey.of(clean)], step)
        loss = server.train_step(clean)

        # 3: losses to the client, which updates itself; the ledger records the same update
        rate = config.client_learning_rate
        history.commit([Entry(step, tuple(seeds), tuple(scalars), rate)])
        link.post(
            Losses(
                **at,
                seeds=tuple(seeds),
                losses=tuple(losses),
                epsilon=config.epsilon,
                learning_rate=rate,
                digest_after=history.ledger.digest(),
            )
        )
        session.took_part[client] += 1
        return loss

    def activations_per_step(self) -> tuple[int, int]:
        """2Q + 1 up, none down: the losses that come down are a few bytes per direction."""
        return 2 * self.config.directions + 1, 0
