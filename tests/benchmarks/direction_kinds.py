"""Ways to draw directions, for directions.py, and what of a gradient probes along them find."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hosl_flower.tensors.rows import as_matrix_shape
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout

Parts = dict[str, Tensor]
RANK_LOZO, RANK_SUBZERO, LEARNING = 2, 8, 200


def dot(a: Parts, b: Parts) -> float:
    """What one of them does not have is zero."""
    names = a.keys() & b.keys()
    return float(sum(torch.dot(a[n].flatten().double(), b[n].flatten().double()) for n in names))


def cosine(estimate: Parts, gradient: Parts) -> float:
    lengths = dot(gradient, gradient) * dot(estimate, estimate)
    return dot(gradient, estimate) / math.sqrt(lengths)


def probed(gradient: Parts, directions: list[Parts]) -> Parts:
    """sum_q (g . s_q) s_q"""
    total = {name: torch.zeros_like(part) for name, part in gradient.items()}
    for s in directions:
        slope = dot(gradient, s)
        for name, part in s.items():
            total[name].add_(part, alpha=slope)
    return total


class Drawn:
    """Directions by name of the scheme. shapes: of the client's parameters."""

    def __init__(self, shapes: dict[str, torch.Size]):
        self.shapes = shapes
        self.layouts = {kind: Layout(shapes, kind) for kind in DISTRIBUTIONS}
        self.source = torch.Generator().manual_seed(0)
        self.seed, self.asked = 0, 0
        self.held: Parts = {}

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.source)

    def of(self, kind: str) -> Parts:
        """One of zo/directions.py's."""
        self.seed += 1
        direction = self.layouts[kind].draw(self.seed)
        return {name: direction.dense(name) for name in self.shapes}

    def matrices(self, make: Callable[[str, int, int], Tensor]) -> Parts:
        """make(name, out, in) for matrices, normals for vectors."""
        drawn = {}
        for name, shape in self.shapes.items():
            out, inner = as_matrix_shape(shape)
            drawn[name] = self.randn(*shape) if inner == 1 else make(name, out, inner).view(shape)
        return drawn

    def lozo(self, held: int) -> Parts:
        """With the same U for so many draws."""
        if self.asked % held == 0:
            self.held = {
                name: self.randn(as_matrix_shape(shape)[0], RANK_LOZO)
                for name, shape in self.shapes.items()
            }
        self.asked += 1
        one = 1 / math.sqrt(RANK_LOZO)  # the size of an element
        return self.matrices(
            lambda name, _, inner: self.held[name] @ self.randn(RANK_LOZO, inner) * one
        )

    def subzero(self) -> Parts:
        def make(_: str, out: int, inner: int) -> Tensor:
            r = min(RANK_SUBZERO, out, inner)
            u, v = (torch.linalg.qr(self.randn(size, r)).Q for size in (out, inner))
            return u @ self.randn(r, r) @ v.T * math.sqrt(out * inner) / r  # of size 1, too

        return self.matrices(make)

    def scaled(self, roots: Parts) -> Parts:
        """Signs times these."""
        return {name: part * roots[name] for name, part in self.of("signs").items()}

    def guessed(self, inputs: Parts, tokens: Tensor, sizes: Parts | None = None) -> Parts:
        """inputs: of linear maps, [tokens, in]; tokens: of the batch. sizes: else 1."""

        def make(name: str, out: int, inner: int) -> Tensor:
            if name in inputs:
                own = inputs[name]
                return self.randn(len(own), out).T @ own * math.sqrt(inner) / own.norm()
            rows = torch.zeros(out, inner)
            there = tokens.unique() if "embed_tokens" in name else torch.arange(out)
            rows[there] = self.randn(len(there), inner)
            return rows

        found = self.matrices(make)
        return {n: p * sizes[n] for n, p in found.items()} if sizes else found


def learned(drawn: Drawn, gradients: list[Parts]) -> Parts:
    """Roots of a running mean of squares of single gaussian estimates."""
    squares = {name: torch.zeros(shape) for name, shape in drawn.shapes.items()}
    for number in range(LEARNING):
        g, s = gradients[number % len(gradients)], drawn.of("gaussian")
        slope = dot(g, s)
        for name, part in s.items():
            squares[name].mul_(0.99).add_((slope * part) ** 2, alpha=0.01)
    return {name: part.sqrt() for name, part in squares.items()}


def rms(gradients: list[Parts], whole: bool) -> Parts:
    """Of each element over mini-batches, or of each tensor."""
    found = {}
    for name in gradients[0]:
        squares = torch.stack([g[name] for g in gradients]).square().mean(0)
        found[name] = (squares.mean().expand_as(squares) if whole else squares).sqrt()
    return found


def only(gradient: Parts, keep: Callable[[str, Tensor], bool]) -> Parts:
    return {name: part for name, part in gradient.items() if keep(name, part)}
