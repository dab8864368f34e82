"""Losses of the server's hidden states, where the labels stay on the client."""

import math

import torch
from torch import Tensor

from hosl_flower.client.work import Work
from hosl_flower.errors import ProtocolError
from hosl_flower.models.label_head import Judged
from hosl_flower.protocol.messages.kept_labels import HeldOutStates, HiddenStates
from hosl_flower.tensors.raw_bytes import dtype_name


class LabelLosses:
    """Computes losses with the client's labels and its copy of the LM head's answer rows."""

    def __init__(self, work: Work):
        self.work = work

    def train(self, request: HiddenStates) -> Judged:
        """The loss of hidden states of a training batch, and its gradient there."""
        labels = self.work.mini_batches.train_labels(request.partition, request.batch)
        return self._judged("forward", request, labels[request.first :], not request.losses_only)

    def held_out(self, request: HeldOutStates) -> Judged:
        """The loss of hidden states of held-out examples, and how many are right."""
        labels = self.work.mini_batches.held_out_labels(
            request.partition, request.first, len(request.states)
        )
        return self._judged("evaluate", request, labels, False)

    def _judged(
        self, phase: str, request: HiddenStates | HeldOutStates, labels: Tensor, gradient: bool
    ) -> Judged:
        """labels: of at least as many examples as there are states of."""
        work, head = self.work, self.work.head
        if head is None:
            raise ProtocolError(f"{request.kind}: in this run labels are sent to the server")
        states, shape = request.states, [*request.states.shape]
        wanted = [head.answers.states_per_example, head.weight.shape[1]]
        fits = states.dtype == torch.float32 and shape[1:] == wanted
        if not (fits and 0 < shape[0] <= len(labels)):
            raise ProtocolError(
                f"{request.kind}: expected float32[1 to {len(labels)}, {wanted[0]}, {wanted[1]}], "
                f"got {dtype_name(states)}{shape}"
            )
        with work.phase(phase, states.numel(), states, part="head"):
            own = labels[: shape[0]].to(work.device)
            found = head.judge(states.to(work.device), own, gradient)
        if not math.isfinite(found.loss):
            raise ProtocolError(f"{request.kind}: the states give no finite loss")
        return found
