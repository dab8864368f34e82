"""The loop around a method's step: describe, plan, train, evaluate, save. No Flower here.

A method is anything with a `name` and a `step`; strategies/ has one per file.
"""

import logging
import math
import time
from typing import Protocol

from hosl_flower.client import Client
from hosl_flower.errors import DivergedError
from hosl_flower.ledger import check_fingerprint
from hosl_flower.link.base import Link
from hosl_flower.link.inprocess import InProcessLink
from hosl_flower.merge import save_merged
from hosl_flower.messages import (
    Activations,
    Describe,
    Described,
    Evaluate,
    Fingerprint,
    Fingerprinted,
)
from hosl_flower.report import Report, Results
from hosl_flower.server import Score
from hosl_flower.session import Session

log = logging.getLogger("hosl_flower")


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
    own = session.own_client()
    check_clients(session, link, own, 0)
    judge = link
    if config.evaluation == "central":
        judge = InProcessLink(own, session.ledger, session.limits)
    else:
        del own
    report.open(method, session)
    report.evaluated(0, evaluate(session, judge, 0), session.ledger)
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
            report.evaluated(step, evaluate(session, judge, step), session.ledger)
    return finish(method, session, link, report)


def describe(session: Session, link: Link, partition: int) -> Described:
    """What a client has; it shows by the way that it can load model, tokenizer and data."""
    (reply,) = link.exchange({partition: [Describe(**session.at(0, partition))]})[partition]
    assert isinstance(reply, Described)  # Link has checked it
    return reply


def evaluate(session: Session, link: Link, step: int) -> Score:
    """Score the held-out part through the split: client 0's, so that every evaluation of a run
    is about the same examples, also where clients have data of their own."""
    spec = session.spec
    batches = math.ceil(describe(session, link, 0).held_out_examples / spec.eval_batch_size)
    score = Score(len(spec.task.verbalizers))
    requests = [Evaluate(**session.at(step, 0), batch=number) for number in range(batches)]
    for reply in link.exchange({0: requests})[0]:
        assert isinstance(reply, Activations)  # Link has checked it
        session.server.score(reply, score)
    return score


def check_clients(session: Session, link: Link, own: Client, step: int) -> str:
    """Compare every client's submodel with the one base and ledger give on the server; the
    fingerprint they share. DriftError names the first that differs."""
    requests = {
        partition: [Fingerprint(**session.at(step, partition))]
        for partition in range(session.config.num_clients)
    }
    (expected,) = InProcessLink(own, session.ledger, session.limits).exchange({0: requests[0]})[0]
    assert isinstance(expected, Fingerprinted)  # Link has checked it
    for partition, replies in link.exchange(requests).items():
        (reply,) = replies
        assert isinstance(reply, Fingerprinted)
        who = link.describe_client(partition)
        check_fingerprint(expected.fingerprint, reply.fingerprint, who, len(session.ledger))
    return expected.fingerprint


def finish(method: Method, session: Session, link: Link, report: Report) -> Results:
    """Check the client submodels against the ledger, merge, write what the run leaves behind."""
    own = session.own_client()
    fingerprint = check_clients(session, link, own, session.config.steps)
    if session.config.save_model:
        save_merged(
            report.directory / "model",
            session.base,
            own.submodel.canonical_parameters(),
            session.server.state_dict(),
            session.encoder.tokenizer,
        )
    return report.close(method, session, link.traffic, fingerprint)
