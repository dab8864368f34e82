"""FedAvg-ZO: the clients of HO-SFL, their weights averaged as FedAvg does.

The baseline that HO-SFL's aggregation of scalars is measured against. Steps 0 to 3 are those of
strategies/ho_sfl.py (arXiv 2603.14773), but each client trains on its surrogate for E local
zeroth-order steps and uploads the change of its trainable weights; the server averages the
changes by numbers of examples (McMahan et al. 2017, Alg. 1; with aggregation = mean all count
alike) and sends the new weights down:

    theta_c <- theta_c + sum_m w_m (theta_c,m - theta_c)

With SGD and E = 1 the result is HO-SFL's, since averaging weights that moved along seeded
directions is averaging scalars; it costs d_c values up and down instead of P. The local
optimizer starts afresh in every step.
"""

from typing import Any

import torch

from hosl_flower.config.run_config import RunConfig
from hosl_flower.protocol.messages.scalars import LocalTrain
from hosl_flower.server.aggregate import check_is_mean
from hosl_flower.server.cohort import Cohort
from hosl_flower.server.session import Session
from hosl_flower.tensors.update_codec import decode_update
from strategies.ho_sfl import HoSfl


class FedAvgZo(HoSfl):
    """Per step and client: activations up, their gradient down, trainable weights up and down.

    Run-config keys: as HO-SFL's, but aggregation is weighted-mean or mean, and
    update-codec is of the changes that travel up.
    """

    name = "fedavg-zo"
    keys = HoSfl.keys - {"trim-fraction", "scalar-clip"} | {"update-codec"}
    request = LocalTrain

    def __init__(self, config: RunConfig):
        super().__init__(config)
        check_is_mean(config.aggregation.rule, self.name, "weights")

    def merge(self, session: Session, cohort: Cohort, replies: dict[int, Any]) -> torch.Tensor:
        """The weighted mean of the clients' changes: float64 [n]."""
        rows = session.history.state.rows
        moved = torch.zeros(session.history.state.elements, dtype=torch.float64)
        for m, share in zip(cohort.partitions, cohort.weights, strict=True):
            moved.add_(decode_update(rows, replies.pop(m)), alpha=share)
        return moved

    def commit(self, session: Session, cohort: Cohort, update: torch.Tensor) -> None:
        """New weights for everybody."""
        history = session.history
        if self.config.update_codec == "exact":
            history.jump(cohort.step, history.state.weights().double().add_(update))
        else:
            history.shift(cohort.step, update.float())
