"""Token after token through the split: the client's half, then the server's, each with a cache.

    client: new token ids [B, S] -> activations [B, S, H]   keys and values of blocks 1..cut stay
    server: activations          -> the next tokens [B]     those of blocks cut+1..n stay

So after the prompts one activation per token and sequence crosses the cut. Prompts of different
lengths are left-padded.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from hosl_flower.errors import ProtocolError
from hosl_flower.models.batch import Batch
from hosl_flower.models.families.base import Absent
from hosl_flower.models.submodels import ClientSubmodel, ServerSubmodel, Submodel

# tokens [B, t] that follow the prompts -> activations and mask of the last, or of the prompts
Ask = Callable[[Tensor], tuple[Tensor, Tensor]]


class Half:
    """One side of the split with a cache of its own: each call goes on where the last ended."""

    def __init__(self, submodel: ClientSubmodel | ServerSubmodel):
        self._run = submodel.hidden if isinstance(submodel, ServerSubmodel) else submodel
        self._cache = own_cache(submodel)
        self._mask: Tensor | None = None

    @torch.no_grad()
    def __call__(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Of S positions more: ids [B, S] or activations [B, S, H], mask [B, S] int64 (1 = token)
        -> activations [B, S, H] or last hidden state [B, S, D]."""
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], 1)
        return self._run(inputs, self._mask, self._cache)

    def tensors(self) -> Iterator[Tensor]:
        """What is cached."""
        for layer in self._cache.layers:
            if isinstance(layer.keys, Tensor):
                yield from (layer.keys, layer.values)


class Prompts:
    """A client's batch of prompts, and what has followed them so far.

    micro_batch: sequences at a time; 0 is all.
    """

    def __init__(self, submodel: ClientSubmodel, batch: Batch, micro_batch: int, device: str):
        self.batch, self.device = batch, device
        self._parts = [(rows, Half(submodel)) for rows in batch.slices(micro_batch)]
        self._tokens: Tensor | None = None  # that have been run

    def follows(self, tokens: Tensor) -> bool:
        """Whether the last of tokens [B, t] is all that has not been run."""
        run = self._tokens
        if run is None or tokens.dim() != 2 or not tokens.shape[1]:
            return False
        return torch.equal(tokens[:, :-1], run)

    def activations(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Of the last of tokens [B, t], or of the prompts where t = 0, in pieces [b, S, H] with the
        number of the first sequence."""
        ids, mask = tokens, torch.ones_like(tokens)
        if self._tokens is None:
            ids = torch.cat([self.batch.input_ids, tokens], 1)
            mask = torch.cat([self.batch.attention_mask, mask], 1)
        else:
            ids, mask = ids[:, -1:], mask[:, -1:]
        self._tokens = tokens
        for rows, half in self._parts:
            found = half(ids[rows].to(self.device), mask[rows].to(self.device))
            yield rows.start, found[:, -1:] if tokens.shape[1] else found

    def mask(self, tokens: Tensor) -> Tensor:
        """Of what `activations` gives, bool [B, S]."""
        own = torch.ones_like(tokens[:, -1:]) if tokens.shape[1] else self.batch.attention_mask
        return own.bool()

    def tensors(self) -> Iterator[Tensor]:
        """What is cached."""
        for _, half in self._parts:
            yield from half.tensors()


def checked(tokens: Tensor, count: int, longest: int, vocabulary: int) -> Tensor:
    """Tokens [count, t] as they came; ProtocolError when they cannot follow `count` prompts."""
    if tokens.shape == (0, 0):
        tokens = tokens.reshape(count, 0)
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or len(tokens) != count:
        raise ProtocolError(
            f"tokens: expected int64[{count}, t] for {count} prompts, got {list(tokens.shape)}"
        )
    known = not tokens.numel() or (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary)
    if tokens.shape[1] > longest or not known:
        raise ProtocolError(f"tokens: expected at most {longest} of 0..{vocabulary - 1}")
    return tokens


class Writer:
    """The server's part. rows: [V, D], its LM head."""

    def __init__(self, submodel: ServerSubmodel, rows: Tensor):
        self._half, self._rows = Half(submodel), rows

    @torch.no_grad()
    def next(self, activations: Tensor, mask: Tensor) -> Tensor:
        """The likeliest tokens int64 [B], on the CPU, after activations [B, S, H], mask [B, S]."""
        h = activations.to(self._rows.device, self._rows.dtype)
        hidden = self._half(h, mask.to(self._rows.device, torch.int64))
        return F.linear(hidden[:, -1], self._rows).argmax(1).cpu()


def greedy(ask: Ask, writer: Writer, longest: int, ends: Collection[int]) -> Tensor:
    """The likeliest tokens int64 [B, t] that follow the prompts: t is `longest`, or where each
    sequence has one of `ends`, which alone follow then."""
    last = torch.tensor(sorted(ends))
    tokens, finished = torch.empty((0, 0), dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    while tokens.shape[1] < longest:
        new = writer.next(*ask(tokens))
        if not len(tokens):
            tokens, finished = new.new_empty((len(new), 0)), torch.zeros(len(new), dtype=torch.bool)
        new = torch.where(finished, last[0], new) if len(last) else new
        tokens = torch.cat([tokens, new.unsqueeze(1)], 1)
        finished = finished | torch.isin(new, last)
        if finished.all():
            break
    return tokens


def own_cache(submodel: Submodel) -> DynamicCache:
    """An empty cache for the blocks of one side.

    Blocks keep their index, so keys and values are where transformers looks for them. But it asks
    the first layer of each kind (sliding window or not) how many tokens are cached, and that may
    be one of the other side's, which never sees any. Such layers are replaced by one of a block
    that is here, of the same kind if there is one (else no block uses that kind's mask). A cache
    with layers in it twice must not be cropped or reordered.
    """
    decoder: Any = submodel.decoder
    cache = DynamicCache(config=decoder.config)
    blocks = getattr(decoder, submodel.family.blocks)
    kinds = cache.is_sliding
    own = [index for index, block in enumerate(blocks) if not isinstance(block, Absent)]
    by_kind = {kinds[index]: cache.layers[index] for index in own}
    for index in range(len(blocks)):
        if own and index not in own:
            cache.layers[index] = by_kind.get(kinds[index], cache.layers[own[0]])
    return cache
