"""Residual feedback: a client gradient block by block in forward order, each block by itself.

In a pre-norm transformer blocks add to a stream that ends at the cut:

    h' = h + attention(norm(h)),   h'' = h' + mlp(norm(h'))

With g the loss gradient at a block's output, back-propagation gives the gradients of all its
matrices, but g is lambda = dL/dh_cut through all later blocks, which takes a backward pass. Each
later block's Jacobian is the identity plus what the block does. Residual feedback keeps the
identity and takes g = lambda in every block. What is within a block is seen through by hand, since
all that takes is at hand while the block runs (block.py); the embeddings get what the first
block's input gets. In other words: block-wise back-propagation with the Jacobian between blocks set
to the identity. There is no backward pass between blocks, and nothing is kept of one block for
another: a block's gradients are whole, and can be applied, before the next block runs. Within a
block the chain rule is a backward step written by hand. The last block's gradients are exact.
Derivation, relatives and limits: docs/explanation/residual-feedback.md.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hosl_flower.errors import ConfigError
from hosl_flower.gradients.rules.block import BlockRule, ruled_parameters
from hosl_flower.gradients.rules.stream import embedded_rows
from hosl_flower.models.batch import Batch
from hosl_flower.models.blockwise import Blocks, pieces
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.optim.gradient import sparse_rows
from hosl_flower.tensors.cut_gradient import Cotangent

_PIECE_TOKENS = 128  # of each its queries, keys, values and g' are held beside its MLP's inside


def fed_back(submodel: ClientSubmodel, names: Collection[str]) -> list[str]:
    """Which of these parameters residual feedback trains. ConfigError for a model whose stream is
    no plain sum, or when there are none."""
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    embedded = (f"decoder.{name}" for name in embedded_rows(submodel, nothing, nothing))
    known = ruled_parameters(submodel).union(map(submodel.canonical, embedded))
    found = [name for name in names if name in known]
    if not found:
        raise ConfigError(
            "client-gradient = residual trains embeddings, blocks and adapters in blocks: it needs "
            "client-trainable = full, or blocks or lora with cut-layer > 0"
        )
    return found


@torch.no_grad()
def residual_gradients(
    submodel: ClientSubmodel,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangent: Cotangent,
    micro_batch: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """(name, gradient) of every parameter given, all of which `fed_back` has chosen: float32,
    embeddings' as sparse rows. A parameter may be changed as soon as its gradient is there.

    micro_batch: sequences at a time, block after block (blockwise.pieces).
    """
    blocks, device = Blocks(submodel), cotangent.payload.device
    parts = pieces(batch, micro_batch, _PIECE_TOKENS)
    embeddings = _Embeddings(submodel, parameters, batch, device)
    running = []
    for rows in parts:
        inputs, mask = batch.inputs[rows].to(device), batch.attention_mask[rows].to(device)
        running.append(blocks.enter(inputs, mask))
        if not len(blocks):
            embeddings.add(rows, cotangent.dense(rows))
    if not len(blocks):
        yield from embeddings.gradients()
    for index in range(len(blocks)):
        rule = BlockRule(submodel, blocks[index], index, parameters)
        for number, rows in enumerate(parts):
            hidden, arguments = running[number]
            output, before = rule.run(
                partial(blocks.run, index, hidden, arguments),
                cotangent.dense(rows),
                arguments[index].named.get("position_embeddings"),
                passes_on=not index,
            )
            running[number] = output, arguments
            if before is not None:
                embeddings.add(rows, before)
            del hidden, output, before
        if not index:
            yield from embeddings.gradients()
        yield from rule.sums.gradients()


class _Embeddings:
    """Each row of an embedding gets the sum of what its tokens get."""

    def __init__(
        self,
        submodel: ClientSubmodel,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        device: torch.device,
    ):
        self._parts: list[tuple[str, torch.Size, Tensor, Tensor, Tensor]] = []
        mask = batch.attention_mask
        taken = embedded_rows(submodel, batch.inputs, mask)
        for name, rows in taken.items():
            name = submodel.canonical(f"decoder.{name}")
            if name in parameters:
                # padding is no token: nothing attends to it, its lambda is zero
                used, place = rows.where(mask.bool(), -1).unique(return_inverse=True)
                shape = parameters[name].shape
                total = torch.zeros(len(used), shape[1], device=device)
                self._parts.append((name, shape, used.to(device), place.to(device), total))

    def add(self, rows: slice, feedback: Tensor) -> None:
        """Some sequences' g' [b, S, H] or [b * S, H]."""
        for _, _, _, place, total in self._parts:
            own, g = place[rows].flatten(), feedback.reshape(-1, total.shape[1])
            if total.is_cuda:  # there index_add_ adds in any order, and this in one
                total.index_put_((own,), g, accumulate=True)
            else:
                total.index_add_(0, own, g)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """As sparse rows."""
        while self._parts:
            name, shape, used, _, total = self._parts.pop()
            padded = int(used[0] == -1)
            yield name, sparse_rows(used[padded:], total[padded:], shape)
