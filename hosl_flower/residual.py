"""Residual feedback: gradients of a client's half without back-propagating through it.

In a pre-norm transformer every block adds to a stream, h_out = h_in + attention + MLP, and the
stream ends at the cut. For a matrix W that writes to it (the attention's output projection, the
MLP's second matrix), y = W x, the chain rule says

    dL/dW = sum_tokens g x^T,   g = J^T lambda,   lambda = dL/dh_cut

with J the Jacobian of the later client blocks, the identity plus what those blocks do. Residual
feedback takes g = lambda: the later blocks are skipped on the way back, as they can be on
the way forward. The last block's MLP has no block after it, so there it is the gradient itself;
for the embeddings, which are added to the stream too, each token's gradient is its lambda.

What is needed is x, which one more forward pass has at hand: no graph, no backward pass, and one
block's sums at a time. docs/residual.md has the derivation, its relatives (feedback alignment,
Lillicrap et al. 2016; synthetic gradients, Jaderberg et al. 2017) and where it fails. Matrices
that only read from the stream (queries, keys, values, the MLP's first) and norms stay as they are.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hosl_flower.blockwise import Blocks
from hosl_flower.errors import ConfigError
from hosl_flower.families import family_of
from hosl_flower.gradient import sparse_rows
from hosl_flower.split import ClientSubmodel
from hosl_flower.surrogate import Cotangent
from hosl_flower.tasks import Batch

_CHUNK_TOKENS = 2048  # of 16-bit inputs, widened at a time


def fed_back(submodel: ClientSubmodel, names: Collection[str]) -> list[str]:
    """Which of these parameters residual feedback trains. ConfigError for a model whose stream is
    no plain sum, or when there are none."""
    config = _config(submodel)
    family = family_of(config)
    if not family.has_plain_stream(config):
        raise ConfigError(
            "client-gradient = residual needs a pre-norm model that adds its embeddings to the "
            "stream as they are; use recompute"
        )
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    adding = [f"decoder.{name}" for name in family.embedded(nothing, nothing)]
    for index in range(len(Blocks(submodel))):
        for writer in family.writers:
            adding += [f"decoder.layers.{index}.{writer}.{kind}" for kind in ("weight", "bias")]
    known = set(map(submodel.canonical, adding))
    found = [name for name in names if name in known]
    if not found:
        raise ConfigError(
            "client-gradient = residual trains embeddings and what blocks add to the stream: it "
            "needs client-trainable = full, or blocks with cut-layer > 0"
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

    micro_batch: sequences at a time, block after block; 0 is all.
    """
    blocks, device = Blocks(submodel), cotangent.payload.device
    pieces, running = batch.slices(micro_batch), []
    for rows in pieces:
        ids, mask = batch.input_ids[rows].to(device), batch.attention_mask[rows].to(device)
        running.append(blocks.enter(ids, mask))
    for index in range(len(blocks)):
        sums: dict[str, Tensor] = {}
        for number, rows in enumerate(pieces):
            hidden, arguments = running[number]
            with _fed(submodel, blocks, index, cotangent.dense(rows), parameters, sums):
                hidden = blocks.run(index, hidden, arguments)
            running[number] = hidden, arguments
        del hidden
        for name in list(sums):
            yield name, sums.pop(name)
    running.clear()
    yield from _embedded(submodel, parameters, batch, cotangent, pieces)


@contextmanager
def _fed(
    submodel: ClientSubmodel,
    blocks: Blocks,
    index: int,
    feedback: Tensor,
    parameters: Mapping[str, nn.Parameter],
    sums: dict[str, Tensor],
) -> Iterator[None]:
    """Within it block `index` adds to `sums` what its writers' inputs and lambda [b, S, H] give."""
    g = feedback.flatten(0, 1)

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], __: Any) -> None:
        x = args[0].flatten(0, -2)
        if f"{name}.weight" in parameters:
            total = sums.setdefault(f"{name}.weight", g.new_zeros(g.shape[1], x.shape[1]))
            size = len(x) if x.dtype == torch.float32 else _CHUNK_TOKENS
            for start in range(0, len(x), size):
                own = slice(start, start + size)
                total.addmm_(g[own].T, x[own].float())
        if f"{name}.bias" in parameters:
            sums.setdefault(f"{name}.bias", g.new_zeros(g.shape[1])).add_(g.sum(0))

    handles = []
    for writer in family_of(_config(submodel)).writers:
        name = submodel.canonical(f"decoder.layers.{index}.{writer}")
        module = blocks[index].get_submodule(writer)
        handles.append(module.register_forward_hook(partial(hook, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _embedded(
    submodel: ClientSubmodel,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    cotangent: Cotangent,
    pieces: Sequence[slice],
) -> Iterator[tuple[str, Tensor]]:
    """Each row of an embedding gets the sum of the lambdas of its tokens."""
    device, mask = cotangent.payload.device, batch.attention_mask
    for name, rows in family_of(_config(submodel)).embedded(batch.input_ids, mask).items():
        name = submodel.canonical(f"decoder.{name}")
        if name not in parameters:
            continue
        # padding is no token: nothing attends to it, its lambda is zero
        used, place = rows.where(mask.bool(), -1).unique(return_inverse=True)
        padded = int(used[0] == -1)
        shape = parameters[name].shape
        total = torch.zeros(len(used), shape[1], device=device)
        for piece in pieces:
            index = place[piece].flatten().to(device)
            total.index_add_(0, index, cotangent.dense(piece).flatten(0, 1))
        yield name, sparse_rows(used[padded:].to(device), total[padded:], shape)


def _config(submodel: ClientSubmodel) -> Any:
    decoder: Any = submodel.decoder
    return decoder.config
