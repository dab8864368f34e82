"""The control: the server trains, the clients do not.

What a method's client half is worth is what it gains over this one, at the same data, server and
number of steps. Phases 1 and 2 of strategies/ho_sfl.py (arXiv 2603.14773) without the rest: a
client uploads clean activations and its weights stay those of the base checkpoint. No gradient
comes down. A reviewer of HERON-SFL asked for this control; no paper on hybrid-order split learning
that we know of reports it.
"""

from collections.abc import Sequence

from hosl_flower.methods.method import Method
from hosl_flower.protocol.messages.activations import Forward
from hosl_flower.server.cohort import Cohort, Question, absent
from hosl_flower.server.kept_labels import kept
from hosl_flower.server.link import Link
from hosl_flower.server.session import Session


class FrozenClient(Method):
    """Per step and client: activations up, nothing down.

    Run-config keys: num-clients, clients-per-step, min-clients and the server's.
    """

    name = "frozen-client"
    keys = frozenset({
        "clients-per-step", "min-clients", "step-deadline", "steps-per-message", "aggregation",
        "activation-noise", "server-trainable", "server-optimizer", "server-learning-rate",
        "server-gradient-clip", "server-micro-batch",
    })  # fmt: skip
    tolerates_absence = True
    keeps_labels = True

    def steps(self, session: Session, link: Link, steps: Sequence[int]) -> list[float]:
        """One step of the server each; the weighted losses before it."""
        away = absent(session, link)
        cohorts = [Cohort(session, step, session.sample(step, away)) for step in steps]
        forward = Question(session, link)
        asked = {
            cohort.step: [
                Forward(**session.at(cohort.step, m), batch=session.next_batch(m))
                for m in cohort.partitions
            ]
            for cohort in cohorts
        }
        for requests in asked.values():
            forward.add(*requests)
        losses = []
        for cohort in cohorts:
            labels = kept(session, link, asked[cohort.step])
            losses.append(cohort.train_server(forward.answers(cohort), labels))
            cohort.done()
        return losses

    def activations_per_step(self) -> tuple[int, int]:
        """K up."""
        return self.config.clients.sampled, 0
