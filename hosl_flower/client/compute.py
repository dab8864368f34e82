"""What a client computes of a mini-batch: activations, scalars, gradients. No ledger here."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosl_flower.client.forwards import HERE, Forwards, put_together
from hosl_flower.client.generation import Writing
from hosl_flower.client.head_scalars import Batches, plain, private
from hosl_flower.client.local_steps import local_steps
from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.data.client_data import DataPool
from hosl_flower.errors import ProtocolError
from hosl_flower.gradients.backprop import gradients
from hosl_flower.gradients.recompute import recomputed_gradients
from hosl_flower.gradients.residual.gradients import residual_gradients
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.models.batch import Batch
from hosl_flower.models.label_head import Judged, OutputHead
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.privacy.activation_noise import ActivationNoise
from hosl_flower.privacy.dp_scalars import Mechanism
from hosl_flower.protocol.messages.activations import Evaluate, Forward, Probe
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.gradients import Backward, LocalStep
from hosl_flower.protocol.messages.kept_labels import HeldOutStates, HiddenStates
from hosl_flower.protocol.messages.scalars import CutGradient, HeadProbe, LocalTrain
from hosl_flower.tensors.activation_codec import encode_activations, has_scales
from hosl_flower.tensors.cut_gradient import Cotangent, Pieces
from hosl_flower.tensors.memory import Meter
from hosl_flower.tensors.raw_bytes import dtype_name
from hosl_flower.tensors.rows import unflat
from hosl_flower.tensors.seeds import derive_seed
from hosl_flower.tensors.update_codec import Coded, encode_update
from hosl_flower.zo.estimator import Point, directional, estimate
from hosl_flower.zo.surrogates import linear

# phase that is measured, and how the gradient comes about, by client-gradient
_GRADIENTS: dict[str, tuple[str, Callable[..., Iterator[tuple[str, Tensor]]]]] = {
    "backprop": ("backward", gradients),
    "recompute": ("backward", recomputed_gradients),
    "residual": ("update", residual_gradients),
}
_ANCHOR_BYTES = 256 << 20  # clean activations kept for the cut gradient's return, all partitions


class _Anchor(NamedTuple):
    """A mini-batch and its activations at the weights as they are, which the cut gradient will be
    about. All are let go when the weights move."""

    batch: Batch
    activations: Tensor


class Compute:
    """The work of one client process at the weights in `state`. head: of the whole model, where
    the labels stay here. mechanism: of scalars that are differentially private; veil: over
    activations."""

    def __init__(
        self,
        spec: ClientSpec,
        submodel: ClientSubmodel,
        state: ClientState,
        pool: DataPool,
        meter: Meter,
        device: str,
        head: OutputHead | None = None,
        mechanism: Mechanism | None = None,
        veil: ActivationNoise | None = None,
    ):
        self.mechanism, self.veil = mechanism, veil
        self.spec, self.submodel, self.state, self.head = spec, submodel, state, head
        self.pool, self.meter, self.device = pool, meter, device
        self.forwards = Forwards(submodel, state, device, spec.client_micro_batch)
        self.hidden: int = submodel.hidden_size
        # by partition and number of the mini-batch
        self._anchors: OrderedDict[tuple[int, int], _Anchor] = OrderedDict()
        self.writing = Writing(spec, submodel, pool, device)

    def moved(self) -> None:
        """The weights are others now."""
        self._anchors.clear()
        self.writing.forget()

    def train_batch(self, request: Forward, number: int = 0) -> Batch:
        """The mini-batch of a request, or a later one."""
        data = self.pool.client(request.partition)
        return data.train_batch(request.batch + number, self.spec.batch_size)

    def evaluate(self, request: Evaluate) -> dict[str, Any]:
        """Activations of a held-out batch."""
        data = self.pool.client(request.partition)
        batch = data.held_out_batch(request.batch, self.spec.eval_batch_size)
        return self.activations("evaluate", batch, self._weights(request))

    def phase(self, name: str, size: int, *held: Tensor) -> AbstractContextManager[None]:
        """Measures what runs within; held: tensors that live beside the client's own."""
        return self.meter.phase(name, size, self._held(*held))

    def _held(self, *more: Tensor) -> Iterator[Tensor]:
        yield from self.submodel.parameters()
        yield from self.submodel.buffers()
        yield from self.state.optimizer.tensors()
        if self.head is not None:
            yield self.head.weight
        yield from (anchor.activations for anchor in self._anchors.values())
        yield from self.writing.tensors()
        yield from more

    def activations(
        self, phase: str, batch: Batch, weights: str, point: Point = HERE
    ) -> dict[str, Any]:
        """Of a mini-batch at a point around the weights. weights: what these are known by."""
        with self.phase(phase, batch.tokens):
            return self._reply(batch, self.forwards.pieces(batch, point), weights)

    def probed(self, request: Probe) -> dict[str, Any]:
        """Activations of a mini-batch at a probe."""
        if self.veil is not None:
            raise ProtocolError("probe: with activation-noise no probe leaves this client")
        batch = self.train_batch(request)
        return self.activations("probe", batch, self._weights(request), request.point)

    def _weights(self, request: Request) -> str:
        """What the weights a request is about are known by."""
        return f"{request.digest}+{request.local}"

    def _reply(self, batch: Batch, pieces: Pieces, weights: str) -> dict[str, Any]:
        if self.veil is not None:
            pieces = self._veiled(batch, pieces, weights)
        coded = ((first, encode_activations(piece, self.spec.codec)) for first, piece in pieces)
        activations, scales = put_together(coded, len(batch.inputs))
        return {
            "activations": activations,
            "scales": scales,
            "attention_mask": batch.attention_mask.bool(),
            "labels": batch.labels if self.head is None else batch.labels[:0],
        }

    def _veiled(self, batch: Batch, pieces: Pieces, weights: str) -> Pieces:
        assert self.veil is not None
        for first, piece in pieces:
            rows = slice(first, first + len(piece))
            mask = batch.attention_mask[rows]
            yield first, self.veil.over(piece, batch.inputs[rows], mask, weights)

    def train_labels(self, request: HiddenStates) -> Tensor:
        """Of the mini-batch of a request."""
        data = self.pool.client(request.partition)
        return data.train_labels(request.batch, self.spec.batch_size)

    def judge(self, request: HiddenStates) -> Judged:
        """The loss of hidden states of a training batch, and its gradient there."""
        labels = self.train_labels(request)[request.first :]
        return self._judged("forward", request, labels, not request.losses_only)

    def judge_held_out(self, request: HeldOutStates) -> Judged:
        """The loss of hidden states of held-out examples, and how many are right."""
        data = self.pool.client(request.partition)
        labels = data.held_out_labels(request.first, len(request.states))
        return self._judged("evaluate", request, labels, False)

    def _judged(
        self, phase: str, request: HiddenStates | HeldOutStates, labels: Tensor, gradient: bool
    ) -> Judged:
        """labels: of at least as many examples as there are states of."""
        if self.head is None:
            raise ProtocolError(f"{request.kind}: in this run labels are sent to the server")
        states, shape = request.states, [*request.states.shape]
        wanted = [self.head.answers.states_per_example, self.head.weight.shape[1]]
        fits = states.dtype == torch.float32 and shape[1:] == wanted
        if not (fits and 0 < shape[0] <= len(labels)):
            raise ProtocolError(
                f"{request.kind}: expected float32[1 to {len(labels)}, {wanted[0]}, {wanted[1]}], "
                f"got {dtype_name(states)}{shape}"
            )
        size = states.numel()
        with self.meter.phase(phase, size, self._held(states), part="head"):
            own = labels[: shape[0]].to(self.device)
            found = self.head.judge(states.to(self.device), own, gradient)
        if not math.isfinite(found.loss):
            raise ProtocolError(f"{request.kind}: the states give no finite loss")
        return found

    def clean(self, request: Forward) -> dict[str, Any]:
        """Activations at theta itself, remembered where probes will start from them. With
        micro-batches memory matters more than time: then they are computed again."""
        batch = self.train_batch(request)
        if self.spec.client_micro_batch or not request.anchor:
            return self.activations("forward", batch, self._weights(request))
        with self.phase("forward", batch.tokens):
            ((_, activations),) = self.forwards.pieces(batch)
            reply = self._reply(batch, [(0, activations)], self._weights(request))
        self._anchors[request.partition, request.batch] = _Anchor(batch, activations)
        while sum(a.activations.nbytes for a in self._anchors.values()) > _ANCHOR_BYTES:
            self._anchors.popitem(last=False)
        return reply

    def _anchor(self, request: Backward) -> tuple[Batch, list[Tensor]]:
        """What a cut gradient is about, and its clean activations if they are remembered: by a
        new process they are not."""
        anchor = self._anchors.pop((request.partition, request.batch), None)
        if anchor is None:
            batch, known = self.train_batch(request), []
        else:
            batch, known = anchor.batch, [anchor.activations]
        scales = request.gradient.shape[:2] if has_scales(self.spec.codec) else (0,)
        if request.scales.shape != torch.Size(scales):
            raise ProtocolError(
                f"cut gradient: expected scales {list(scales)}, got {list(request.scales.shape)}"
            )
        expected = [*batch.attention_mask.shape, self.hidden]
        if list(request.gradient.shape) != expected:
            raise ProtocolError(
                f"cut gradient: expected {expected}, the shape of this "
                f"client's activations, got {list(request.gradient.shape)}"
            )
        return batch, known

    def _cotangent(self, request: Backward) -> Cotangent:
        return Cotangent(
            request.gradient.to(self.device), request.scales.to(self.device), request.scale
        )

    def probe_linear(self, request: CutGradient) -> tuple[list[list[float]], Tensor | None]:
        """Probe <lambda, f_c> (HO-SFL); see local.py."""
        batch, known = self._anchor(request)
        with self.phase("probe", batch.tokens, request.gradient, *known):
            gradient = self._cotangent(request)
            anchor = gradient.inner((0, z) for z in known) if known else None
            known.clear()  # one number is all the probes need of it

            def exactly(_: int, seeds: Sequence[int]) -> list[float]:
                tangents = self.forwards.tangents
                return directional(lambda seed: gradient.inner(tangents(batch, seed)), seeds)

            def differences(step: int, seeds: Sequence[int]) -> list[float]:
                pieces, known = self.forwards.pieces, None if step else anchor
                surrogate = linear(lambda p: pieces(batch, p), gradient, known)
                return estimate(surrogate, seeds, request.epsilon, two_sided=False)

            estimator = differences if request.epsilon else exactly
            return local_steps(self.state, estimator, request)

    def probe_head(self, request: HeadProbe) -> tuple[list[list[float]], float]:
        """Probe the auxiliary head's loss, each local step on the next mini-batch (HERON-SFL);
        the scalars, and the loss before the steps, which differential privacy keeps at 0."""
        size, clean = self.spec.batch_size, list[float]()
        data = self.pool.client(request.partition)

        def batch(step: int) -> Batch:
            own = self.train_batch(request, step)
            return own if self.mechanism is None else self.pool.text_encoder.filled(own)

        first = batch(0)
        batches = Batches(
            lambda step: batch(step) if step else first,
            lambda step: data.repeated(request.batch + step, size),
        )
        if self.mechanism is None:
            estimator = plain(self.forwards, request, batches, clean.append)
        else:
            estimator = private(self.forwards, request, batches, self.mechanism)
        with self.phase("probe", first.tokens):
            scalars, _ = local_steps(self.state, estimator, request)
        return scalars, clean[0] if clean else 0.0

    def gradient(self, request: Backward) -> Coded:
        """The client's gradient, for the wire; each parameter's as soon as it is there."""
        with self._training(request) as computed:
            return self._coded(request, computed)

    def change(self, request: LocalTrain) -> Coded:
        """Of the weights, by local training on probes, for the wire."""
        _, change = self.probe_linear(request)
        assert change is not None  # it is asked for
        return self._coded(request, unflat(change, self.state.parameters).items())

    def _coded(self, request: Request, parts: Iterable[tuple[str, Tensor]]) -> Coded:
        """As the run's update-codec writes it, rounded as in no other update of the run."""
        seed = derive_seed(self.spec.seed, "update", request.step, request.partition)
        return encode_update(self.state.rows, parts, self.spec.update_codec, seed)

    def local_step(self, request: LocalStep) -> None:
        """One step of the client's own optimizer, in place; each parameter's as soon as its
        gradient is there."""
        seed = derive_seed(self.spec.seed, "local", request.step, request.partition)
        self.moved()
        with self._training(request) as computed:
            self.state.update_each(computed, request.learning_rate, seed)

    @contextmanager
    def _training(self, request: Backward) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Measured: the client's gradients, of one parameter after the other."""
        batch, known = self._anchor(request)
        known.clear()  # the pass is run again
        phase, compute = _GRADIENTS[self.spec.client_gradient]
        micro_batch = self.spec.client_micro_batch
        with self.phase(phase, batch.tokens, request.gradient):
            cotangent = self._cotangent(request)
            yield compute(self.submodel, self.state.parameters, batch, cotangent, micro_batch)
