"""An example of a method of your own: HO-SFL in which every client has one vote per direction.

Copy this file into any installed package and name it in a run config,
strategy = "yourpackage.module:SignVote". All that differs from HO-SFL (strategies/ho_sfl.py) is
phase 4: the sign of a client's projected gradient is its vote, and a step along a direction is as
long as the majority is large,

    v_p = (1/P) sum_m w_m sign(v_mp)

so a client that sends nonsense moves theta_c by at most w_m per direction, as in FeedSign (one-bit
votes; arXiv 2501.17610). client-learning-rate is then the step length, whatever the loss's scale.
tests/strategies/test_methods.py shows what such a method can be tested for.
"""

from typing import Any

import torch

from hosl_flower import Cohort, Session
from strategies.ho_sfl import HoSfl


class SignVote(HoSfl):
    """Per step and client: activations up, their gradient down, E * P scalars up and down.

    Run-config keys: as HO-SFL's; a weighted-mean of votes, so no other aggregation.
    """

    name = "sign-vote"
    keys = HoSfl.keys - {"aggregation", "trim-fraction", "scalar-clip"}

    def merge(self, session: Session, cohort: Cohort, replies: dict[int, Any]) -> Any:
        """One ledger entry per local step, of the clients' votes."""
        votes = [torch.sign(replies[m].scalars) for m in cohort.partitions]
        return self.entries(session, cohort, torch.stack(votes) / self.config.zo.directions)
