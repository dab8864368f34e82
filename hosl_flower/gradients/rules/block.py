"""What residual feedback does within one block: the gradients its matrices get from g.

    h' = h + W_o o(norm(h)),   h'' = h' + mlp(norm(h')),   g at h'' and so at the MLP's output

    W2: g a^T,   da = W2^T g                               a = W2's input, n = norm(h')
    W1: dz n^T,  dz = da * s'(z)                           a plain MLP, a = s(z), z = W1 n
    Wg: dz n^T,  dz = da * u * s'(z)                       a gated MLP, a = s(z) * u, z = Wg n,
    Wu: du n^T,  du = da * s(z)                                                       u = Wu n
    Wo: g' o^T,  g' = g + J_norm^T (W1^T dz  or  Wg^T dz + Wu^T du)

    W_q, W_k, W_v: dq m^T, dk m^T, dv m^T                  m = norm(h)
    (dq, dk, dv): of W_o^T g' through the attention        attention.py
    what the block's input gets: g' + J_norm^T (W_q^T dq + W_k^T dk + W_v^T dv)

n, m, z and u are computed again from h' and h, a few tokens at a time, rather than kept; s' by
forward-mode differentiation of transformers' own activation, or read off a where that is relu.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hosl_flower.gradients.rules.attention import (
    Attended,
    listening,
    through_attention,
    unrotate,
)
from hosl_flower.gradients.rules.linear import LinearMap, Sums, at_hand
from hosl_flower.gradients.rules.norm import Norm
from hosl_flower.gradients.rules.stream import Parts, block_parts
from hosl_flower.models.blockwise import Blocks
from hosl_flower.models.submodels import ClientSubmodel

_KINDS = ("weight", "bias", "lora_A.weight", "lora_B.weight")
Run = Callable[[], Tensor]
Rotary = tuple[Tensor, Tensor] | None

_CHUNK_TOKENS = 128  # whose feedback is worked out at a time: small beside what a block makes


def ruled_parameters(submodel: ClientSubmodel) -> set[str]:
    """Return the canonical names of the parameters in blocks that the rules give gradients for.

    Raises:
        ConfigError: for a model whose blocks the rules do not know.
    """
    parts, family = _trained(block_parts(submodel)), submodel.family
    return {
        submodel.canonical(f"decoder.{family.blocks}.{index}.{part}.{kind}")
        for index in range(len(Blocks(submodel)))
        for part in parts
        for kind in _KINDS
    }


def _trained(parts: Parts) -> list[str]:
    """List the modules with weights and biases that a block's rules go by."""
    mlp = [p for p in (parts.norm, parts.up, parts.gate, parts.down) if p]
    return [parts.entry, *parts.projections, *parts.head_norms, parts.attention, *mlp]


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some tokens of each [n, ...] at a time."""
    return zip(*(tensor.split(_CHUNK_TOKENS) for tensor in tensors), strict=True)


class _Noted(Exception):
    """End a block's run once the inputs that a rule needs are noted."""


class BlockRule:
    """The chain rule of one block, by hand. Its gradients are summed over pieces of a batch.

    Args:
        submodel: the client submodel.
        block: one of its blocks.
        index: the block's index.
        parameters: the parameters that want a gradient, by canonical name.
    """

    def __init__(
        self,
        submodel: ClientSubmodel,
        block: nn.Module,
        index: int,
        parameters: Mapping[str, nn.Parameter],
    ):
        self.parts, self.sums = block_parts(submodel), Sums(parameters)
        prefix = f"decoder.{submodel.family.blocks}.{index}"
        parts = _trained(self.parts)
        self._name = {p: submodel.canonical(f"{prefix}.{p}") for p in parts}
        self._module: dict[str, Any] = {p: block.get_submodule(p) for p in parts}
        self._map = {
            p: LinearMap(self._module[p], self._name[p], submodel.family.transposed, self.sums)
            for p in (*self.parts.projections, self.parts.attention, *self._mlp())
        }
        self._activation: Any = block.get_submodule(self.parts.activation)
        owner, _, attribute = self.parts.scaling.rpartition(".")
        self._scaling = getattr(block.get_submodule(owner), attribute) if attribute else 1.0

    def run(
        self, forward: Run, g: Tensor, rotary: Rotary, passes_on: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradients of the whole block in one run of it.

        Args:
            forward: runs the block on a piece of the batch [b, S, H].
            g: the gradient at the block's output [b, S, H].
            rotary: cosines and sines of rotary positions [b or 1, S, d], if the model has any.
            passes_on: also compute the gradient at the block's input.

        Returns:
            The block's output [b, S, H], and the gradient at its input [b * S, H] if asked for.
        """
        seen: list[Tensor] = []  # h, then o, the attention's output before its projection, and h'
        before: list[Tensor] = []  # g', some tokens at a time
        flat = g.flatten(0, 1)

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].flatten(0, -2))

        def learn(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            wanted = (flat, args[0].flatten(0, -2), *seen[1:])
            with at_hand(self._map[part] for part in self._mlp()):
                for own, a, o, h in _chunks(*wanted):
                    before.append(self._learn_mlp(own, a, h))
                    self._map[self.parts.attention].learn(before[-1], o)
            del seen[1:]

        noted = (self.parts.entry, self.parts.attention, self.parts.norm)
        hooks = [self._module[part].register_forward_pre_hook(note) for part in noted]
        hooks.append(self._module[self.parts.down].register_forward_hook(learn))
        try:
            with listening(self._key_width()) as heard:
                output = forward()
        finally:
            for hook in hooks:
                hook.remove()
        with at_hand(self._map[p] for p in (*self.parts.projections, self.parts.attention)):
            own = self._learn_attention(
                torch.cat(before), seen.pop(), heard.pop(), rotary, passes_on
            )
        return output, own

    def run_mlp(self, forward: Run, g: Tensor, _: Rotary = None) -> Tensor:
        """Add the gradients of the block's second half: its norm and MLP.

        Args:
            forward: runs the block on a piece of the batch; the run ends before the last matrix.
            g: the gradient at the block's output [b, S, H].

        Returns:
            The gradient at the stream between the halves [b, S, H].
        """
        h, a = self._inputs(forward, self.parts.norm, self.parts.down)
        with at_hand(self._map[part] for part in self._mlp()):
            found = [self._learn_mlp(*some) for some in _chunks(g.flatten(0, 1), a, h)]
        return torch.cat(found).view_as(g)

    def run_attention(self, forward: Run, g: Tensor, rotary: Rotary) -> Tensor:
        """Add the gradients of the block's first half: its norm and attention.

        Args:
            forward: runs the block on a piece of the batch; the run ends before the projection of
                the attention's output.
            g: the gradient at the stream between the halves [b, S, H].
            rotary: see `run`.

        Returns:
            The gradient at the block's input [b, S, H].
        """
        with listening(self._key_width()) as heard:
            h, o = self._inputs(forward, self.parts.entry, self.parts.attention)
        before = g.flatten(0, 1)
        with at_hand(self._map[p] for p in (*self.parts.projections, self.parts.attention)):
            for own, some in _chunks(before, o):
                self._map[self.parts.attention].learn(own, some)
            del o
            found = self._learn_attention(before, h, heard.pop(), rotary, passes_on=True)
        assert found is not None  # it was asked for
        return found.view_as(g)

    def _inputs(self, forward: Run, *parts: str) -> list[Tensor]:
        """Run the block up to the last of some modules. Returns their inputs [n, in]."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].flatten(0, -2))
            if len(seen) == len(parts):
                raise _Noted

        hooks = [self._module[part].register_forward_pre_hook(note) for part in parts]
        try:
            forward()
        except _Noted:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _key_width(self) -> int:
        """Numbers in all keys of a token."""
        parts = self.parts.projections
        rows = self._map[parts[len(parts) // 2]].outputs
        return rows if len(parts) > 1 else rows // 3

    def _mlp(self) -> list[str]:
        """Names of the MLP's matrices."""
        return [p for p in (self.parts.up, self.parts.gate, self.parts.down) if p]

    def _learn_mlp(self, g: Tensor, a: Tensor, h: Tensor) -> Tensor:
        """Add the MLP's gradients of some tokens [n, ...]. Returns their g'."""
        down = self._map[self.parts.down]
        down.learn(g, a)
        norm = Norm(self._module[self.parts.norm], h.float())
        of_normed = self._through_mlp(down.back(g), a, norm.output)
        return g + self._through_norm(self.parts.norm, norm, of_normed)

    def _learn_attention(
        self, before: Tensor, h: Tensor, attended: Attended, rotary: Rotary, passes_on: bool
    ) -> Tensor | None:
        """Add the gradients of queries, keys and values from g' [n, H]. Returns the gradient at the
        block's input [n, H] if asked for."""
        sequences, heads, length, size = attended.query.shape
        d = self._map[self.parts.attention].back(before).view(sequences, length, heads, size)
        query, key, value = through_attention(attended, d.transpose(1, 2))
        if rotary is not None:
            query, key = unrotate(query, rotary), unrotate(key, rotary)
        query.mul_(self._scaling)
        found = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
        del d, query, key, value
        own = []
        for g, some, *each in _chunks(before, h, *found):
            norm = Norm(self._module[self.parts.entry], some.float())
            of_normed = self._through_projections(each, norm.output)
            behind = self._through_norm(self.parts.entry, norm, of_normed)
            if passes_on:
                own.append(behind.add_(g))
        return torch.cat(own) if passes_on else None

    def _through_projections(self, found: list[Tensor], normed: Tensor) -> Tensor:
        """From the gradients at some tokens' queries, keys and values [n, heads, d] to that at what
        they are projected from [n, H]."""
        parts = self.parts.projections
        for index, part in enumerate(self.parts.head_norms):
            made = self._map[parts[index]].forward(normed).view(-1, found[index].shape[2])
            norm, g = Norm(self._module[part], made), found[index].flatten(0, 1)
            found[index] = self._through_norm(part, norm, g).view_as(found[index])
        flat = [each.flatten(1) for each in found]
        if len(parts) == 1:
            flat = [torch.cat(flat, 1)]
        behind = torch.zeros_like(normed)
        for part, g in zip(parts, flat, strict=True):
            self._map[part].learn(g, normed)
            self._map[part].back(g, onto=behind)
        return behind

    def _through_mlp(self, da: Tensor, a: Tensor, normed: Tensor) -> Tensor:
        """From the gradient at a [n, inner], W2's input, to that at the MLP's input [n, H]."""
        up, gate = self._map[self.parts.up], self._map.get(self.parts.gate)
        if isinstance(self._activation, nn.ReLU) and not gate:
            dz = da.mul_(a > 0)
            up.learn(dz, normed)
            return up.back(dz)
        value, slope = self._slope((gate or up).forward(normed))
        if not gate:
            dz = da.mul_(slope)
            up.learn(dz, normed)
            return up.back(dz)
        du = da * value
        dz = da.mul_(slope).mul_(up.forward(normed))
        up.learn(du, normed)
        gate.learn(dz, normed)
        return gate.back(dz, onto=up.back(du))

    def _slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The activation s at z, element by element, and its derivative there."""
        value, slope = torch.func.jvp(self._activation, (z,), (torch.ones_like(z),))[:2]
        return value, slope

    def _through_norm(self, part: str, norm: Norm, g: Tensor) -> Tensor:
        """From the gradient at a norm's output [n, H] to that at its input, in g's place."""
        if (total := self.sums.of(f"{self._name[part]}.bias")) is not None:
            total += g.sum(0)
        if (total := self.sums.of(f"{self._name[part]}.weight")) is not None:
            total += (g * norm.unit).sum(0)
        return norm.back(g)
