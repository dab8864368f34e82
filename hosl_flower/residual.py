"""Residual feedback: a client gradient from one forward pass, each block by itself.

In a pre-norm transformer blocks add to a stream that ends at the cut:

    h' = h + attention(h),   h'' = h' + mlp(h'),   mlp(h') = W2 relu(W1 norm(h') + b1) + b2

With g the loss gradient at a block's output, back-propagation gives dL/dW2 = sum_tokens g a^T and
so on, but g is lambda = dL/dh_cut through all later blocks, which takes a backward pass. Each
later block's Jacobian is the identity plus what the block does. Residual feedback keeps the
identity and takes g = lambda in every block. Within a block the MLP, which acts on each token by
itself, is seen through, since all that takes is at hand while the block runs:

    d   = (W2^T g) * [a > 0]                 a = relu(...)     -> W2: g a^T,  W1: d norm(h')^T
    g'  = g + J_norm(h')^T W1^T d            what the attention's output gets: W_o: g' o^T

and the embeddings get g' of the first block. No graph, no pass in reverse order, nothing kept of
one block for another: a block's gradients are whole, and can be applied, before the next block
runs. The last block's MLP gets the exact gradient. Queries, keys, values and the norm before them
are not trained. Derivation, relatives and limits: docs/residual.md.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hosl_flower.blockwise import Blocks, pieces
from hosl_flower.errors import ConfigError
from hosl_flower.families import family_of
from hosl_flower.gradient import sparse_rows
from hosl_flower.split import ClientSubmodel
from hosl_flower.surrogate import Cotangent
from hosl_flower.tasks import Batch

_CHUNK_TOKENS = 256  # whose feedback is worked out at a time: small beside what a block makes


def fed_back(submodel: ClientSubmodel, names: Collection[str]) -> list[str]:
    """Which of these parameters residual feedback trains. ConfigError for a model whose stream is
    no plain sum, or when there are none."""
    config = _config(submodel)
    family = family_of(config)
    parts = family.residual_parts(config)
    if parts is None:
        raise ConfigError(
            "client-gradient = residual needs a pre-norm model with a ReLU MLP that adds its "
            "embeddings to the stream as they are; use recompute"
        )
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    trained = [f"decoder.{name}" for name in family.embedded(nothing, nothing)]
    for index in range(len(Blocks(submodel))):
        for part in parts:
            block = f"decoder.{family.blocks}.{index}"
            trained += [f"{block}.{part}.{kind}" for kind in ("weight", "bias")]
    known = set(map(submodel.canonical, trained))
    found = [name for name in names if name in known]
    if not found:
        raise ConfigError(
            "client-gradient = residual trains embeddings, MLPs and the attention's output: it "
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

    micro_batch: sequences at a time, block after block (blockwise.pieces).
    """
    blocks, device = Blocks(submodel), cotangent.payload.device
    parts = pieces(batch, micro_batch)
    embeddings = _Embeddings(submodel, parameters, batch, device)
    running = []
    for rows in parts:
        ids, mask = batch.input_ids[rows].to(device), batch.attention_mask[rows].to(device)
        running.append(blocks.enter(ids, mask))
        if not len(blocks):
            embeddings.add(rows, cotangent.dense(rows))
    if not len(blocks):
        yield from embeddings.gradients()
    for index in range(len(blocks)):
        feedback = _Feedback(submodel, blocks[index], index, parameters)
        for number, rows in enumerate(parts):
            hidden, arguments = running[number]
            with feedback.of(cotangent.dense(rows)):
                running[number] = blocks.run(index, hidden, arguments), arguments
            if not index:
                embeddings.add(rows, feedback.before)
        feedback.clear()
        if not index:
            yield from embeddings.gradients()
        yield from feedback.gradients()


class _Feedback:
    """The rule of one block, summed over pieces. before: g' of the latest piece, as the
    attention's output gets it; of the first block only, where embeddings want it."""

    before: Tensor

    def __init__(
        self,
        submodel: ClientSubmodel,
        block: nn.Module,
        index: int,
        parameters: Mapping[str, nn.Parameter],
    ):
        self.parameters, self.first = parameters, index == 0
        family = submodel.family
        parts = family.residual_parts(_config(submodel))
        if parts is None:
            raise ConfigError("this model has no plain residual stream")  # fed_back has said so
        self.parts = parts
        block_name = f"decoder.{family.blocks}.{index}"
        self._name = {p: submodel.canonical(f"{block_name}.{p}") for p in parts}
        self._module: dict[str, Any] = {p: block.get_submodule(p) for p in self.parts}
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def of(self, feedback: Tensor) -> Iterator[None]:
        """Within it the block runs, once, on the tokens whose g is `feedback` [b, S, H]."""
        g = feedback.flatten(0, 1)
        seen: list[Tensor] = []  # o, the attention's output before its projection, and h'

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].flatten(0, -2))

        def learn(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            tokens = zip(
                *(t.split(_CHUNK_TOKENS) for t in (g, args[0].flatten(0, -2), *seen)), strict=True
            )
            seen.clear()
            before = []
            self._wide = {p: module[p].weight.float() for p in (self.parts.up, self.parts.down)}
            for some in tokens:
                own = self._learn(*some)
                if self.first:
                    before.append(own)
            self._wide.clear()
            if before:
                self.before = torch.cat(before)

        module = self._module
        hooks = [
            module[self.parts.attention].register_forward_pre_hook(note),
            module[self.parts.norm].register_forward_pre_hook(note),
            module[self.parts.down].register_forward_hook(learn),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _learn(self, g: Tensor, a: Tensor, o: Tensor, h: Tensor) -> Tensor:
        """Add what some tokens [n, ...] say; their g'."""
        attention, norm, up, down = self.parts
        self._add(down, g, a)
        d = (g @ self._wide[down]).mul_(a > 0)
        gamma, shift = self._module[norm].weight, self._module[norm].bias
        h = h.float()
        centred = h - h.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + self._module[norm].eps).rsqrt_()
        unit = centred.mul_(scale)
        normed = unit if gamma is None else unit * gamma.float() + shift.float()
        self._add(up, d, normed)
        du = d @ self._wide[up]
        if (total := self._sum(f"{self._name[norm]}.bias")) is not None:
            total += du.sum(0)
        if (total := self._sum(f"{self._name[norm]}.weight")) is not None:
            total += (du * unit).sum(0)
        if gamma is not None:
            du.mul_(gamma.float())
        # J_norm^T: what is left when mean and spread are held
        du -= du.mean(1, keepdim=True) + unit * (du * unit).mean(1, keepdim=True)
        before = g + du.mul_(scale)
        self._add(attention, before, o)
        return before

    def _add(self, part: str, g: Tensor, x: Tensor) -> None:
        """y = W x + b with g [n, out] at y: W gets g x^T, b gets g."""
        if (total := self._sum(f"{self._name[part]}.weight")) is not None:
            total.addmm_(g.T, x.float())
        if (total := self._sum(f"{self._name[part]}.bias")) is not None:
            total += g.sum(0)

    def _sum(self, name: str) -> Tensor | None:
        """The sum so far of a parameter's gradient; None where it is not wanted."""
        if name not in self.parameters:
            return None
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(self.parameters[name], dtype=torch.float32)
        return self._sums[name]

    def clear(self) -> None:
        """Let go of what is not a gradient."""
        self.__dict__.pop("before", None)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The sums, each let go as it is handed out."""
        for name in list(self._sums):
            yield name, self._sums.pop(name)


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
        taken = family_of(_config(submodel)).embedded(batch.input_ids, mask)
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


def _config(submodel: ClientSubmodel) -> Any:
    decoder: Any = submodel.decoder
    return decoder.config
