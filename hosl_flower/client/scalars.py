"""Scalars that a client finds by probes: along lambda (HO-SFL), and of its own head (HERON-SFL)."""

from collections.abc import Sequence

from torch import Tensor

from hosl_flower.client.activations import CutActivations
from hosl_flower.client.head_scalars import Batches, plain, private
from hosl_flower.client.local_steps import local_steps
from hosl_flower.client.work import Work
from hosl_flower.models.batch import Batch
from hosl_flower.protocol.messages.gradients import Backward
from hosl_flower.protocol.messages.scalars import CutGradient, HeadProbe
from hosl_flower.tensors.cut_gradient import Cotangent
from hosl_flower.zo.estimator import directional, estimate
from hosl_flower.zo.surrogates import linear


class ProbeScalars:
    """Computes projected gradients of surrogates that need no server."""

    def __init__(self, work: Work, activations: CutActivations):
        self.work, self.activations = work, activations

    def linear(self, request: CutGradient) -> tuple[list[list[float]], Tensor | None]:
        """Probe <lambda, f_c> (HO-SFL); see local_steps.py."""
        work = self.work
        batch, known = self.activations.anchor(request)
        with work.phase("probe", batch.tokens, request.gradient, *known):
            gradient = cotangent(request, work.device)
            anchor = gradient.inner((0, z) for z in known) if known else None
            known.clear()  # one number is all the probes need of it

            def exactly(_: int, seeds: Sequence[int]) -> list[float]:
                tangents = work.forwards.tangents
                return directional(lambda seed: gradient.inner(tangents(batch, seed)), seeds)

            def differences(step: int, seeds: Sequence[int]) -> list[float]:
                pieces, known = work.forwards.pieces, None if step else anchor
                surrogate = linear(lambda p: pieces(batch, p), gradient, known)
                return estimate(surrogate, seeds, request.epsilon, two_sided=False)

            estimator = differences if request.epsilon else exactly
            return local_steps(work.state, estimator, request)

    def head(self, request: HeadProbe) -> tuple[list[list[float]], float]:
        """Probe the auxiliary head's loss, each local step on the next mini-batch (HERON-SFL).

        Returns:
            The scalars [E][P], and the loss before the steps, which differential privacy keeps
            at 0.
        """
        work, clean = self.work, list[float]()
        source, partition = work.mini_batches, request.partition

        def batch(step: int) -> Batch:
            own = source.train(partition, request.batch + step)
            return own if work.mechanism is None else source.pool.text_encoder.filled(own)

        first = batch(0)
        batches = Batches(
            lambda step: batch(step) if step else first,
            lambda step: source.repeated(partition, request.batch + step),
        )
        if work.mechanism is None:
            estimator = plain(work.forwards, request, batches, clean.append)
        else:
            estimator = private(work.forwards, request, batches, work.mechanism)
        with work.phase("probe", first.tokens):
            scalars, _ = local_steps(work.state, estimator, request)
        return scalars, clean[0] if clean else 0.0


def cotangent(request: Backward, device: str) -> Cotangent:
    """The loss gradient lambda that a request carries, on the client's device."""
    return Cotangent(request.gradient.to(device), request.scales.to(device), request.scale)
