"""Scoring held-out batches over a link: losses, and what the split model writes as answers.

Answers are written batch by batch, greedily: the client sends the activations of the prompts, then,
for every token, those of the tokens that came back. It grades the answers itself, so that the right
ones need not travel as text.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.models.decoding import Writer, greedy
from hosl_flower.protocol.messages.activations import Activations, Evaluate
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.generation import Continue, Continued, Grade, Graded
from hosl_flower.server.kept_labels import score_by_client
from hosl_flower.server.link import Link
from hosl_flower.server.scores import HeldOut, TextScore, new_score
from hosl_flower.server.session import Session
from hosl_flower.tasks.generated_answers import Completion

_TOGETHER = 1000  # batches asked for in one exchange


def score_batches(
    session: Session, judge: Link, step: int, partition: int, batches: range
) -> HeldOut:
    """The score of held-out batches of a client's. Raises what the link does, or DivergedError."""
    at = session.at(step, partition)
    replies = _activations(judge, at, batches)
    if judge.limits.private_labels:
        return score_by_client(judge, at, map(session.server.states, replies))
    score = new_score(session.spec.task)
    counts: list[int] = []  # sequences of each batch
    for reply in replies:
        assert isinstance(reply, Activations)  # Link has checked it
        session.server.score(reply, score)
        counts.append(len(reply.activations))
    if isinstance(score, TextScore):
        for number, count in zip(batches, counts, strict=True):
            answers = _written(session, judge, at, number, count)
            graded = _ask(judge, Grade(**at, batch=number, tokens=answers))
            assert isinstance(graded, Graded)  # Link has checked it
            score.add_grades(graded.scores)
    return score


def _activations(judge: Link, at: dict[str, Any], batches: range) -> Iterator[Any]:
    """The batches' activations, asked for a thousand at a time: how many there are is what a
    client says."""
    for first in range(0, len(batches), _TOGETHER):
        requests = [Evaluate(**at, batch=number) for number in batches[first : first + _TOGETHER]]
        yield from judge.exchange({at["partition"]: requests})[at["partition"]]


def _written(session: Session, judge: Link, at: dict[str, Any], batch: int, count: int) -> Tensor:
    """Tokens [B, t] of the answers to a batch's prompts, of which there are `count`."""
    answers, server = session.encoder.answers, session.server
    assert isinstance(answers, Completion)

    def ask(tokens: Tensor) -> tuple[Tensor, Tensor]:
        reply = _ask(judge, Continue(**at, batch=batch, tokens=tokens))
        assert isinstance(reply, Continued)  # Link has checked it
        if len(reply.activations) != count:  # fewer would be a score of the easiest ones
            raise ProtocolError(
                f"{judge.describe_client(at['partition'])}, step {at['step']}, continue: expected "
                f"{count} sequences of held-out batch {batch}, got {len(reply.activations)}"
            )
        return reply.activations, reply.attention_mask

    writer = Writer(server.submodel, server.answer_rows)
    return greedy(ask, writer, answers.longest, answers.ends)


def _ask(judge: Link, request: Request) -> Any:
    (reply,) = judge.exchange({request.partition: [request]})[request.partition]
    return reply
