"""The base class of all training methods. A method knows no Flower: a link carries its requests.

A step of split learning is an exchange of several messages with each client, so a method is driven
step by step by the loop (run/loop.py), not round by round.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from hosl_flower.config.parse import parse_config
from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError
from hosl_flower.server.link import Link
from hosl_flower.server.session import Session

# run-config keys that some methods use and others do not
_SPECIAL = (
    "clients-per-step", "min-clients", "turn-steps", "directions", "epsilon", "derivative",
    "perturbation", "client-seeds", "local-steps", "server-steps", "upload-every",
    "steps-per-message", "aggregation", "trim-fraction", "scalar-clip", "activation-noise",
    "dp-noise", "dp-clip", "dp-delta", "client-gradient", "client-optimizer",
    "client-learning-rate", "server-trainable", "server-optimizer", "server-learning-rate",
    "server-gradient-clip", "server-micro-batch", "step-deadline", "update-codec",
)  # fmt: skip


class Method(ABC):
    """A training method. Subclass it with a `name`, its `keys`, `steps` and `activations_per_step`.

    See strategies/hosl.py. Register a class of your own in the entry-point group
    `hosl_flower.strategies`, and it is found by its name.

    Attributes:
        name: the name that results carry.
        keys: the run-config keys that the method uses, besides those that all methods use. Setting
            another key that only some methods use is an error.
        tolerates_absence: steps go on without clients that are not there.
        client_head: clients have an auxiliary head.
        client_optimizers: the values of client-optimizer that the method can use.
        keeps_labels: steps can use losses and gradients of hidden states that clients compute
            (labels = client).
    """

    name: ClassVar[str]
    keys: ClassVar[frozenset[str]] = frozenset()
    client_head = False
    keeps_labels = False
    tolerates_absence = False
    client_optimizers: tuple[str, ...] = ("sgd", "adamw")  # those that replay a ledger to the bit

    def __init__(self, config: RunConfig):
        self.config = config
        defaults = parse_config({"dtype": config.dtype}).as_keys()
        idle = [k for k in self.idle_keys() if config.as_keys()[k] != defaults[k]]
        if idle:
            raise ConfigError(
                f"{self.name} does not use {', '.join(idle)}: leave it at its default"
            )
        if config.task.labels == "client" and not self.keeps_labels:
            raise ConfigError(
                f"{self.name} needs labels on the server: labels = client is for HOSL, HO-SFL, "
                "split FO, the frozen client and what is made like them"
            )
        if config.client.optimizer not in self.client_optimizers:
            raise ConfigError(
                f"{self.name} has no client-optimizer = {config.client.optimizer}: it has "
                f"{', '.join(self.client_optimizers)}"
            )

    @classmethod
    def idle_keys(cls) -> list[str]:
        """Run-config keys that this method does not use, though other methods do."""
        return [key for key in _SPECIAL if key not in cls.keys]

    @property
    def required_clients(self) -> int:
        """How many clients must be there for the run to start."""
        config = self.config
        return config.clients.minimum if self.tolerates_absence else config.clients.count

    @property
    def needs_stream(self) -> bool:
        """Whether clients keep state between requests that is in no ledger."""
        return False

    @abstractmethod
    def steps(self, session: Session, link: Link, steps: Sequence[int]) -> list[float]:
        """Consecutive training steps over the link; their training losses.

        One at a time unless steps-per-message says otherwise: then clients do their part of all
        of them at the weights before the first.
        """

    def check(self, session: Session) -> None:  # noqa: B027  # most methods fit every model
        """ConfigError where model and method do not go together, before training starts."""

    def settle(self, session: Session) -> None:  # noqa: B027  # most have nothing left to do
        """Called before every evaluation and before the model is saved."""

    def may_pause(self, step: int) -> bool:
        """Whether after this step the server knows all there is to know of the run."""
        return True

    def save_state(self) -> dict[str, Tensor]:
        """Tensors of the method's own that outlive a step, for a checkpoint: most have none."""
        return {}

    def load_state(  # noqa: B027  # nor to load
        self, session: Session, tensors: Mapping[str, Tensor]
    ) -> None:
        """The inverse of `save_state`."""

    @abstractmethod
    def activations_per_step(self) -> tuple[int, int]:
        """How many activation-sized tensors [B, S, H] go (up, down) per step."""
