"""Sending a run's curves to TensorBoard, Weights & Biases or MLflow, through their own libraries.

A tracker is told the configuration once, numbers by step, and in the end the results. What a run
leaves in its own directory does not depend on trackers; one that fails in the middle is left out
with a line in the log, and training goes on.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hosl_flower.errors import ConfigError, first_line

log = logging.getLogger("hosl_flower")


class Tracker(Protocol):
    """One service. Made with (run directory, configuration keys)."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after a step."""

    def finish(self, values: Mapping[str, float]) -> None:
        """The final figures; nothing is logged after them."""


class TensorBoard:
    """Event files in the run directory: `tensorboard --logdir runs`."""

    def __init__(self, directory: Path, keys: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))
        rows = "\n".join(f"| {key} | {value!r} |" for key, value in keys.items())
        self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"final/{name}", value)
        self._writer.close()


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT, or hosl-flower; WANDB_MODE=offline keeps it local. One
    that is resumed is a second run there, of the same name."""

    def __init__(self, directory: Path, keys: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "hosl-flower"),
            name=directory.name,
            dir=str(directory),
            config=dict(keys),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))
        self._run.finish()


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, or hosl-flower, at MLFLOW_TRACKING_URI; a
    resumed one as above."""

    def __init__(self, directory: Path, keys: Mapping[str, Any]):
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "hosl-flower")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=directory.name).info.run_id
        for key, value in keys.items():
            self._client.log_param(self._id, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def finish(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, f"final/{name}", value)
        self._client.set_terminated(self._id)


# name -> (the module it needs, what makes it)
TRACKERS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "mlflow": ("mlflow", MLflow),
}


def check_trackers(names: tuple[str, ...]) -> None:
    """ConfigError for a name there is none of, or whose library is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"trackers: no {name!r}; there are {', '.join(TRACKERS)} and auto")
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise ConfigError(
                f"trackers = {name} needs a library that is not installed on the server; install "
                f"it with: pip install 'hosl-flower[{name}]'"
            )


class Trackers:
    """Those of a run. names: "auto" is TensorBoard if it is installed."""

    def __init__(self, names: tuple[str, ...], directory: Path, keys: Mapping[str, Any]):
        if names == ("auto",):
            installed = importlib.util.find_spec("tensorboard") is not None
            names = ("tensorboard",) if installed else ()
        check_trackers(names)
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, partial(self._start, name, directory, keys))

    def _start(self, name: str, directory: Path, keys: Mapping[str, Any]) -> None:
        self._open[name] = TRACKERS[name][1](directory, keys)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after a step, to all of them."""
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, step, values))

    def finish(self, values: Mapping[str, float]) -> None:
        """The final figures, to all of them."""
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.finish, values))
        self._open.clear()

    def _try(self, name: str, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # of any service, over any network: not worth a run
            self._open.pop(name, None)
            log.warning("%s is left out from here on: %s", name, first_line(error))
