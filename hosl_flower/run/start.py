"""Opening a run, and running it in this process without Flower."""

import logging
from dataclasses import replace

from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.methods.method import Method
from hosl_flower.privacy.noise_secret import simulated_secret
from hosl_flower.run.checkpoint import Checkpoint
from hosl_flower.run.loop import train
from hosl_flower.run.recorder import Recorder
from hosl_flower.run.results import Results
from hosl_flower.run.resume import find, restore
from hosl_flower.run.run_log import RunLog, stop_announced
from hosl_flower.server.in_process import InProcessLink
from hosl_flower.server.open_session import open_session
from hosl_flower.server.session import Session

log = logging.getLogger("hosl_flower")


def run_in_process(method: Method) -> Results:
    """Run a method without Flower, clients called directly: the same numbers, no network.

    Raises:
        ConfigError: for a config that cannot be run so.
    """
    if method.config.deadlines.step:
        raise ConfigError(
            "step-deadline is about clients that work side by side; in process they do so one "
            "after the other: leave it 0"
        )
    with RunLog() as kept, stop_announced(kept), Recorder(method.config, kept) as report:
        session, checkpoint = open_run(method, "in-process")
        client = Client(session.spec, secret=simulated_secret(session.spec.seed))
        link = InProcessLink(client.answer, session.history, session.limits)
        return train(method, session, link, report, checkpoint)


def open_run(method: Method, run: str) -> tuple[Session, Checkpoint | None]:
    """Load all that the server needs, and go to the checkpoint that the config resumes from.

    Args:
        method: the training method.
        run: the run's id, which names it to clients.

    Returns:
        The session, and the checkpoint it goes on from, without its tensors.
    """
    config = method.config
    checkpoint = find(config) if config.run.resume else None
    session = open_session(config, run, method.required_clients, method.client_head)
    method.check(session)
    if checkpoint is not None:
        restore(checkpoint, session, method)
        checkpoint = replace(checkpoint, tensors={})  # not to be held for the rest of the run
    log.info("%s", settings(method))
    return session, checkpoint


def settings(method: Method) -> str:
    """The method and the settings that differ from the defaults, in one line."""
    defaults = parse_config({}).as_keys()
    own = {k: v for k, v in method.config.as_keys().items() if v != defaults[k]}
    return f"{method.name} with {', '.join(f'{k}={v}' for k, v in own.items()) or 'defaults'}"
