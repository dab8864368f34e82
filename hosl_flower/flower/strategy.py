"""A Flower Strategy that runs a method: its rounds are training steps.

A step is several messages to and from each client, so `start` drives the method through a link
instead of Flower's configure and aggregate hooks.
"""

import logging
from typing import Any, NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from hosl_flower.errors import HoslError
from hosl_flower.flower.open_link import open_link
from hosl_flower.methods.method import Method
from hosl_flower.run.loop import train
from hosl_flower.run.recorder import Recorder
from hosl_flower.run.results import Results
from hosl_flower.run.run_log import RunLog, stop_announced
from hosl_flower.run.start import open_run, settings

log = logging.getLogger("hosl_flower")


class SplitStrategy(Strategy):
    """Runs a method on Flower.

    In a ServerApp:

        method = load_method(parse_config(context.run_config))
        SplitStrategy(method).start(grid)
    """

    def __init__(self, method: Method):
        self.method = method

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, run: str = "", **_: Any
    ) -> Result:
        """Run the method to its end.

        Model, steps and deadlines come from the run config; the weights stay in the run directory,
        so `initial_arrays` and `Result.arrays` are not used.

        Args:
            grid: Flower's grid.
            run: the run's id, which names it to clients.

        Returns:
            The evaluations, as `evaluate_metrics_clientapp` by step.
        """
        method, config = self.method, self.method.config
        # `flwr stop` sends a signal, and so does Flower to a ServerApp whose SuperLink has ended
        with (
            RunLog() as kept,
            stop_announced(kept, "flwr stop, or SuperLink is gone"),
            Recorder(config, kept) as report,
        ):
            session, checkpoint = open_run(method, run)
            link = open_link(
                grid,
                config,
                session.spec,
                session.history,
                session.limits,
                method.required_clients,
                method.needs_stream,
            )
            try:
                return _flower_result(train(method, session, link, report, checkpoint))
            finally:
                link.close()

    def summary(self) -> None:
        """Log the method and the settings that differ from the defaults, as Flower's users expect
        of a strategy."""
        log.info("%s", settings(self.method))

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
            f"{self.method.name} exchanges several messages per step and cannot be driven round by "
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
