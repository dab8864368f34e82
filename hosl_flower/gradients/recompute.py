"""Exact back-propagation, block by block, with autograd inside of each block.

Each block is run again with its graph. It works for every model family; where the rules of
`hosl_flower.gradients.rules` know the model, `exact` gives the same gradient in less memory.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hosl_flower.gradients.backward import GraphSums, blockwise_gradients
from hosl_flower.models.batch import Batch
from hosl_flower.models.blockwise import Arguments, Blocks, pieces
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.tensors.cut_gradient import Cotangent


def recomputed_gradients(
    submodel: ClientSubmodel,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangent: Cotangent,
    micro_batch: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of <lambda, f_c> with respect to every parameter given.

    Args:
        submodel: the client submodel f_c.
        parameters: the parameters that want a gradient, by canonical name.
        batch: the mini-batch.
        cotangent: lambda, the loss gradient at the cut layer.
        micro_batch: sequences at a time, block after block (`blockwise.pieces`).

    Yields:
        (name, gradient): float32; embeddings' as sparse rows. A parameter may be changed as soon
        as its gradient is yielded.
    """

    def stages(blocks: Blocks, index: int) -> list[_Block]:
        return [_Block(blocks, index, parameters)]

    parts = pieces(batch, micro_batch)
    yield from blockwise_gradients(submodel, parameters, batch, cotangent, parts, stages)


class _Block:
    """A block with its graph, as a stage of `backward`."""

    def __init__(self, blocks: Blocks, index: int, parameters: Mapping[str, nn.Parameter]):
        self._blocks, self._index = blocks, index
        self._sums = GraphSums({n: p for n, p in blocks.parameters(index) if n in parameters})
        self.gradients = self._sums.gradients

    def back(self, x: Tensor, g: Tensor, arguments: Sequence[Arguments]) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = self._blocks.run(self._index, x, arguments)
        before = self._sums.add(y, g, x)
        assert before is not None  # the stream passes through every block
        return before
