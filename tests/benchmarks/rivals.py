"""The first-order rivals of a zeroth-order client, as frugal as they honestly get.

Each takes one SGD step of the client half on sum <lambda, f_c(x)>, lambda the loss gradient at the
cut, which is the back-propagation a split first-order client does. All give the update of plain
autograd (tests/strategies/test_rivals.py); they differ in memory and time.

    fo               forward with its graph, backward, step: gradients of all parameters at once
    fo_checkpoint    each block's input is kept, the block run again in the backward pass
    fo_fused         as fo_checkpoint, and each parameter is stepped as soon as its gradient is
                     there, which is then dropped: no gradient buffers; that of the token
                     embedding is sparse
    fo_fused_micro   as fo_fused with the forward and backward of a few sequences at a time. A
                     parameter may only move when all sequences have been through it, so the
                     batch goes through one block after the other: the inputs of all blocks are
                     kept, [cut + 1, B, S, H], and from the last block down one block's gradient
                     is summed over the micro-batches, applied and dropped

Dropout is off, as everywhere here. Attention is the same fused kernel for all.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hosl_flower.models.submodels import ClientSubmodel


def fo(client: ClientSubmodel, ids: Tensor, mask: Tensor, gradient: Tensor, rate: float) -> None:
    """Plain back-propagation and SGD."""
    client(ids, mask).backward(gradient)
    with torch.no_grad():
        for parameter in _trained(client):
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=rate)
            parameter.grad = None


def fo_checkpoint(
    client: ClientSubmodel, ids: Tensor, mask: Tensor, gradient: Tensor, rate: float
) -> None:
    """Activation checkpointing, block by block."""
    with _Checkpointed(client):
        fo(client, ids, mask, gradient, rate)


def fo_fused(
    client: ClientSubmodel, ids: Tensor, mask: Tensor, gradient: Tensor, rate: float
) -> None:
    """Checkpointing with the update fused into the backward pass."""

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.detach().sub_(parameter.grad, alpha=rate)
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(step) for p in _trained(client)]
    try:
        with _Checkpointed(client), _SparseEmbedding(client):
            client(ids, mask).backward(gradient)
    finally:
        for hook in hooks:
            hook.remove()


def fo_fused_micro(
    client: ClientSubmodel,
    ids: Tensor,
    mask: Tensor,
    gradient: Tensor,
    rate: float,
    micro_batch: int = 4,
) -> None:
    """Block after block in micro-batches; one block's gradient at a time."""
    pieces = [slice(i, i + micro_batch) for i in range(0, len(ids), micro_batch)]
    inputs: dict[int, Tensor] = {}  # block -> its inputs [B, S, H]

    def keep(index: int, rows: slice) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            if index not in inputs:
                inputs[index] = args[0].new_empty((len(ids), *args[0].shape[1:]))
            inputs[index][rows] = args[0]

        return hook

    blocks = _blocks(client)
    for rows in pieces:  # the outputs of the last block are what the client sends
        hooks = [b.register_forward_pre_hook(keep(i, rows)) for i, b in enumerate(blocks)]
        with torch.no_grad():
            client(ids[rows], mask[rows])
        for hook in hooks:
            hook.remove()
    # `gradient` becomes that of each block's input in turn, in a buffer of its own
    gradient = gradient.clone()
    for index in reversed(range(len(blocks))):
        with _Only(client, index):
            for rows in pieces:
                hidden = inputs[index][rows].requires_grad_()
                _resume(client, index, hidden, mask[rows]).backward(gradient[rows])
                assert hidden.grad is not None
                gradient[rows] = hidden.grad
        _step(blocks[index].parameters(), rate)
        del inputs[index]
    if not any(p.requires_grad for name, p in client.named_parameters() if ".layers." not in name):
        return
    with _Only(client, -1), _SparseEmbedding(client):  # their output is the first block's input
        for rows in pieces:
            client(ids[rows], mask[rows]).backward(gradient[rows])
    _step(client.parameters(), rate)


def _step(parameters: Iterator[nn.Parameter], rate: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=rate)
                parameter.grad = None


def _trained(client: ClientSubmodel) -> list[nn.Parameter]:
    return [parameter for parameter in client.parameters() if parameter.requires_grad]


def _blocks(client: ClientSubmodel) -> list[nn.Module]:
    decoder: Any = client.decoder
    return [layer for layer in decoder.layers if next(layer.parameters(), None) is not None]


class _Checkpointed:
    """Within it every block keeps its input only and is run again when its graph is needed."""

    def __init__(self, client: ClientSubmodel):
        self.blocks: list[Any] = _blocks(client)

    def __enter__(self) -> None:
        for block in self.blocks:
            block.forward = self._wrapped(block.forward)

    def __exit__(self, *_: Any) -> None:
        for block in self.blocks:
            del block.forward

    @staticmethod
    def _wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


class _SparseEmbedding:
    """Within it the token embedding's gradient is that of the batch's rows, not a dense matrix."""

    def __init__(self, client: ClientSubmodel):
        self.embedding: Any = client.decoder.embed_tokens

    def __enter__(self) -> None:
        self.embedding.sparse = True

    def __exit__(self, *_: Any) -> None:
        self.embedding.sparse = False


class _Only:
    """Within it only one block runs, as transformers runs it, masks and all: the others hand
    their input on. -1: none does."""

    def __init__(self, client: ClientSubmodel, index: int):
        self.others: list[Any] = [b for i, b in enumerate(_blocks(client)) if i != index]

    def __enter__(self) -> None:
        for block in self.others:
            block.forward = lambda hidden, *_, **__: hidden

    def __exit__(self, *_: Any) -> None:
        for block in self.others:
            del block.forward


def _resume(client: ClientSubmodel, index: int, hidden: Tensor, mask: Tensor) -> Tensor:
    """The output of one block, of its inputs [b, S, H]; inside _Only."""
    block = _blocks(client)[index]
    hook = block.register_forward_pre_hook(lambda _, args: (hidden, *args[1:]))
    decoder: Any = client.decoder
    try:
        with torch.no_grad():
            ids = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    finally:
        hook.remove()


RIVALS: dict[str, Callable[..., None]] = {
    "fo": fo,
    "fo_checkpoint": fo_checkpoint,
    "fo_fused": fo_fused,
    "fo_fused_micro": fo_fused_micro,
}
