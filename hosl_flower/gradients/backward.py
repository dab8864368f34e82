"""Back-propagation of a client submodel, one block at a time.

The forward pass keeps only the inputs of the blocks, [cut, B, S, H]. From the last block down, each
block is visited again, a micro-batch at a time (activation checkpointing, Chen et al. 2016), and
its gradient is handed out, so that it can be applied and dropped before the next one is computed
(as in LOMO, Lv et al. 2023). Beside the weights there are in memory those inputs, the gradient at
the block in work [B, S, H], one block's temporaries of one micro-batch, and the gradient of one
block or of a part of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from hosl_flower.models.batch import Batch
from hosl_flower.models.blockwise import Arguments, Blocks
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.tensors.cut_gradient import Cotangent


class Stage(Protocol):
    """Back-propagation through a block, or through a part of it."""

    def back(self, x: Tensor, g: Tensor, arguments: Sequence[Arguments]) -> Tensor:
        """Add the gradients of one piece of the batch.

        Args:
            x: the block's input [b, S, H].
            g: the gradient at the output of this stage [b, S, H], float32.
            arguments: the other arguments of the blocks.

        Returns:
            The gradient at the input of this stage [b, S, H], float32.
        """

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, gradient), float32, each let go as it is handed out."""


Stages = Callable[[Blocks, int], Iterable[Stage]]


@torch.no_grad()
def blockwise_gradients(
    submodel: ClientSubmodel,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangent: Cotangent,
    parts: Sequence[slice],
    stages: Stages,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of <lambda, f_c> with respect to every parameter given.

    A parameter may be changed as soon as its gradient is yielded.

    Args:
        submodel: the client submodel f_c.
        parameters: the parameters that want a gradient, by canonical name.
        batch: the mini-batch.
        cotangent: lambda, the loss gradient at the cut layer.
        parts: the rows of the batch that are run at a time.
        stages: gives the stages of a block, from its output to its input.

    Yields:
        (name, gradient): float32; embeddings' as sparse rows.
    """
    blocks, device = Blocks(submodel), cotangent.payload.device
    inputs, arguments = _block_inputs(blocks, batch, parts, device)
    feedback = [cotangent.dense(rows) for rows in parts]
    for index in reversed(range(len(blocks))):
        kept = inputs.pop()
        *early, last = stages(blocks, index)
        for stage in (*early, last):
            for number, own in enumerate(arguments):
                feedback[number] = stage.back(kept[number], feedback[number], own)
                if stage is last:
                    kept[number] = torch.empty(0)
            yield from stage.gradients()
    yield from _embeddings(submodel, blocks, parameters, batch, feedback, parts)


def _block_inputs(
    blocks: Blocks, batch: Batch, parts: Sequence[slice], device: torch.device
) -> tuple[list[list[Tensor]], list[list[Arguments]]]:
    """Run the blocks but the last. Returns each block's inputs, and the blocks' other arguments,
    piece by piece."""
    inputs: list[list[Tensor]] = [[] for _ in blocks]
    arguments = []
    for rows in parts:
        given, mask = batch.inputs[rows].to(device), batch.attention_mask[rows].to(device)
        hidden, own = blocks.enter(given, mask)
        arguments.append(own)
        for index, kept in enumerate(inputs):
            kept.append(hidden)
            if index + 1 < len(blocks):
                hidden = blocks.run(index, hidden, own)
        del hidden
    return inputs, arguments


class GraphSums:
    """Gradients by autograd, summed over the pieces of a batch.

    Args:
        wanted: the parameters, by canonical name.
    """

    def __init__(self, wanted: Mapping[str, nn.Parameter]):
        self._wanted = wanted
        self._sums: dict[str, Tensor] = {}

    def add(self, y: Tensor, g: Tensor, x: Tensor | None = None) -> Tensor | None:
        """Add a piece's gradients.

        Args:
            y: an output with its graph.
            g: the gradient at y.
            x: an input of the graph.

        Returns:
            The gradient at x, float32.
        """
        at = [*([] if x is None else [x]), *self._wanted.values()]
        found = list(torch.autograd.grad(y, at, g.to(y.dtype), allow_unused=True))
        before = None if x is None else found.pop(0)
        for name, gradient in zip(self._wanted, found, strict=True):
            if gradient is not None:
                sums = self._sums
                sums[name] = sums[name] + gradient.float() if name in sums else gradient.float()
        return None if before is None else before.float()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, gradient), each let go as it is handed out."""
        for name in list(self._sums):
            gradient = self._sums.pop(name)
            yield name, gradient.coalesce() if gradient.is_sparse else gradient


def _embeddings(
    submodel: ClientSubmodel,
    blocks: Blocks,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    feedback: list[Tensor],
    parts: Sequence[slice],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradients of the parameters before the blocks; of an embedding the batch's rows."""
    of_blocks = {name for index in range(len(blocks)) for name, _ in blocks.parameters(index)}
    wanted = {n: p for n, p in parameters.items() if n not in of_blocks}
    if not wanted:
        return
    sums = GraphSums(wanted)
    with _sparse_embeddings(submodel):
        for g, rows in zip(feedback, parts, strict=True):
            inputs, mask = batch.inputs[rows].to(g.device), batch.attention_mask[rows].to(g.device)
            with torch.enable_grad():
                y, _ = blocks.enter(inputs, mask)
            sums.add(y, g)
    yield from sums.gradients()


@contextmanager
def _sparse_embeddings(submodel: ClientSubmodel) -> Iterator[None]:
    """Make the gradients of embeddings sparse: rows instead of a dense matrix of mostly zeros."""
    embeddings = [m for m in submodel.modules() if isinstance(m, nn.Embedding)]
    for embedding in embeddings:
        embedding.sparse = True
    try:
        yield
    finally:
        for embedding in embeddings:
            embedding.sparse = False
