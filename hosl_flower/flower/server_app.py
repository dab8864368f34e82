"""The Flower ServerApp: read the config, load the method it names, start it."""

import os

# Read by OpenMP when torch is loaded: client and server often compute at the same time on one
# machine, and threads that wait must not spin on the other's cores (tests/benchmarks/link.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hosl_flower.config.parse import parse_config
from hosl_flower.errors import HoslError
from hosl_flower.flower.strategy import SplitStrategy
from hosl_flower.methods.load import load_method
from hosl_flower.run.run_log import log_to_stderr

app = ServerApp()

log = logging.getLogger("hosl_flower")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point of every simulation and deployment."""
    log_to_stderr()
    try:
        method = load_method(parse_config(context.run_config, "the run config"))
        SplitStrategy(method).start(grid, run=str(context.run_id))
    except HoslError as error:
        # Flower logs a traceback and ends the run as failed; the line a reader needs comes first.
        log.error("run failed: %s: %s", type(error).__name__, error)
        raise
