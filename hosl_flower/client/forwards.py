"""The client's forward passes: at theta or at a probe, the whole batch or a few sequences at a
time, so that what a block needs while it runs does not grow with the batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.models.batch import Batch
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.zo.estimator import Point
from hosl_flower.zo.forward_mode import along, derivative
from hosl_flower.zo.perturbed import perturbed

HERE = Point(0, 0.0)  # theta itself


class Forwards:
    """Forward passes of a client submodel around its weights as they are.

    micro_batch: sequences at a time; 0 is the whole batch.
    """

    def __init__(self, submodel: ClientSubmodel, state: ClientState, device: str, micro_batch: int):
        self.submodel, self.state = submodel, state
        self.device, self.micro_batch = device, micro_batch

    def pieces(self, batch: Batch, point: Point = HERE) -> Iterator[tuple[int, Tensor]]:
        """Activations [b, S, H] at a point, on the device, with the number of the first sequence
        of each piece; no graph, weights not written. Holds no piece it has handed out."""
        yield from self._run(batch, point, self.submodel)

    def tangents(self, batch: Batch, seed: int) -> Iterator[tuple[int, Tensor]]:
        """As pieces, the activations' derivative along a direction (zo/forward_mode.py)."""
        direction = self.state.layout.draw(seed, self.device)
        inputs, mask = batch.inputs, batch.attention_mask
        for rows in batch.slices(self.micro_batch):
            with along(self.state.parameters, direction):
                own = self.submodel(inputs[rows].to(self.device), mask[rows].to(self.device))
                piece = [derivative(own)]
                del own
            yield rows.start, piece.pop()

    def losses(self, batch: Batch, point: Point = HERE) -> Iterator[float]:
        """Each sequence's loss by the client's auxiliary head (models/auxiliary_head.py), float64:
        differences of probes are small. Raises ProtocolError when there is no head."""
        head = self.submodel.head
        if head is None:
            raise ProtocolError("this client has no auxiliary head to probe")

        def logits(ids: Tensor, mask: Tensor) -> Tensor:
            return head(self.submodel(ids, mask), mask)

        for first, own in self._run(batch, point, logits):
            labels = batch.labels[first : first + len(own)]
            yield from F.cross_entropy(own.cpu().double(), labels, reduction="none").tolist()

    def _run(
        self, batch: Batch, point: Point, function: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        direction = self.state.layout.draw(point.seed, self.device) if point.coefficient else None
        inputs, mask = batch.inputs, batch.attention_mask
        for rows in batch.slices(self.micro_batch):
            # not open while the consumer runs: the pass, and nothing else, sees the probe
            with (
                torch.no_grad(),
                nullcontext()
                if direction is None
                else perturbed(self.state.parameters, direction, point.coefficient),
            ):
                piece = [function(inputs[rows].to(self.device), mask[rows].to(self.device))]
            yield rows.start, piece.pop()


def put_together(parts: Iterable[tuple[int, Sequence[Tensor]]], count: int) -> list[Tensor]:
    """Tensors [b, ...] of consecutive parts of `count` rows -> tensors [count, ...] on the CPU, in
    buffers made once; empty ones stay empty. A single part is not copied."""
    whole: list[Tensor] = []
    for first, tensors in parts:
        if not first and len(tensors[0]) == count:
            return [tensor.cpu() for tensor in tensors]
        if not whole:
            shapes = [(count if t.numel() else 0, *t.shape[1:]) for t in tensors]
            whole = [torch.empty(s, dtype=t.dtype) for s, t in zip(shapes, tensors, strict=True)]
        for buffer, part in zip(whole, tensors, strict=True):
            if part.numel():
                buffer[first : first + len(part)] = part
    return whole
