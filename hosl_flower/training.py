"""The loop around a method's step: describe, plan, train, evaluate, save. No Flower here.

A method is anything with a `name` and a `step`; strategies/ has one per file.
"""

import logging
import math
import time
from typing import Protocol

from hosl_flower.errors import DivergedError
from hosl_flower.ledger import check_fingerprint
from hosl_flower.link.base import Link
from hosl_flower.link.inprocess import InProcessLink
from hosl_flower.merge import save_merged
from hosl_flower.messages import Describe, Described, Evaluate, Fingerprint, Fingerprinted
from hosl_flower.report import Report, Results
from hosl_flower.server import Score
from hosl_flower.session import Session

log = logging.getLogger("hosl_flower")

_EXCHANGE_BYTES = 64 << 20  # activations that one evaluation exchange may carry


class Method(Protocol):
    """A training method, as this loop sees it."""

    name: str

    def step(self, session: Session, link: Link, step: int) -> float:
        """One training step; the training loss."""

    def activations_per_step(self) -> tuple[int, int]:
        """How many activation-sized tensors [B, S, H] go (up, down) per step."""


def train(method: Method, session: Session, link: Link, report: Report) -> Results:
    """Run a method from the first step to the saved model; what is in results.json."""
    config = session.config
    for partition in range(config.num_clients):
        session.clients[partition] = describe(session, link, partition)
    judge = link
    if config.evaluation == "central":
        judge = InProcessLink(session.own_client(), session.ledger, session.limits)
    report.open(method, session)
    report.evaluated(0, evaluate(session, judge, 0))
    for step in range(1, config.steps + 1):
        started = time.perf_counter()
        waited, computed = link.traffic.waited_seconds, link.traffic.client_seconds
        try:
            loss = method.step(session, link, step)
        except DivergedError as error:
            raise DivergedError(f"step {step}: {error}") from error
        report.stepped(
            step,
            loss,
            wall=time.perf_counter() - started,
            waited=link.traffic.waited_seconds - waited,
            client=link.traffic.client_seconds - computed,
        )
        if step % config.eval_every == 0 or step == config.steps:
            link.flush()
            report.evaluated(step, evaluate(session, judge, step))
    return finish(method, session, link, report)


def describe(session: Session, link: Link, partition: int) -> Described:
    """What a client has; it shows by the way that it can load model, tokenizer and data."""
    (reply,) = link.exchange({partition: [Describe(**session.at(0, partition))]})[partition]
    assert isinstance(reply, Described)  # Link has checked it
    return reply


def evaluate(session: Session, link: Link, step: int) -> Score:
    """Score the held-out part through the split, on the client whose turn it is."""
    partition = session.turn(step)
    spec = session.spec
    held_out = describe(session, link, partition).held_out_examples
    batches = math.ceil(held_out / spec.eval_batch_size)
    tokens = spec.eval_batch_size * spec.max_length
    chunk = max(1, _EXCHANGE_BYTES // (tokens * session.activation_bytes_per_token))
    score = Score(len(spec.task.verbalizers))
    at = session.at(step, partition)
    for start in range(0, batches, chunk):
        numbers = range(start, min(start + chunk, batches))
        requests = [Evaluate(**at, batch=number) for number in numbers]
        for reply in link.exchange({partition: requests})[partition]:
            session.server.score(reply, score)  # type: ignore[arg-type]
    return score


def finish(method: Method, session: Session, link: Link, report: Report) -> Results:
    """Check the client submodel against the ledger, merge, write what the run leaves behind."""
    partition = session.turn(session.config.steps)
    found = _fingerprint(session, link, partition)
    own = session.own_client()
    expected = _fingerprint(session, InProcessLink(own, session.ledger, session.limits), partition)
    check_fingerprint(expected, found, link.describe_client(partition), len(session.ledger))
    if session.config.save_model:
        save_merged(
            report.directory / "model",
            session.base,
            own.submodel.canonical_parameters(),
            session.server.state_dict(),
            session.encoder.tokenizer,
        )
    return report.close(method, session, link.traffic, found)


def _fingerprint(session: Session, link: Link, partition: int) -> str:
    request = Fingerprint(**session.at(session.config.steps, partition))
    (reply,) = link.exchange({partition: [request]})[partition]
    assert isinstance(reply, Fingerprinted)  # Link has checked it
    return reply.fingerprint
