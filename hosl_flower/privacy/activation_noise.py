"""Noise on activations before they leave a client: what it hides is measured (SECURITY.md), not
promised.

    sent = h + s rms(h) n,    rms over a token's features, n normal, s = activation-noise

n follows from a secret of the device's, the client's weights and the example itself: asked again,
as after a lost message, the answer is the same, and there is no second sample to average. At other
weights an example has other noise: with the same, what is sent before and after a known update
would differ by what the update does to h, nearly bare. So an example that comes E times, at E
weights, hides behind s / sqrt(E). A client that sends probes shows the same at once, for which
reason methods that do (HOSL, split ZO) refuse noise. What the client computes itself, it computes
of h.
"""

import hmac
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.privacy.noise_secret import given
from hosl_flower.tensors.philox import NORMALS


@dataclass(frozen=True)
class ActivationNoise:
    """share: s. secret: the client's own (noise_secret.py)."""

    share: float
    secret: bytes = field(repr=False)

    def over(self, activations: Tensor, inputs: Tensor, mask: Tensor, weights: str) -> Tensor:
        """Activations [B, S, H] with noise, as they are sent; padding is zeros.

        inputs: of these sequences [B, ...], by which an example is known. mask [B, S], left-padded.
        weights: what they are known by.
        """
        sent = torch.zeros_like(activations)
        for place, (own, ids) in enumerate(zip(activations, inputs.cpu(), strict=True)):
            tokens = int(mask[place].sum())
            values = own[own.shape[0] - tokens :].float()
            example = ids[..., ids.shape[-1] - tokens :] if ids.dtype == torch.int64 else ids
            noise = NORMALS.span(
                self._seed(weights, example), "activations", 0, values.numel(), values.device
            ).view_as(values)
            size = values.square().mean(-1, keepdim=True).sqrt()
            sent[place, own.shape[0] - tokens :] = (values + self.share * size * noise).to(
                own.dtype
            )
        return sent

    def _seed(self, weights: str, example: Tensor) -> int:
        content = example.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        data = weights.encode() + b"|" + content
        return int.from_bytes(hmac.digest(self.secret, data, "sha256")[:8], "little") >> 1


def activation_noise_of(spec: ClientSpec, secret: bytes | None) -> ActivationNoise | None:
    """Of a run; None without activation-noise. ValueError for noise without a secret."""
    return ActivationNoise(spec.activation_noise, given(secret)) if spec.activation_noise else None
