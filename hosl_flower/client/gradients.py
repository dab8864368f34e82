"""The client's gradient of its half, and steps along it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from hosl_flower.client.activations import CutActivations
from hosl_flower.client.scalars import ProbeScalars, cotangent
from hosl_flower.client.work import Work
from hosl_flower.gradients.backprop import gradients
from hosl_flower.gradients.exact import exact_gradients
from hosl_flower.gradients.recompute import recomputed_gradients
from hosl_flower.gradients.residual import residual_gradients
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.gradients import Backward, LocalStep
from hosl_flower.protocol.messages.scalars import LocalTrain
from hosl_flower.tensors.rows import unflat
from hosl_flower.tensors.seeds import derive_seed
from hosl_flower.tensors.update_codec import Coded, encode_update

# phase that is measured, and how the gradient comes about, by client-gradient
_GRADIENTS: dict[str, tuple[str, Callable[..., Iterator[tuple[str, Tensor]]]]] = {
    "backprop": ("backward", gradients),
    "exact": ("backward", exact_gradients),
    "recompute": ("backward", recomputed_gradients),
    "residual": ("update", residual_gradients),
}


class ClientGradients:
    """Computes gradients and changes of the trainable weights."""

    def __init__(self, work: Work, activations: CutActivations, scalars: ProbeScalars):
        self.work, self.activations, self.scalars = work, activations, scalars

    def gradient(self, request: Backward) -> Coded:
        """The client's gradient, for the wire; each parameter's as soon as it is there."""
        with self._training(request) as computed:
            return self._coded(request, computed)

    def change(self, request: LocalTrain) -> Coded:
        """The change of the weights by local training on probes, for the wire."""
        _, change = self.scalars.linear(request)
        assert change is not None  # it is asked for
        return self._coded(request, unflat(change, self.work.state.parameters).items())

    def local_step(self, request: LocalStep) -> None:
        """One step of the client's own optimizer, in place; each parameter's as soon as its
        gradient is there."""
        seed = derive_seed(self.work.spec.seed, "local", request.step, request.partition)
        self.work.moved()
        with self._training(request) as computed:
            self.work.state.update_each(computed, request.learning_rate, seed)

    def _coded(self, request: Request, parts: Iterable[tuple[str, Tensor]]) -> Coded:
        """As the run's update-codec writes it, rounded as in no other update of the run."""
        spec = self.work.spec
        seed = derive_seed(spec.seed, "update", request.step, request.partition)
        return encode_update(self.work.state.rows, parts, spec.update_codec, seed)

    @contextmanager
    def _training(self, request: Backward) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Measured: the client's gradients, of one parameter after the other."""
        work = self.work
        batch, known = self.activations.anchor(request)
        known.clear()  # the pass is run again
        phase, compute = _GRADIENTS[work.spec.client_gradient]
        with work.phase(phase, batch.tokens, request.gradient):
            lam = cotangent(request, work.device)
            yield compute(
                work.submodel, work.state.parameters, batch, lam, work.spec.client_micro_batch
            )
