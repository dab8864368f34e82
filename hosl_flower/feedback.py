"""What residual feedback does within one block: the gradients its matrices get from g.

    h' = h + W_o o,   h'' = h' + mlp(norm(h')),   g at h'' and so at the MLP's output


    W2: g a^T,   da = W2^T g                               a = W2's input, n = norm(h')
    W1: dz n^T,  dz = da * s'(z)                           a plain MLP, a = s(z), z = W1 n
    Wg: dz n^T,  dz = da * u * s'(z)                       a gated MLP, a = s(z) * u, z = Wg n,
    Wu: du n^T,  du = da * s(z)                                                       u = Wu n
    Wo: g' o^T,  g' = g + J_norm^T (W1^T dz  or  Wg^T dz + Wu^T du)

n, z and u are computed again from h', a few tokens at a time, rather than kept; s' by forward-mode
differentiation of transformers' own activation, or read off a where that is relu.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hosl_flower.errors import ConfigError
from hosl_flower.families import Parts
from hosl_flower.split import ClientSubmodel

_CHUNK_TOKENS = 256  # whose feedback is worked out at a time: small beside what a block makes


def residual_parts(submodel: ClientSubmodel) -> Parts:
    """Names of the modules the rule goes by. ConfigError for a stream that is no plain sum."""
    decoder: Any = submodel.decoder
    parts = submodel.family.residual_parts(decoder.config)
    if parts is None:
        raise ConfigError(
            "client-gradient = residual needs a pre-norm model that adds embeddings, attention and "
            "MLP to the stream as they are; use recompute"
        )
    return parts


def trained_parts(parts: Parts) -> list[str]:
    """The modules whose weights and biases the rule gives gradients for."""
    return [p for p in (parts.attention, parts.norm, parts.up, parts.gate, parts.down) if p]


class Feedback:
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
        self.parts, self.transposed = residual_parts(submodel), submodel.family.transposed
        prefix = f"decoder.{submodel.family.blocks}.{index}"
        parts = trained_parts(self.parts)
        self._name = {p: submodel.canonical(f"{prefix}.{p}") for p in parts}
        self._module: dict[str, Any] = {p: block.get_submodule(p) for p in parts}
        self._activation: Any = block.get_submodule(self.parts.activation)
        self._sums: dict[str, Tensor] = {}
        self._wide: dict[str, Tensor] = {}

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
            self._wide = {p: self._matrix(p) for p in self._mlp()}
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

    def _mlp(self) -> list[str]:
        """Names of the MLP's matrices."""
        return [p for p in (self.parts.up, self.parts.gate, self.parts.down) if p]

    def _matrix(self, part: str) -> Tensor:
        """Float32 [out, in], however the family stores it."""
        weight = self._module[part].weight.float()
        return weight.T if self.transposed else weight

    def _learn(self, g: Tensor, a: Tensor, o: Tensor, h: Tensor) -> Tensor:
        """Add what some tokens [n, ...] say; their g'."""
        self._add(self.parts.down, g, a)
        norm = _Norm(self._module[self.parts.norm], h.float())
        of_normed = self._through_mlp(g @ self._wide[self.parts.down], a, norm.output)
        name = self._name[self.parts.norm]
        if (total := self._sum(f"{name}.bias")) is not None:
            total += of_normed.sum(0)
        if (total := self._sum(f"{name}.weight")) is not None:
            total += (of_normed * norm.unit).sum(0)
        before = g + norm.back(of_normed)
        self._add(self.parts.attention, before, o)
        return before

    def _through_mlp(self, da: Tensor, a: Tensor, normed: Tensor) -> Tensor:
        """From the gradient at a [n, inner], W2's input, to that at the MLP's input [n, H]."""
        up, gate = self.parts.up, self.parts.gate
        if isinstance(self._activation, nn.ReLU) and not gate:
            dz = da.mul_(a > 0)
            self._add(up, dz, normed)
            return dz @ self._wide[up]
        value, slope = self._slope(self._linear(gate or up, normed))
        if not gate:
            dz = da.mul_(slope)
            self._add(up, dz, normed)
            return dz @ self._wide[up]
        du = da * value
        dz = da.mul_(slope).mul_(self._linear(up, normed))
        self._add(up, du, normed)
        self._add(gate, dz, normed)
        return (du @ self._wide[up]).addmm_(dz, self._wide[gate])

    def _linear(self, part: str, x: Tensor) -> Tensor:
        """What a linear map makes of x, in float32."""
        bias = getattr(self._module[part], "bias", None)
        y = x @ self._wide[part].T
        return y if bias is None else y.add_(bias.float())

    def _slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The activation s at z, element by element, and its derivative there."""
        value, slope = torch.func.jvp(self._activation, (z,), (torch.ones_like(z),))[:2]
        return value, slope

    def _add(self, part: str, g: Tensor, x: Tensor) -> None:
        """y = W x + b with g [n, out] at y: W gets g x^T, b gets g."""
        if (total := self._sum(f"{self._name[part]}.weight")) is not None:
            if self.transposed:
                total.addmm_(x.T.float(), g)
            else:
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


class _Norm:
    """A layer norm, or one of root mean squares, at h [n, H] in float32. unit: h to norm one, less
    its mean for a layer norm; output: what the module makes of h."""

    def __init__(self, module: Any, h: Tensor):
        self.centres = isinstance(module, nn.LayerNorm)
        centred = h - h.mean(1, keepdim=True) if self.centres else h
        eps = module.eps if self.centres else module.variance_epsilon
        self._scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt_()
        self.unit = centred.mul(self._scale)
        self._gamma = None if module.weight is None else module.weight.float()
        self.output = self.unit if self._gamma is None else self.unit * self._gamma
        bias = getattr(module, "bias", None)
        if bias is not None:
            self.output = self.output + bias.float()

    def back(self, g: Tensor) -> Tensor:
        """J^T g, in g's place."""
        if self._gamma is not None:
            g.mul_(self._gamma)
        along = self.unit * (g * self.unit).mean(1, keepdim=True)
        # what is left when spread and, for a layer norm, mean are held
        g -= g.mean(1, keepdim=True) + along if self.centres else along
        return g.mul_(self._scale)
