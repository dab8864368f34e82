"""tensors/activation_codec.py: what is lost, what is not, and what it costs in bytes."""

import pytest
import torch

from hosl_flower.errors import ProtocolError
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.tensors.activation_codec import decode_activations, encode_activations

H = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) * 3
H[1, 2] = 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_is_exact(dtype):
    payload, scales = encode_activations(H.to(dtype), "exact")
    assert payload.dtype == dtype
    assert torch.equal(decode_activations(payload, scales, dtype), H.to(dtype))


@pytest.mark.parametrize(
    ("codec", "bits", "itemsize"), [("bf16", 8, 2), ("fp16", 12, 2), ("int8", 8, 1)]
)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4])
def test_the_error_is_half_a_step_of_the_tokens_largest_value(codec, bits, itemsize, size):
    h = H * size
    payload, scales = encode_activations(h, codec)
    assert payload.element_size() == itemsize
    error = (decode_activations(payload, scales, torch.float32) - h).abs()
    largest = h.abs().amax(-1, keepdim=True)
    assert (error <= largest * 2.0**-bits * 1.01).all()
    assert (decode_activations(payload, scales, torch.float32)[1, 2] == 0).all()


def test_int8_by_hand():
    payload, scales = encode_activations(torch.tensor([[[254.0, -2.0, 1.1, 0.0]]]), "int8")
    assert payload.tolist() == [[[127, -1, 1, 0]]]
    assert scales.tolist() == [[2.0]]
    assert decode_activations(payload, scales, torch.float32).tolist() == [
        [[254.0, -2.0, 2.0, 0.0]]
    ]


@pytest.mark.parametrize("codec", ["exact", "bf16", "fp16", "int8"])
def test_only_the_runs_codec_is_taken(codec):
    payload, scales = encode_activations(H, codec)
    mask, labels = torch.ones(2, 5, dtype=torch.bool), torch.tensor([0, 1])
    reply = Activations(
        step=1, seconds=0.0, peak_bytes=0, activations=payload, scales=scales,
        attention_mask=mask, labels=labels,
    )  # fmt: skip
    for other in ("exact", "bf16", "fp16", "int8"):
        limits = ReplyLimits(batch=2, length=5, hidden=32, dtype="float32", classes=2, codec=other)
        if other == codec:
            reply.check(None, limits, None)
        else:
            with pytest.raises(ProtocolError, match="activations: expected"):
                reply.check(None, limits, None)
