"""Exact back-propagation of a client's half, one block at a time.

Only the inputs of the blocks are kept, [cut, B, S, H]. From the last block down each is run again
with its graph, a micro-batch at a time (activation checkpointing, Chen et al. 2016), and its
gradient is handed out, so that it can be applied and dropped, before the next block's is computed
(as in LOMO, Lv et al. 2023). What is in memory beside the weights is those inputs, lambda and the
gradient at the block in work [B, S, H] each, one block's graph of one micro-batch, and one block's
gradient.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hosl_flower.models.batch import Batch
from hosl_flower.models.blockwise import Blocks, pieces
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.tensors.cut_gradient import Cotangent


def recomputed_gradients(
    submodel: ClientSubmodel,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangent: Cotangent,
    micro_batch: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """(name, gradient) of every parameter given: that of <lambda, f_c>, float32, embeddings' as
    sparse rows. A parameter may be changed as soon as its gradient is there.

    micro_batch: sequences at a time, block after block (blockwise.pieces).
    """
    blocks, device = Blocks(submodel), cotangent.payload.device
    parts = pieces(batch, micro_batch)
    inputs: list[list[Tensor]] = [[] for _ in blocks]
    arguments = []
    with torch.no_grad():
        for rows in parts:
            given, mask = batch.inputs[rows].to(device), batch.attention_mask[rows].to(device)
            hidden, own = blocks.enter(given, mask)
            arguments.append(own)
            for index, kept in enumerate(inputs):
                kept.append(hidden)
                if index + 1 < len(blocks):
                    hidden = blocks.run(index, hidden, own)
            del hidden
    feedback = [cotangent.dense(rows) for rows in parts]
    for index in reversed(range(len(blocks))):
        wanted = {n: p for n, p in blocks.parameters(index) if n in parameters}
        sums: dict[str, Tensor] = {}
        for number, own in enumerate(arguments):
            x = inputs[index][number].requires_grad_()
            with torch.enable_grad():
                y = blocks.run(index, x, own)
            _accumulate(sums, wanted, y, feedback, number, x)
            inputs[index][number] = torch.empty(0)
            del x, y
        for name in list(sums):
            yield name, sums.pop(name)
    inputs.clear()
    yield from _embeddings(submodel, blocks, parameters, batch, feedback, parts)


def _accumulate(
    sums: dict[str, Tensor],
    wanted: Mapping[str, nn.Parameter],
    y: Tensor,
    feedback: list[Tensor],
    number: int,
    x: Tensor | None = None,
) -> None:
    """Add a piece's gradients of `wanted` to sums; its feedback becomes that of the input x."""
    at = [*([] if x is None else [x]), *wanted.values()]
    found = list(torch.autograd.grad(y, at, feedback[number].to(y.dtype), allow_unused=True))
    if x is not None:
        behind = found.pop(0)
        assert behind is not None  # the stream passes through every block
        feedback[number] = behind.float()
    for name, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            sums[name] = sums[name] + gradient.float() if name in sums else gradient.float()


def _embeddings(
    submodel: ClientSubmodel,
    blocks: Blocks,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    feedback: list[Tensor],
    parts: Sequence[slice],
) -> Iterator[tuple[str, Tensor]]:
    """What comes before the blocks; of an embedding only the batch's rows."""
    of_blocks = {name for index in range(len(blocks)) for name, _ in blocks.parameters(index)}
    wanted = {n: p for n, p in parameters.items() if n not in of_blocks}
    if not wanted:
        return
    sums: dict[str, Tensor] = {}
    with _sparse_embeddings(submodel):
        for number, rows in enumerate(parts):
            device = feedback[number].device
            inputs, mask = batch.inputs[rows].to(device), batch.attention_mask[rows].to(device)
            with torch.enable_grad():
                y, _ = blocks.enter(inputs, mask)
            _accumulate(sums, wanted, y, feedback, number)
    for name in list(sums):
        gradient = sums.pop(name)
        yield name, gradient.coalesce() if gradient.is_sparse else gradient


@contextmanager
def _sparse_embeddings(submodel: ClientSubmodel) -> Iterator[None]:
    """Within it embeddings have sparse gradients: not a dense matrix of mostly zeros."""
    embeddings = [m for m in submodel.modules() if isinstance(m, nn.Embedding)]
    for embedding in embeddings:
        embedding.sparse = True
    try:
        yield
    finally:
        for embedding in embeddings:
            embedding.sparse = False
