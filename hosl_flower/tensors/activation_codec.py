"""How activations and cut gradients are written for the wire: exactly, or in fewer bytes.

    exact   as they are
    bf16    8 bits of mantissa, 2 bytes
    fp16    11 bits of mantissa, 2 bytes, scaled per token so that nothing overflows or vanishes
    int8    -127..127 of the token's largest magnitude, 1 byte, and 4 bytes per token for the scale

What is lost is lost on one side only: the client probes its own activations, the server trains
on the decoded ones. HOSL takes differences of losses between probes, which a codec coarser
than the probe distance drowns; HO-SFL's probes never travel.
"""

import torch
from torch import Tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_LARGEST = {"fp16": 1.0, "int8": 127.0}  # magnitude a token's largest value is scaled to


def wire_dtype(codec: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of `dtype` travels as."""
    return _DTYPES.get(codec, dtype)


def has_scales(codec: str) -> bool:
    """Whether every token has a scale of its own."""
    return codec in _LARGEST


def encode_activations(tensor: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    """[B, S, H] -> what travels, and the scales float32 [B, S] or [0]."""
    if not has_scales(codec):
        return tensor.to(wire_dtype(codec, tensor.dtype)), torch.empty(0)
    values = tensor.float()
    scales = values.abs().amax(-1) / _LARGEST[codec]
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = values / divisors.unsqueeze(-1)
    if codec == "int8":
        values = values.round()
    return values.to(_DTYPES[codec]), scales


def decode_activations(payload: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, as far as it goes: [B, S, H] of `dtype`. scales: as `encode` gave them."""
    if not scales.numel():
        return payload.to(dtype)
    return payload.float().mul_(scales.unsqueeze(-1)).to(dtype)
