"""How large the numbers of honest clients are, so that absurd ones can be told from them.

The server holds the base model's numbers before any client has sent one. So it computes what the
activations of some tokens, or of a made-up image, are at the cut, and looks how large the weights
are that clients train. Bounds are many times that:

    activations                    1,000 times the largest of the reference's
    weights, and their changes     100 times the largest weight, or 100 if that is more
    gradients of hidden states     100 times the largest weight of the head, which bounds them by
                                   twice its value (models/label_head.py), or 100 if that is more

Honest activations are within a few times the reference's: a base model's largest values, which are
a hundred times the others, are at an input's first positions, whatever is there. So a bound meets
nothing but nonsense, or training that has diverged, and a run of honest clients gives the same bits
with it. What is within it is for aggregation to judge (aggregation, scalar-clip). The reference
follows from the base model alone: a run that is resumed has the same bounds.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosl_flower.data.encoders.base import ExampleEncoder
from hosl_flower.models.submodels import ClientSubmodel, ServerSubmodel
from hosl_flower.tensors.raw_bytes import largest

_ACTIVATIONS, _WEIGHTS = 1e3, 1e2  # times the reference's
_POSITIONS = 16  # of the reference's tokens


class Reference(NamedTuple):
    """Most that values may be: of activations, of weights and what changes them in one step, of
    gradients of the hidden states that labels on a client are compared with."""

    activation: float
    weight: float
    head: float


NO_REFERENCE = Reference(math.inf, math.inf, math.inf)


@torch.no_grad()
def reference_of(
    client: ClientSubmodel, server: ServerSubmodel, encoder: ExampleEncoder, config: Any
) -> Reference:
    """Of a base model's halves; the client's is on the CPU. config: of the model."""
    inputs, mask = _inputs(encoder, config)
    weights = max((largest(p) for p in client.parameters() if p.is_floating_point()), default=0.0)
    return Reference(
        _ACTIVATIONS * largest(client(inputs, mask)),
        _WEIGHTS * max(1.0, weights),
        _WEIGHTS * max(1.0, largest(server.lm_head.weight)),
    )


def _inputs(encoder: ExampleEncoder, config: Any) -> tuple[Tensor, Tensor]:
    """Of one example: tokens from all over the vocabulary, or pixels between -1 and 1."""
    batch = encoder.largest(1)
    inputs, mask = batch.inputs[:1], batch.attention_mask[:1]
    if inputs.is_floating_point():
        return torch.arange(float(inputs.numel())).cos().view(inputs.shape), mask
    count = min(_POSITIONS, inputs.shape[-1])
    tokens = torch.arange(count) * (config.vocab_size // count)
    return tokens.unsqueeze(0), mask[:, :count]
