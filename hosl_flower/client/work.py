"""What all computations of a client share: its submodel, its data, and the meter of its memory."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from hosl_flower.client.forwards import Forwards
from hosl_flower.client.local_weights import LocalWeights
from hosl_flower.client.mini_batches import MiniBatches
from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.models.batch import Batch
from hosl_flower.models.decoding import Prompts
from hosl_flower.models.label_head import OutputHead
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.privacy.activation_noise import ActivationNoise
from hosl_flower.privacy.dp_scalars import Mechanism
from hosl_flower.tensors.memory import Meter


class Anchor(NamedTuple):
    """A mini-batch and its activations."""

    batch: Batch
    activations: Tensor


@dataclass
class Work:
    """The client submodel at the weights in `state`, and what computations with it need.

    Attributes:
        head: of the whole model, where the labels stay here.
        mechanism: of scalars that are differentially private.
        noise: on activations that leave the client.
        anchors: mini-batches and their activations, which cut gradients will be about, by
            partition and number of the mini-batch.
        prompts: those that are being answered, by partition and number of the batch.
    """

    spec: ClientSpec
    submodel: ClientSubmodel
    state: ClientState
    mini_batches: MiniBatches
    meter: Meter
    device: str
    head: OutputHead | None = None
    mechanism: Mechanism | None = None
    noise: ActivationNoise | None = None
    anchors: OrderedDict[tuple[int, int], Anchor] = field(default_factory=OrderedDict)
    prompts: tuple[tuple[int, int], Prompts] | None = None

    def __post_init__(self) -> None:
        self.local_weights = LocalWeights(self.state)
        self.forwards = Forwards(
            self.submodel, self.state, self.device, self.spec.client_micro_batch
        )

    def release(self) -> None:
        """Let go of the weights, whoever still holds this object; it is not used again."""
        vars(self).clear()

    def moved(self) -> None:
        """Let go of everything that was computed at the weights before."""
        self.anchors.clear()
        self.prompts = None

    def phase(
        self, name: str, size: int, *held: Tensor, part: str = ""
    ) -> AbstractContextManager[None]:
        """Measure what runs within.

        Args:
            name: one of memory.PHASES.
            size: of the work, in a unit of its own.
            held: tensors that live beside the client's own.
            part: of the phase, with sizes of its own.
        """
        return self.meter.phase(name, size, self._held(*held), part)

    def _held(self, *more: Tensor) -> Iterator[Tensor]:
        yield from self.submodel.parameters()
        yield from self.submodel.buffers()
        yield from self.state.optimizer.tensors()
        if self.head is not None:
            yield self.head.weight
        yield from (anchor.activations for anchor in self.anchors.values())
        yield from self.prompts[1].tensors() if self.prompts else ()
        yield from more
