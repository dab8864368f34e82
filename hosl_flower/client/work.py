"""What all computations of a client share: its submodel, its data, and the meter of its memory."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor

from hosl_flower.client.forwards import Forwards
from hosl_flower.client.local_weights import LocalWeights
from hosl_flower.client.mini_batches import MiniBatches
from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.models.label_head import OutputHead
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.privacy.activation_noise import ActivationNoise
from hosl_flower.privacy.dp_scalars import Mechanism
from hosl_flower.tensors.memory import Meter


@dataclass
class Work:
    """The client submodel at the weights in `state`, and what computations with it need.

    Attributes:
        head: of the whole model, where the labels stay here.
        mechanism: of scalars that are differentially private.
        noise: on activations that leave the client.
        kept: for each computation that keeps tensors between requests, a way to list them.
        forgetting: what is called when the weights move.
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
    kept: list[Callable[[], Iterable[Tensor]]] = field(default_factory=list)
    forgetting: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.local_weights = LocalWeights(self.state)
        self.forwards = Forwards(
            self.submodel, self.state, self.device, self.spec.client_micro_batch
        )

    def release(self) -> None:
        """Let go of the weights, whoever still holds this object; it is not used again."""
        vars(self).clear()

    def keep(self, tensors: Callable[[], Iterable[Tensor]], forget: Callable[[], None]) -> None:
        """Count tensors that are kept between requests, and let go of them when weights move."""
        self.kept.append(tensors)
        self.forgetting.append(forget)

    def moved(self) -> None:
        """Let go of everything that was computed at the weights before."""
        for forget in self.forgetting:
            forget()

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
        for tensors in self.kept:
            yield from tensors()
        yield from more
