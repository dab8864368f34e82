"""A server submodel that is trained without back-propagation, for the baselines that do so."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hosl_flower.config.run_config import RunConfig
from hosl_flower.optim.by_name import make_optimizer
from hosl_flower.optim.gradient import Seeded
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.server.trainer import ServerTrainer
from hosl_flower.zo.directions import Layout
from hosl_flower.zo.estimator import Point, estimate
from hosl_flower.zo.perturbed import perturbed


class ZoTrainer:
    """Zeroth-order steps of a server's trained parameters, with the client's estimator and
    optimizers; the server's own optimizer is not used.

    Run-config keys: epsilon, perturbation, server-optimizer, server-learning-rate.
    """

    def __init__(self, server: ServerTrainer, config: RunConfig):
        self.server, self.epsilon = server, config.zo.epsilon
        self.learning_rate = config.server.learning_rate
        shapes = {name: p.shape for name, p in server.trained.items()}
        self.layout = Layout(shapes, config.zo.perturbation)
        self.optimizer = make_optimizer(config.server.optimizer)

    def save_state(self) -> dict[str, Tensor]:
        """The optimizer's state: the parameters are the server's."""
        steps = torch.tensor(self.optimizer.steps)
        return {"moments": self.optimizer.save(self.server.trained), "steps": steps}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `save_state`."""
        self.optimizer.load(tensors["moments"], int(tensors["steps"]), self.server.trained)

    def step(self, batch: Activations, seeds: Sequence[int], factor: float = 1.0) -> list[float]:
        """One step along len(seeds) directions, probed on both sides; their projected gradients.
        factor: of the learning rate.

        Raises DivergedError when a loss is not finite.
        """

        def true_loss(points: Sequence[Point]) -> Iterator[float]:
            for point in points:
                direction = self.layout.draw(point.seed, self.server.device)
                with perturbed(self.server.trained, direction, point.coefficient):
                    yield self.server.loss(batch)

        scalars = estimate(true_loss, seeds, self.epsilon)
        gradient = Seeded(self.layout, seeds, scalars)
        self.optimizer.step(self.server.trained, gradient, self.learning_rate * factor)
        return scalars
