"""The loop around a method's step: describe, plan, train, evaluate, save. No Flower here.

A method is anything with a `name` and `steps`; strategies/ has one per file.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hosl_flower.client.client import Client
from hosl_flower.errors import (
    AbsentError,
    ClientError,
    DivergedError,
    DriftError,
    HoslError,
    OutOfRangeError,
    ProtocolError,
)
from hosl_flower.methods.method import Method
from hosl_flower.models.lora import save_adapters
from hosl_flower.models.save_merged import save_merged
from hosl_flower.models.submodels import count, trainable_parameters
from hosl_flower.protocol.messages.describe import Describe, Described
from hosl_flower.protocol.messages.ledger import Fingerprint, Fingerprinted
from hosl_flower.run.checkpoint import Checkpoint
from hosl_flower.run.ending import warn_of_room
from hosl_flower.run.recorder import Recorder
from hosl_flower.run.results import Results
from hosl_flower.run.resume import earlier_traffic
from hosl_flower.server.evaluate import score_batches
from hosl_flower.server.in_process import InProcessLink
from hosl_flower.server.link import Link
from hosl_flower.server.scores import HeldOut
from hosl_flower.server.session import Session
from hosl_flower.tensors.raw_bytes import LARGEST_LOSS, not_finite

log = logging.getLogger("hosl_flower")

_DIVERGED = "training has diverged: lower server-learning-rate or client-learning-rate"


_MANY = 100  # clients, of which it takes long to hear


def train(
    method: Method,
    session: Session,
    link: Link,
    report: Recorder,
    checkpoint: Checkpoint | None = None,
) -> Results:
    """Run a method to the saved model, from the first step or from where a checkpoint left it;
    what is in results.json."""
    config, first = session.config, session.done + 1
    if checkpoint is not None:
        link.traffic = earlier_traffic(checkpoint)
    describe_all(session, link)
    check_clients(session, link, session.participation.clients, session.done)
    judge = judge_of(session, link)
    report.open(method, session, checkpoint)
    if config.run.save_model:
        warn_of_room(report.directory, bytes_needed(session))
    if checkpoint is None:
        method.settle(session)
        report.evaluated(0, evaluate(session, judge, 0), session)
    saved = session.done
    for steps in grouped(
        config.steps, config.pace.steps_per_message, config.evaluation.every, first
    ):
        started = time.perf_counter()
        waited, computed = link.traffic.waited_seconds, link.traffic.client_seconds
        try:
            with rescued(method, session, link, report, steps[0] - 1, saved):
                losses = method.steps(session, link, steps)
        except DivergedError as error:
            raise DivergedError(f"step {_span(steps)}: {error}") from error
        except OutOfRangeError as error:  # of a client the step cannot do without
            raise DivergedError(f"{error}; {_DIVERGED}") from error
        spent = {
            "wall": time.perf_counter() - started,
            "waited": link.traffic.waited_seconds - waited,
            "client": link.traffic.client_seconds - computed,
        }
        each = {part: seconds / len(steps) for part, seconds in spent.items()}
        for step, loss in zip(steps, losses, strict=True):
            report.stepped(step, loss, session, **each)
        if step % config.evaluation.every == 0 or step == config.steps:
            link.flush()
            late = link.late()  # they are checked when they are back
            check_clients(session, link, session.participation.unchecked - late, step)
            session.participation.unchecked &= late
            method.settle(session)
            report.evaluated(step, evaluate(session, judge, step), session)
        due = 0 < config.run.checkpoint_every <= step - saved
        if due and step < config.steps and method.may_pause(step):
            report.checkpoint(step, session, method, link.traffic)
            saved = step
    if report.final is None:  # resumed after the last step, for files that were not written
        method.settle(session)
        report.final = evaluate(session, judge, config.steps)
    return finish(method, session, link, report)


def judge_of(session: Session, link: Link) -> Link:
    """Where evaluations are asked for: of the clients, or, centrally, of data of the server's own,
    labels and all."""
    if session.config.evaluation.mode == "split":
        return link
    limits = replace(session.limits, private_labels=False, label_counts=True)
    spec = replace(session.spec, labels="server", activation_noise=0.0, dp_noise=0.0)
    return InProcessLink(Client(spec).answer, session.history, limits)


@contextlib.contextmanager
def rescued(
    method: Method, session: Session, link: Link, report: Recorder, done: int, saved: int
) -> Iterator[None]:
    """A step that fails before it has changed anything, as most do that lack clients, loses none
    of those before it: there is a checkpoint of the last one. But none of a run that has diverged:
    what led there is in its state, finite as it may be, and the checkpoints before are better."""
    place = session.place()
    try:
        yield
    except (DivergedError, OutOfRangeError):
        raise
    except HoslError as error:
        wanted = session.config.run.checkpoint_every and done > saved
        if wanted and method.may_pause(done) and session.return_to(place):
            try:
                report.checkpoint(done, session, method, link.traffic)
            except DivergedError as diverged:
                raise diverged from error
        raise


def grouped(steps: int, together: int, eval_every: int, first: int = 1) -> Iterator[range]:
    """Steps first..steps, `together` at a time, with no evaluation inside a group."""
    while first <= steps:
        evaluation = -(-first // eval_every) * eval_every
        last = min(first + together - 1, evaluation, steps)
        yield range(first, last + 1)
        first = last + 1


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def describe_all(session: Session, link: Link) -> None:
    """What every client has; they show by the way that they can load model, tokenizer and data.

    One that is not there, or cannot take part, may come later, if enough others are there; else
    the run ends before it starts.
    """
    partitions = range(session.config.clients.count)
    if len(partitions) >= _MANY:
        log.info("waiting for %d clients to load their data", len(partitions))
    requests = {p: [Describe(**session.at(0, p))] for p in partitions}
    failures: list[HoslError] = []
    participation = session.participation
    for partition, replies in link.exchange(requests).items():
        try:
            (reply,) = replies
        except (ClientError, ProtocolError, DriftError) as error:
            failures.append(error)
            if not isinstance(error, AbsentError):
                log.warning("a client cannot take part yet: %s", error)
            continue
        assert isinstance(reply, Described)  # Link has checked it
        participation.clients[partition] = reply
        known = participation.train_examples.setdefault(partition, reply.train_examples)
        if known != reply.train_examples:
            log.warning(
                "client %d had %d training examples before the run was resumed, and has %d now",
                partition,
                known,
                reply.train_examples,
            )
            participation.train_examples[partition] = min(known, reply.train_examples)
    if len(participation.clients) < session.required_clients:
        for failure in failures:
            if not isinstance(failure, AbsentError):
                raise failure
        reasons = "; ".join(map(str, failures[:3]))
        raise ClientError(f"{len(participation.clients)} client(s) are there; {reasons}")


def check_clients(session: Session, link: Link, partitions: Iterable[int], step: int) -> list[int]:
    """Compare clients' submodels with the history's; the partitions that were compared.

    A client that differs is left out of the rest of the run, if enough others are left; else
    DriftError names it and the step at which it began. One that does not answer is not compared,
    if the run can do without it.
    """
    history, since = session.history, session.participation.checked_at
    history.state.mark()
    wanted = sorted(set(partitions) - session.participation.expelled)
    requests = {p: [Fingerprint(**session.at(step, p), since=since)] for p in wanted}
    compared = []
    for partition, replies in link.exchange(requests).items():
        try:
            (reply,) = replies
            assert isinstance(reply, Fingerprinted)  # Link has checked it
            history.check(reply, link.describe_client(partition))
        except DriftError as error:
            session.expel(step, partition, error)
            continue
        except (ClientError, ProtocolError) as error:
            if session.config.clients.count == 1:
                raise
            log.warning("step %d: the submodel of a client is not checked: %s", step, error)
            continue
        compared.append(partition)
    session.participation.checked_at = len(history.ledger)
    return compared


def evaluate(session: Session, judge: Link, step: int) -> HeldOut:
    """Score the held-out part, through the split or centrally: always the same client's while it
    is there, so that the evaluations of a run are about the same examples where clients have
    their own."""
    participation = session.participation
    order = sorted(participation.clients.keys() - participation.expelled)
    if participation.evaluator in order:
        order.remove(participation.evaluator)
        order.insert(0, participation.evaluator)
    failures: list[HoslError] = []
    for partition in order:
        try:
            score = _evaluate_on(session, judge, step, partition)
        except (ClientError, ProtocolError, DivergedError, DriftError) as error:
            failures.append(error)
            log.warning("evaluation at step %d: %s; asking the next client", step, error)
            continue
        if participation.evaluator not in (None, partition):
            log.warning("from step %d on, client %d's held-out part is scored", step, partition)
        participation.evaluator = partition
        return score
    if failures and all(isinstance(e, DivergedError | OutOfRangeError) for e in failures):
        raise DivergedError(f"evaluation at step {step}: {failures[0]}; {_DIVERGED}")
    if failures and all(isinstance(error, DriftError) for error in failures):
        raise failures[0]
    reasons = "; ".join(map(str, failures[:3]))
    raise ClientError(f"no client could evaluate step {step}: {reasons}")


def _evaluate_on(session: Session, judge: Link, step: int, partition: int) -> HeldOut:
    """Raises DivergedError for a loss that is none any more, and what the link raises."""
    spec, at = session.spec, session.at(step, partition)
    described = session.participation.clients[partition]
    if session.config.evaluation.mode == "central":  # the server's own data, not the client's
        (own,) = judge.exchange({partition: [Describe(**at)]})[partition]
        assert isinstance(own, Described)  # Link has checked it
        described = own
    session.note_overlap(described)
    batches = range(math.ceil(described.held_out_examples / spec.eval_batch_size))
    score = score_batches(session, judge, step, partition, batches)
    if not score.loss <= LARGEST_LOSS:
        raise DivergedError(f"the held-out loss is {score.loss:g}, beyond {LARGEST_LOSS:g}")
    return score


def finish(method: Method, session: Session, link: Link, report: Recorder) -> Results:
    """Check the client submodels against the history, write the results, save the model.

    HoslError when something could not be written, after everything else has been; what it needs is
    in a checkpoint then, if that can be written.
    """
    config = session.config
    checked = check_clients(session, link, range(config.clients.count), config.steps)
    results = report.results(method, session, link.traffic, checked)
    ending = report.ending
    if config.run.save_model:
        what = f"model, {bytes_needed(session) / 1e6:.1f} MB"
        ending.attempt(what, lambda: save_model(report.directory / "model", session))
    wanted = ending.failures and not ending.diverged
    if wanted and session.done < config.steps and method.may_pause(config.steps):
        at_end = (config.steps, session, method, link.traffic)
        ending.attempt("checkpoint", lambda: report.write_checkpoint(*at_end))
    report.close()
    return results


def bytes_needed(session: Session) -> int:
    """About how large the saved model will be."""
    held, trained = session.client_counts()
    if session.config.run.save_format == "adapters":
        return 4 * (trained + session.server.trained_count())
    return 4 * (held + count(dict(session.server.submodel.named_parameters())))


def save_model(directory: Path, session: Session) -> None:
    """Write the trained model, as plain weights or as adapters. OSError when it cannot be written,
    DivergedError when its values are not finite."""
    client, server = session.trained_client(), session.server
    if session.config.run.save_format == "adapters":
        assert client.lora is not None  # the config has been checked
        adapters = {
            **trainable_parameters(client, "lora"),
            **trainable_parameters(server.submodel, "lora"),
        }
        _check_finite(adapters)
        save_adapters(
            directory,
            session.spec.model,
            client.lora,
            adapters,
            session.encoder.processor,
            client.family.transposed,
        )
        return
    halves = client.merged_parameters(), server.state_dict()
    for half in halves:
        _check_finite(half)
    save_merged(directory, session.base, *halves, session.encoder.processor)


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    if name := not_finite(weights):
        raise DivergedError(f"{name} has values that are not finite, {_DIVERGED}")
