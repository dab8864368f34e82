"""Zeroth-order split learning on both sides: the ZO baseline of the hybrid-order papers.

The client is HOSL's (strategies/hosl.py, arXiv 2601.10940): it probes the true loss. The server
is zeroth-order too, and may take tau steps to a step of the client, as in MU-SplitFed (arXiv
2510.21155), where that lets slow clients hold up less. One step:

    1  the client uploads clean activations; tau times the server probes its own parameters with
       Q directions u_q and steps,                         theta_s <- theta_s - eta_s sum_q g_q u_q
       g_q = (L(theta_s + eps u_q) - L(theta_s - eps u_q)) / (2 eps Q)
    2  the client probes theta_c +- eps s_q and uploads the activations; the server, as it is now,
       answers with their losses
    3  theta_c <- theta_c - eta_c sum_q g_q s_q

Clients take turns as HOSL's do, where MU-SplitFed averages weights with a global learning rate.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hosl_flower.protocol.messages.activations import BatchKey, Forward, Probe, check_same_batch
from hosl_flower.protocol.messages.base import Request
from hosl_flower.server.kept_labels import KeptLabels
from hosl_flower.server.schedule import rate_factor
from hosl_flower.server.session import Session
from hosl_flower.server.zo_trainer import ZoTrainer
from hosl_flower.tensors.seeds import derive_seed
from hosl_flower.zo.estimator import probe_points, projected_gradients
from strategies.hosl import Hosl, Probed


class SplitZo(Hosl):
    """Per step 2Q + 1 activations go up and 2Q losses come down.

    Run-config keys: as HOSL's, and server-steps (tau); server-optimizer and server-learning-rate
    are those of the server's zeroth-order steps, directions and epsilon those of both sides.
    """

    name = "split-zo"
    keys = Hosl.keys - {"server-gradient-clip"} | {"server-steps"}  # the server has no gradient
    keeps_labels = False  # the server's own probes ask for its losses more often
    server: ZoTrainer | None = None

    def zo_server(self, session: Session) -> ZoTrainer:
        """The session's server, trained without back-propagation."""
        if self.server is None or self.server.server is not session.server:
            self.server = ZoTrainer(session.server, self.config)
        return self.server

    def save_state(self) -> dict[str, Tensor]:
        """Of the server's zeroth-order optimizer."""
        return self.server.save_state() if self.server else {}

    def load_state(self, session: Session, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `save_state`."""
        self.zo_server(session).load_state(tensors)

    def requests(self, session: Session, step: int) -> list[Request]:
        """The clean forward first: the server moves before it answers the probes."""
        client = session.turn(step)
        at, batch = session.at(step, client), session.next_batch(client)
        points = probe_points(self.seeds(step), self.config.zo.epsilon)
        probes = [
            Probe(**at, batch=batch, seed=point.seed, coefficient=point.coefficient)
            for point in points
        ]
        return [Forward(**at, batch=batch), *probes]

    def step(
        self, session: Session, step: int, replies: Iterator[Any], labels: KeptLabels | None
    ) -> Probed:
        """Phases 1 and 2."""
        config, server = self.config, self.zo_server(session)
        clean = next(replies)
        loss = session.server.loss(clean)
        for turn in range(config.server.steps):
            seeds = [
                derive_seed(config.seed, "server-direction", step, turn, q)
                for q in range(config.zo.directions)
            ]
            server.step(clean, seeds, rate_factor(config, step))
        batches, losses = [BatchKey.of(clean)], []
        del clean
        for _ in range(2 * config.zo.directions):  # one activation held at a time
            probe = next(replies)
            batches.append(BatchKey.of(probe))
            losses.append(session.server.loss(probe))
        check_same_batch(batches, step)
        return Probed(loss, losses, projected_gradients(losses, config.zo.epsilon))
