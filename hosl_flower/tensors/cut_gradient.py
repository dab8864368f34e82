"""The loss gradient at the cut, as it came and decoded piece by piece."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hosl_flower.tensors.activation_codec import decode_activations

_CHUNK_ELEMENTS = 1 << 16  # multiplied in float64 at a time: small enough to stay in cache


# Activations [b, S, H] of consecutive sequences of a batch, with the number of the first.
Pieces = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True)
class Cotangent:
    """lambda [B, S, H], the loss gradient at the cut, as it came: payload and scales of a codec
    (activation_codec.py) on the client's device, times scale. Decoded a few tokens at a time, never
    whole.
    """

    payload: Tensor
    scales: Tensor
    scale: float

    def inner(self, pieces: Pieces) -> float:
        """<lambda, h>, of activations h that come in pieces.

        Summed in float64, where products of float32 are exact: the difference of two such
        values is then as good as the value of the difference, and takes no second activation
        to compute. In float32 it would cancel.
        """
        return sum(self._inner(first, piece) for first, piece in pieces)

    def dense(self, rows: slice) -> Tensor:
        """Some sequences' lambda [b, S, H], float32."""
        gradient = decode_activations(self.payload[rows], self.scales[rows], torch.float32)
        return gradient * self.scale if self.scale != 1 else gradient

    def _inner(self, first: int, piece: Tensor) -> float:
        rows = slice(first, first + piece.shape[0])
        payload, scales = self.payload[rows].flatten(0, 1), self.scales[rows].flatten()
        total = torch.zeros((), dtype=torch.float64)
        tokens = piece.flatten(0, 1)
        size = max(1, _CHUNK_ELEMENTS // tokens.shape[1])
        for start in range(0, tokens.shape[0], size):
            own = slice(start, start + size)
            gradient = decode_activations(payload[own], scales[own], torch.float32)
            if self.scale != 1:
                gradient = gradient * self.scale
            total = total + _double(tokens[own]).mul(_double(gradient)).sum()
        return float(total)


def _double(tensor: Tensor) -> Tensor:
    # Apple's GPUs have no float64
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)
