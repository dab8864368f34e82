"""Zeroth-order federated learning of the whole model, without a split: DeComFL.

Dimension-free communication in federated learning, arXiv 2405.15861,
https://arxiv.org/abs/2405.15861, Algorithms 2 and 3. Every client holds the whole model, theta:
cut-layer is the number of blocks, and an auxiliary head (models/auxiliary_head.py) is the rest. One
round, local-steps = K, directions = P, with the same seeds for all clients:

    for k = 1..K  g_kp = (l(theta + mu z_kp) - l(theta)) / (P mu),
                  theta <- theta - eta sum_p g_kp z_kp
    the client takes its moves back and uploads the scalars g_kp; the server averages them;
    every client makes the averaged moves, those who were away when they are next asked

That is strategies/heron.py without a server to train; the server only evaluates, with the norm
and answer words that the ledger says. Of the LM head the answer words' rows are trained, apart
from the embedding they may be tied to.
"""

from hosl_flower.errors import ConfigError
from hosl_flower.privacy.accountant import epsilon
from hosl_flower.server.session import Session
from strategies.heron import Heron


class FullZo(Heron):
    """Per step and client: E * P scalars up and down, nothing else.

    Run-config keys: those of HO-SFL that are about clients, and dp-noise, dp-clip and dp-delta
    (privacy/dp_scalars.py). cut-layer must be the number of blocks.
    """

    name = "full-zo"
    keys = frozenset({
        "clients-per-step", "min-clients", "step-deadline", "directions", "epsilon",
        "perturbation", "client-seeds", "local-steps", "steps-per-message", "aggregation",
        "trim-fraction", "scalar-clip", "dp-noise", "dp-clip", "dp-delta", "client-optimizer",
        "client-learning-rate",
    })  # fmt: skip

    def check(self, session: Session) -> None:
        """ConfigError unless clients hold all blocks, and where epsilon cannot be computed."""
        if session.spec.cut_layer != session.base.blocks:
            raise ConfigError(
                f"{self.name} trains whole models on the clients: it needs cut-layer = "
                f"{session.base.blocks}, the number of blocks of {session.spec.model}"
            )
        if self.config.privacy.dp_noise:
            # whether it can be told
            epsilon(self.config.privacy.dp_noise, 1, self.config.privacy.dp_delta)

    def settle(self, session: Session) -> None:
        """The head that evaluates is the clients'."""
        session.server.adopt_head(session.history.state.parameters)

    def uploads(self, step: int) -> bool:
        """Never."""
        return False

    def activations_per_step(self) -> tuple[int, int]:
        """None."""
        return 0, 0
