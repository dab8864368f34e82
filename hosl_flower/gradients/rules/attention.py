"""What residual feedback does within one attention: from the gradient at its output to that at the
queries, keys and values.

    P = softmax(scale Q K^T + mask),  o = P V          d: the gradient at o, one row per token

    dV = P^T d
    dS = P * (d V^T - rowsum(P * (d V^T)))             the gradient at scale Q K^T
    dQ = scale dS K,  dK = scale dS^T Q

Q, K, V and the mask are those that transformers hands to torch's attention, whatever made them:
positions, sliding windows and padding are in them. P is computed again, some sequences and heads at
a time. Groups of query heads that share keys and values sum what theirs get.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SCORES = 2**16  # numbers in a matrix of scores in work: 256 KiB


class Attended(NamedTuple):
    """What one attention was given: query [b, N, S, d], key and value [b, G, S, d] where N / G
    heads share them; mask, boolean or to be added, [b or 1, 1 or N, S, S]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @property
    def shared_by(self) -> int:
        return self.query.shape[1] // self.key.shape[1]


class _Listening(TorchFunctionMode):
    def __init__(self, key_width: int, heard: list[Attended]):
        super().__init__()
        self.key_width, self.heard = key_width, heard

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            scale = kwargs.get("scale")
            # keys and values may have been repeated for the heads that share them, one by one
            repeated = key.shape[1] * key.shape[3] // self.key_width
            self.heard.append(
                Attended(
                    query,
                    key[:, ::repeated],
                    value[:, ::repeated],
                    kwargs.get("attn_mask"),
                    bool(kwargs.get("is_causal")),
                    query.shape[-1] ** -0.5 if scale is None else scale,
                )
            )
        return func(*args, **kwargs)


@contextmanager
def listening(key_width: int) -> Iterator[list[Attended]]:
    """What torch's attention is given within it. key_width: G d, numbers in a token's keys."""
    heard: list[Attended] = []
    with _Listening(key_width, heard):
        yield heard


@torch.no_grad()
def through_attention(attended: Attended, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d [b, N, S, d], the gradient at the attention's output, head by head -> those at query, key
    and value, float32, in their shapes."""
    query, key = attended.query, attended.key
    length, shared = query.shape[2], attended.shared_by
    groups = max(1, min(key.shape[1], _SCORES // (shared * length**2)))
    sequences = max(1, _SCORES // (groups * shared * length**2))
    of_query, of_key, of_value = (torch.empty_like(t, dtype=torch.float32) for t in attended[:3])
    for start in range(0, len(query), sequences):
        rows = slice(start, start + sequences)
        for group in range(0, key.shape[1], groups):
            own = slice(group, group + groups)
            heads = slice(group * shared, (group + groups) * shared)
            found = _some_heads(attended, rows, heads, own, d[rows, heads].float())
            of_query[rows, heads] = found[0]
            for total, each in zip((of_key, of_value), found[1:], strict=True):
                total[rows, own] = each.unflatten(1, (-1, shared)).sum(2)
    return of_query, of_key, of_value


def _some_heads(
    attended: Attended, rows: slice, heads: slice, own: slice, d: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV of these sequences and heads, one for each of the query's heads."""
    query = attended.query[rows, heads].float() * attended.scale
    key, value = (
        t[rows, own].float().repeat_interleave(attended.shared_by, 1)
        for t in (attended.key, attended.value)
    )
    weights = _weights(query @ key.transpose(2, 3), attended, rows, heads)
    of_value = weights.transpose(2, 3) @ d
    of_weights = d @ value.transpose(2, 3)
    of_weights -= (of_weights * weights).sum(3, keepdim=True)
    of_scores = weights.mul_(of_weights)
    return of_scores @ key * attended.scale, of_scores.transpose(2, 3) @ query, of_value


def _weights(scores: Tensor, attended: Attended, rows: slice, heads: slice) -> Tensor:
    """P. A token that sees nothing, padding before a sequence, sees all alike: its d is zero."""
    lowest = torch.finfo(scores.dtype).min
    if attended.causal:
        length = scores.shape[-1]
        later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(later, lowest)
    mask = attended.mask
    if mask is not None:
        mask = mask[rows] if len(mask) > 1 else mask
        mask = mask[:, heads] if mask.shape[1] > 1 else mask
        scores = scores.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return scores.clamp_(min=lowest).softmax(3)


def unrotate(g: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """From the gradient at rotated queries or keys [b, N, S, d] to that at those not rotated.

    rotary: cos and sin [b or 1, S, d] of x cos + rot(x) sin with rot(x) = (-x_2, x_1), halves of
    d; rot's transpose is -rot.
    """
    cos, sin = (t.unsqueeze(1).float() for t in rotary)
    first, second = (g * sin).chunk(2, 3)
    return g * cos + torch.cat((second, -first), 3)
