"""The base of all strategies: a Flower Strategy whose rounds are training steps.

A step of split learning is a conversation, not one message per round, so `start` drives
`steps` through a Link instead of Flower's configure/aggregate hooks.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.config.run_config import RunConfig
from hosl_flower.errors import ConfigError, HoslError
from hosl_flower.flower.open_link import open_link
from hosl_flower.privacy.noise_secret import simulated_secret
from hosl_flower.run.loop import train
from hosl_flower.run.recorder import Report, log
from hosl_flower.run.results import Results
from hosl_flower.run.resume import find, restore
from hosl_flower.run.run_log import RunLog, stop_announced
from hosl_flower.server.in_process import InProcessLink
from hosl_flower.server.link import Link
from hosl_flower.server.open_session import open_session
from hosl_flower.server.session import Session

# keys a method must say it uses
_RARE = (
    "server-steps",
    "upload-every",
    "client-gradient",
    "derivative",
    "scalar-clip",
    "update-codec",
    "dp-noise",
    "dp-clip",
    "dp-delta",
)


class SplitStrategy(Strategy):
    """Subclass it with a `name`, `steps` and `activations_per_step`; see strategies/hosl.py.

    unused: run-config keys the method does not look at; setting one is an error, not a wish
    silently ignored. uses: keys that it does look at, of those few methods do. tolerates_absence:
    steps go on without clients that are not there. client_head: clients have an auxiliary head.
    client_optimizers: those it can use. keeps_labels: steps can do with losses and gradients of
    hidden states from the clients (labels = client).
    """

    name = "split"
    unused: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
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
        if config.labels == "client" and not self.keeps_labels:
            raise ConfigError(
                f"{self.name} needs labels on the server: labels = client is for HOSL, HO-SFL, "
                "split FO, the frozen client and what is made like them"
            )
        if config.client_optimizer not in self.client_optimizers:
            raise ConfigError(
                f"{self.name} has no client-optimizer = {config.client_optimizer}: it has "
                f"{', '.join(self.client_optimizers)}"
            )

    @classmethod
    def idle_keys(cls) -> list[str]:
        """Run-config keys that the method does not look at."""
        alone = () if cls.tolerates_absence else ("step-deadline",)  # nobody to go on without
        return [*cls.unused, *alone, *(key for key in _RARE if key not in cls.uses)]

    @property
    def required_clients(self) -> int:
        """How many clients must be there for the run to start."""
        config = self.config
        return config.min_clients if self.tolerates_absence else config.num_clients

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

    def check(self, session: Session) -> None:  # most methods fit every model
        """ConfigError where model and method do not go together, before training starts."""

    def settle(self, session: Session) -> None:  # most have nothing left to do
        """Called before every evaluation and before the model is saved."""

    def may_pause(self, step: int) -> bool:
        """Whether after this step the server knows all there is to know of the run."""
        return True

    def save_state(self) -> dict[str, Tensor]:
        """Tensors of the method's own that outlive a step, for a checkpoint: most have none."""
        return {}

    def load_state(self, session: Session, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `save_state`."""

    @abstractmethod
    def activations_per_step(self) -> tuple[int, int]:
        """How many activation-sized tensors [B, S, H] go (up, down) per step."""

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, run: str = "", **_: Any
    ) -> Result:
        """Run on Flower. Model, steps and deadlines come from the run config; the weights stay
        in the run directory, so `initial_arrays` and `Result.arrays` are not used."""
        # `flwr stop` sends a signal, and so does Flower to a ServerApp whose SuperLink has ended
        with (
            RunLog() as kept,
            stop_announced(kept, "flwr stop, or SuperLink is gone"),
            Report(self.config, kept) as report,
        ):
            session = self._open(run)
            link = open_link(
                grid,
                self.config,
                session.spec,
                session.history,
                session.limits,
                self.required_clients,
                self.needs_stream,
            )
            try:
                return _flower_result(train(self, session, link, report))
            finally:
                link.close()

    def run_in_process(self) -> Results:
        """The same run without Flower, clients called directly: same numbers, no network."""
        if self.config.step_deadline:
            raise ConfigError(
                "step-deadline is about clients that work side by side; in process they do so one "
                "after the other: leave it 0"
            )
        with RunLog() as kept, stop_announced(kept), Report(self.config, kept) as report:
            session = self._open("in-process")
            client = Client(session.spec, secret=simulated_secret(session.spec.seed))
            link = InProcessLink(client, session.history, session.limits)
            return train(self, session, link, report)

    def _open(self, run: str) -> Session:
        checkpoint = find(self.config) if self.config.resume else None
        session = open_session(self.config, run, self.required_clients, self.client_head)
        self.check(session)
        if checkpoint is not None:
            restore(checkpoint, session, self)
        self.summary()
        return session

    def summary(self) -> None:
        """Log the strategy and the settings that differ from the defaults."""
        defaults = parse_config({}).as_keys()
        own = {k: v for k, v in self.config.as_keys().items() if v != defaults[k]}
        log.info(
            "%s with %s", self.name, ", ".join(f"{k}={v}" for k, v in own.items()) or "defaults"
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Not used: see start."""
        self._refuse()

    def aggregate_train(
        self, server_round: int, replies: Any
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not used: see start."""
        self._refuse()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Not used: see start."""
        self._refuse()

    def aggregate_evaluate(self, server_round: int, replies: Any) -> MetricRecord | None:
        """Not used: see start."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise HoslError(
            f"{self.name} exchanges several messages per step and cannot be driven round by "
            "round; call strategy.start(grid), and do not wrap it in another strategy"
        )


def _flower_result(results: Results) -> Result:
    """Evaluations in the form Flower's users expect."""
    result = Result()
    for row in results.evaluations:
        metrics: dict[str, Any] = {k: float(v) for k, v in row.items() if v is not None}
        step = int(metrics.pop("step"))
        result.evaluate_metrics_clientapp[step] = MetricRecord(metrics)
    return result
