"""The Flower ServerApp: read the config, load the strategy it names, start it."""

import os

# Read by OpenMP when torch is loaded: client and server often compute at the same time on one
# machine, and threads that wait must not spin on the other's cores (tests/benchmarks/link.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import importlib
import inspect
import logging
import sys
from importlib.util import find_spec

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hosl_flower.config.parse import parse_config
from hosl_flower.config.run_config import RunConfig
from hosl_flower.data.infer_task import completed
from hosl_flower.errors import ConfigError, HoslError
from hosl_flower.methods.method import SplitStrategy
from hosl_flower.run.run_log import OneLine

app = ServerApp()

log = logging.getLogger("hosl_flower")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point of every simulation and deployment."""
    log_to_stderr()
    try:
        config = parse_config(context.run_config, "the run config")
        load_strategy(config).start(grid, run=str(context.run_id))
    except HoslError as error:
        # Flower logs a traceback and ends the run as failed; the line a reader needs comes first.
        log.error("run failed: %s: %s", type(error).__name__, error)
        raise


def load_strategy(config: RunConfig) -> SplitStrategy:
    """The strategy a config names; ConfigError when it is not there or not one."""
    return strategy_class(config.strategy)(completed(config))


def strategy_class(reference: str) -> type[SplitStrategy]:
    """What "module:class" refers to; ConfigError when it is not there or no strategy."""
    module_name, _, class_name = reference.partition(":")
    of_ours = find_spec("strategies." + module_name) if module_name.isidentifier() else None
    hint = f"; did you mean 'strategies.{reference}'?" if of_ours else ""
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"strategy = {reference!r} cannot be loaded ({error}); it must be "
            f"'module:class' of a package installed where the ServerApp runs{hint}"
        ) from error
    is_strategy = isinstance(cls, type) and issubclass(cls, SplitStrategy)
    if not is_strategy or inspect.isabstract(cls):
        raise ConfigError(f"strategy = {reference!r} is not a SplitStrategy with a step")
    return cls


def log_to_stderr() -> None:
    """Our own log lines, plain: Flower's stream carries stderr of the ServerApp."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(OneLine("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
