"""Noise on activations before they leave a client: what it hides is measured (SECURITY.md), not
promised.

    sent = h + s rms(h) n,    rms over a token's features, n normal, s = activation-noise

n follows from a secret of the device's and from the example itself, so that each example always has
the same: however often it comes back, as a probe, in another epoch, after a lost message, there is
nothing to average. Probes of one example share it, but for their rms, so that differences of their
losses are about the probe. What the client computes itself, it computes of h.
"""

import hmac
from dataclasses import dataclass

import torch
from torch import Tensor

from hosl_flower.spec import ClientSpec
from hosl_flower.streams import NORMALS


@dataclass(frozen=True)
class Veil:
    """share: s. secret: the client's own (secret.py)."""

    share: float
    secret: bytes

    def over(self, activations: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
        """Activations [B, S, H] with noise, as they are sent; padding is zeros.

        inputs: of these sequences [B, ...], by which an example is known. mask [B, S], left-padded.
        """
        sent = torch.zeros_like(activations)
        for place, (own, ids) in enumerate(zip(activations, inputs.cpu(), strict=True)):
            tokens = int(mask[place].sum())
            values = own[own.shape[0] - tokens :].float()
            example = ids[..., ids.shape[-1] - tokens :] if ids.dtype == torch.int64 else ids
            noise = NORMALS.span(
                self._seed(example), "activations", 0, values.numel(), values.device
            ).view_as(values)
            size = values.square().mean(-1, keepdim=True).sqrt()
            sent[place, own.shape[0] - tokens :] = (values + self.share * size * noise).to(
                own.dtype
            )
        return sent

    def _seed(self, example: Tensor) -> int:
        data = example.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return int.from_bytes(hmac.digest(self.secret, data, "sha256")[:8], "little") >> 1


def veil_of(spec: ClientSpec, secret: bytes) -> Veil | None:
    """Of a run; None without activation-noise."""
    return Veil(spec.activation_noise, secret) if spec.activation_noise else None
