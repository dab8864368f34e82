"""Activations of mini-batches at the client's weights and around them."""

from typing import Any

import torch
from torch import Tensor

from hosl_flower.client.forwards import HERE, put_together
from hosl_flower.client.work import Anchor, Work
from hosl_flower.errors import ProtocolError
from hosl_flower.models.batch import Batch
from hosl_flower.protocol.messages.activations import Evaluate, Forward, Probe
from hosl_flower.protocol.messages.base import Request
from hosl_flower.protocol.messages.gradients import Backward
from hosl_flower.tensors.activation_codec import encode_activations, has_scales
from hosl_flower.tensors.cut_gradient import Pieces
from hosl_flower.zo.estimator import Point

_ANCHOR_BYTES = 256 << 20  # of activations remembered, at most


class CutActivations:
    """Computes activations at the cut, and remembers those that a cut gradient will come for."""

    def __init__(self, work: Work):
        self.work = work

    def clean(self, request: Forward) -> dict[str, Any]:
        """Activations at theta itself, remembered where probes will start from them.

        With micro-batches memory matters more than time: then they are computed again.
        """
        work = self.work
        batch = work.mini_batches.train(request.partition, request.batch)
        if work.spec.client_micro_batch or not request.anchor:
            return self.of("forward", batch, _weights(request))
        with work.phase("forward", batch.tokens):
            ((_, activations),) = work.forwards.pieces(batch)
            reply = self._reply(batch, [(0, activations)], _weights(request))
        anchors = work.anchors
        anchors[request.partition, request.batch] = Anchor(batch, activations)
        while sum(a.activations.nbytes for a in anchors.values()) > _ANCHOR_BYTES:
            anchors.popitem(last=False)
        return reply

    def probed(self, request: Probe) -> dict[str, Any]:
        """Activations of a mini-batch at a probe."""
        if self.work.noise is not None:
            raise ProtocolError("probe: with activation-noise no probe leaves this client")
        batch = self.work.mini_batches.train(request.partition, request.batch)
        return self.of("probe", batch, _weights(request), request.point)

    def evaluate(self, request: Evaluate) -> dict[str, Any]:
        """Activations of a held-out batch."""
        batch = self.work.mini_batches.held_out(request.partition, request.batch)
        return self.of("evaluate", batch, _weights(request))

    def of(self, phase: str, batch: Batch, weights: str, point: Point = HERE) -> dict[str, Any]:
        """Activations of a mini-batch at a point around the weights.

        Args:
            phase: the phase that is measured.
            batch: the mini-batch.
            weights: a name of the weights, from which noise follows.
            point: where the submodel is evaluated.
        """
        with self.work.phase(phase, batch.tokens):
            return self._reply(batch, self.work.forwards.pieces(batch, point), weights)

    def anchor(self, request: Backward) -> tuple[Batch, list[Tensor]]:
        """The mini-batch of a cut gradient, and its clean activations if they are remembered.

        A new process does not remember them. Raises ProtocolError for a gradient of another shape.
        """
        anchor = self.work.anchors.pop((request.partition, request.batch), None)
        if anchor is None:
            batch = self.work.mini_batches.train(request.partition, request.batch)
            known = []
        else:
            batch, known = anchor.batch, [anchor.activations]
        scales = request.gradient.shape[:2] if has_scales(self.work.spec.codec) else (0,)
        if request.scales.shape != torch.Size(scales):
            raise ProtocolError(
                f"cut gradient: expected scales {list(scales)}, got {list(request.scales.shape)}"
            )
        expected = [*batch.attention_mask.shape, self.work.submodel.hidden_size]
        if list(request.gradient.shape) != expected:
            raise ProtocolError(
                f"cut gradient: expected {expected}, the shape of this "
                f"client's activations, got {list(request.gradient.shape)}"
            )
        return batch, known

    def _reply(self, batch: Batch, pieces: Pieces, weights: str) -> dict[str, Any]:
        work = self.work
        if work.noise is not None:
            pieces = self._noisy(batch, pieces, weights)
        coded = ((first, encode_activations(piece, work.spec.codec)) for first, piece in pieces)
        activations, scales = put_together(coded, len(batch.inputs))
        return {
            "activations": activations,
            "scales": scales,
            "attention_mask": batch.attention_mask.bool(),
            "labels": batch.labels if work.head is None else batch.labels[:0],
        }

    def _noisy(self, batch: Batch, pieces: Pieces, weights: str) -> Pieces:
        assert self.work.noise is not None
        for first, piece in pieces:
            rows = slice(first, first + len(piece))
            mask = batch.attention_mask[rows]
            yield first, self.work.noise.over(piece, batch.inputs[rows], mask, weights)


def _weights(request: Request) -> str:
    """A name of the weights that a request is about."""
    return f"{request.digest}+{request.local}"
