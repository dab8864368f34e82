"""Exact back-propagation, block by block, by the rules of a block instead of autograd.

No block has a graph. A block has two stages, its MLP and then its attention. Each runs the block
again up to its own last matrix and applies the chain rule by hand, some tokens at a time, so that
only one half's gradients are in memory and temporaries are small beside a block's weights. The
gradient is that of back-propagation to rounding. It needs a model whose blocks the rules know
(`rules.stream`); `recompute` works for all.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from hosl_flower.errors import ConfigError
from hosl_flower.gradients.backward import blockwise_gradients
from hosl_flower.gradients.rules.block import BlockRule, Rotary, Run, ruled_parameters
from hosl_flower.models.batch import Batch
from hosl_flower.models.blockwise import Arguments, Blocks, pieces
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.tensors.cut_gradient import Cotangent

_PIECE_TOKENS = 256  # of which a stage holds the block's inside, queries to MLP, at a time


def check_exact(submodel: ClientSubmodel, names: Collection[str]) -> None:
    """Refuse a model with blocks or trainable parameters that the rules do not know.

    Args:
        submodel: the client submodel.
        names: its trainable parameters, by canonical name.

    Raises:
        ConfigError: if there is one.
    """
    known = ruled_parameters(submodel)
    blocks = Blocks(submodel)
    own = {name for index in range(len(blocks)) for name, _ in blocks.parameters(index)}
    unknown = sorted(own.intersection(names) - known)
    if unknown:
        raise ConfigError(
            f"client-gradient = exact has no rule for {unknown[0]}; use client-gradient = recompute"
        )


def exact_gradients(
    submodel: ClientSubmodel,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangent: Cotangent,
    micro_batch: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of <lambda, f_c> with respect to every parameter given.

    Args:
        submodel: the client submodel f_c.
        parameters: the parameters that want a gradient, which `check_exact` has passed.
        batch: the mini-batch.
        cotangent: lambda, the loss gradient at the cut layer.
        micro_batch: sequences at a time, block after block (`blockwise.pieces`).

    Yields:
        (name, gradient): float32; embeddings' as sparse rows. A parameter may be changed as soon
        as its gradient is yielded.
    """

    def stages(blocks: Blocks, index: int) -> Iterator[_Half]:
        rule = BlockRule(submodel, blocks[index], index, parameters)
        yield _Half(blocks, index, rule, rule.run_mlp)
        yield _Half(blocks, index, rule, rule.run_attention)

    parts = pieces(batch, micro_batch, _PIECE_TOKENS)
    yield from blockwise_gradients(submodel, parameters, batch, cotangent, parts, stages)


class _Half:
    """Half of a block, as a stage of `backward`."""

    def __init__(
        self,
        blocks: Blocks,
        index: int,
        rule: BlockRule,
        through: Callable[[Run, Tensor, Rotary], Tensor],
    ):
        self._blocks, self._index, self._through = blocks, index, through
        self.gradients = rule.sums.gradients

    def back(self, x: Tensor, g: Tensor, arguments: Sequence[Arguments]) -> Tensor:
        forward = partial(self._blocks.run, self._index, x, arguments)
        return self._through(forward, g, arguments[self._index].named.get("position_embeddings"))
