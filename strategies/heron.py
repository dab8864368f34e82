"""HERON-SFL: zeroth-order clients with a loss of their own.

Hybrid-order split federated learning with an auxiliary head, arXiv 2601.09076,
https://arxiv.org/abs/2601.09076. A client is its submodel and a small head (final norm and answer
words, models/auxiliary_head.py), theta_c; both are trained on the head's loss l_c, so no
gradient comes down. One step (the paper's round), local-steps = h:

    1  each client takes h zeroth-order steps on its own mini-batches,
       g_p = (l_c(theta_c + eps s_p) - l_c(theta_c)) / (P eps),
       theta_c <- theta_c - eta_c sum_p g_p s_p                                       (one-sided)
    2  every upload-every (k) steps it uploads the activations of the first of these mini-batches;
       the server takes a first-order step on them
    3  the clients' theta_c are averaged

A move along seeded directions is averaged by averaging its scalars, so 3 sends h * P of them and
no weights, which is exact with SGD (the paper averages weights). The paper's server goes through
the clients' batches one after the other; this one takes one step on all. Activations are those
before the local steps.
"""

from collections.abc import Sequence
from math import nan

from hosl_flower.protocol.messages.activations import Forward
from hosl_flower.protocol.messages.scalars import HeadProbe
from hosl_flower.server.cohort import Cohort, Question, absent
from hosl_flower.server.link import Link
from hosl_flower.server.schedule import client_rate
from hosl_flower.server.session import Session
from strategies.ho_sfl import HoSfl


class Heron(HoSfl):
    """Per step and client: E * P scalars up and down, activations up every k steps.

    Run-config keys: as HO-SFL's, and upload-every (k). A training loss is that of the heads.
    """

    name = "heron-sfl"
    keys = HoSfl.keys - {"derivative"} | {"upload-every"}
    client_head = True
    keeps_labels = False

    def steps(self, session: Session, link: Link, steps: Sequence[int]) -> list[float]:
        """These steps; the weighted losses of the clients' heads before each, if they tell them."""
        away = absent(session, link)
        cohorts = [Cohort(session, step, session.sample(step, away)) for step in steps]
        probed, forward = Question(session, link), Question(session, link)
        batches: dict[tuple[int, int], int] = {}
        for cohort in cohorts:
            for m in cohort.partitions:
                batches[cohort.step, m] = batch = session.next_batch(m)
                for _ in range(1, self.config.pace.local_steps):
                    session.next_batch(m)
                if self.uploads(cohort.step):
                    forward.add(Forward(**session.at(cohort.step, m), batch=batch))
        for cohort in cohorts:
            if self.uploads(cohort.step):
                cohort.train_server(forward.answers(cohort))
            for m in cohort.partitions:
                probed.add(self.head_probe(session, cohort.step, m, batches[cohort.step, m]))
        losses, updates = [], []
        for cohort in cohorts:
            replies = probed.answers(cohort)
            shares = zip(cohort.partitions, cohort.weights, strict=True)
            told = not self.config.privacy.dp_noise
            losses.append(sum(share * replies[m].loss for m, share in shares) if told else nan)
            updates.append(self.merge(session, cohort, replies))
        for cohort, update in zip(cohorts, updates, strict=True):
            self.commit(session, cohort, update)
            cohort.done()
        return losses

    def uploads(self, step: int) -> bool:
        """Whether the server gets activations in this step."""
        return step % self.config.pace.upload_every == 0

    def head_probe(self, session: Session, step: int, partition: int, batch: int) -> HeadProbe:
        """Local steps from this mini-batch on."""
        config = session.config
        return HeadProbe(
            **session.at(step, partition),
            batch=batch,
            directions=config.zo.directions,
            seeds=tuple(s for own in self.seeds(session, step, partition) for s in own),
            epsilon=config.zo.epsilon,
            learning_rate=client_rate(config, step),
        )

    def activations_per_step(self) -> tuple[int, int]:
        """K up every k steps, none down."""
        return self.config.clients.sampled, 0
