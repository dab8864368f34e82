"""Which directions count: how much of the gradient a step's probes find, by how they are drawn.

    python tests/benchmarks/directions.py -c model=<a small OPT> -c data-path=<...> -c cut-layer=5

A step along an estimate e of the gradient g can lower the loss by at most the square of their
cosine of what a step along g could (to second order, where curvature is alike in all directions).
That share, mean over --batches mini-batches of a server that has trained for --steps on a client
that stands still, is measured for --probes exact derivatives a step along directions drawn as

    rank1, signs, gaussian   perturb.py; FZOO divides a step along signs by the losses' standard
                             deviation, which changes its length and not where it goes
    LOZO                     U V^T of rank 2, U the same for 50 steps
    SubZero                  U Z V^T, U and V orthonormal, of rank 8
    momentum                 the estimates of the last steps, with weights of 0.9^age: what a client
                             can make again from the ledger
    per client               as many times more directions as clients, all of the mean gradient
    by element               signs times the root mean square of each gradient element over other
                             mini-batches: known, which scalars do not tell, or learned from 200
                             gaussian probes, as HiSo (2506.02370) learns it. (HiSo then divides by
                             its square root: its steps are P / d of one of RMSProp's)
    by tensor                signs times each tensor's own root mean square, known
    activations              sum over tokens of random vectors times the input of a linear map, and
                             the batch's rows of embeddings (How to Guess a Gradient, 2312.04709);
                             with each tensor's own size besides
    a part                   of norms and biases, or of the last block, alone
    residual                 residual feedback, which takes no probe; and with a probe for each
                             tensor, which gives its length

Prints a Markdown table. Run-config keys as in a run.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hosl_flower.backprop import gradients
from hosl_flower.cli import key_value
from hosl_flower.client import Client
from hosl_flower.config import parse_config
from hosl_flower.messages import Activations, Forward
from hosl_flower.perturb import DISTRIBUTIONS, Layout, as_matrix_shape
from hosl_flower.residual import residual_gradients
from hosl_flower.session import open_session
from hosl_flower.split import trainable_parameters
from hosl_flower.surrogate import Cotangent

Parts = dict[str, Tensor]
HELD, RANK_LOZO, RANK_SUBZERO, BETA, LEARNING = 50, 2, 8, 0.9, 200


def dot(a: Parts, b: Parts) -> float:
    return float(sum(torch.dot(a[n].flatten().double(), b[n].flatten().double()) for n in b))


def share(estimate: Parts, gradient: Parts) -> float:
    """The squared cosine."""
    return dot(gradient, estimate) ** 2 / (dot(gradient, gradient) * dot(estimate, estimate))


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
        """One of perturb.py's."""
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

    def lozo(self) -> Parts:
        if self.asked % HELD == 0:
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


class Setting:
    """A client that stands still, a server that has learned over it, mini-batch by mini-batch."""

    def __init__(self, keys: dict[str, Any]):
        strategy = {"device": "cpu", "strategy": "strategies.split_fo:SplitFo"}
        self.config = parse_config(strategy | keys)
        self.session = open_session(self.config, "directions", 1)
        self.client = Client(self.session.spec)
        self.parameters = trainable_parameters(self.client.submodel, self.config.client_trainable)

    def train_server(self, steps: int) -> None:
        for number in range(steps):
            self.cut_gradient(number)
            self.session.server.apply(1.0)

    def cut_gradient(self, number: int) -> Tensor:
        (clean,) = self.client.answer([Forward(**self.session.at(1, 0), batch=number)])
        assert isinstance(clean, Activations)
        ((_, _, lam),) = self.session.server.propagate([clean], [1.0])
        return lam

    def batches(self, first: int, count: int) -> Iterator[tuple[Parts, Parts, Parts, Tensor]]:
        """(gradient, residual feedback, inputs of linear maps, tokens) of each."""
        for number in range(first, first + count):
            lam = self.cut_gradient(number)
            batch = self.client.pool.client(0).train_batch(number, self.config.batch_size)
            cotangent = Cotangent(lam, torch.empty(len(lam), 0), 1.0)
            submodel, parameters = self.client.submodel, self.parameters
            inputs = self.inputs(batch)
            exact = dict(gradients(submodel, parameters, batch, cotangent))
            residual = dict(residual_gradients(submodel, parameters, batch, cotangent))
            dense = {n: p.to_dense() if p.is_sparse else p for n, p in residual.items()}
            yield exact, dense, inputs, batch.input_ids[batch.attention_mask.bool()]

    def inputs(self, batch: Any) -> Parts:
        found: Parts = {}
        used = batch.attention_mask.bool()

        def learn(name: str) -> Callable[..., None]:
            def hook(_: Any, args: tuple[Tensor, ...], __: Tensor) -> None:
                found[name] = args[0].view(*used.shape, -1)[used]

            return hook

        hooks = [
            module.register_forward_hook(learn(self.client.submodel.canonical(f"{name}.weight")))
            for name, module in self.client.submodel.named_modules()
            if isinstance(module, nn.Linear)
        ]
        with torch.no_grad():
            self.client.submodel(batch.input_ids, batch.attention_mask)
        for hook in hooks:
            hook.remove()
        return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--probes", type=int, default=2)
    arguments = parser.parse_args()
    setting = Setting(dict(map(key_value, arguments.keys)))
    torch.manual_seed(0)
    setting.train_server(arguments.steps)
    half = arguments.batches
    known = [exact for exact, *_ in setting.batches(arguments.steps, half)]
    drawn = Drawn({name: part.shape for name, part in known[0].items()})
    roots = {
        "by element, known": rms(known, whole=False),
        "by element, learned": learned(drawn, known),
        "by tensor, known": rms(known, whole=True),
    }
    last = max(int(n.split("layers.")[1].split(".")[0]) for n in known[0] if "layers." in n)
    parts: dict[str, Callable[[str, Tensor], bool]] = {
        "norms and biases alone": lambda _, p: p.dim() < 2,
        "the last block alone": lambda n, _: f"layers.{last}." in n,
    }
    found: dict[str, list[float]] = defaultdict(list)
    cost: dict[str, Any] = {}
    past: dict[str, Parts] = {}
    for exact, residual, inputs, tokens in setting.batches(arguments.steps + half, half):
        schemes: dict[str, Callable[[], Parts]] = {
            **{kind: lambda kind=kind: drawn.of(kind) for kind in DISTRIBUTIONS},
            "LOZO": drawn.lozo,
            "SubZero": drawn.subzero,
            **{name: lambda own=own: drawn.scaled(own) for name, own in roots.items()},
            "activations": lambda at=(inputs, tokens): drawn.guessed(*at),
            "activations, by tensor": lambda at=(inputs, tokens): drawn.guessed(
                *at, roots["by tensor, known"]
            ),
        }
        for name, draw in schemes.items():
            estimate = probed(exact, [draw() for _ in range(arguments.probes)])
            found[name].append(share(estimate, exact))
            cost[name] = arguments.probes
            if name in ("rank1", "LOZO"):
                before = past.get(name)
                if before is not None:
                    for key, part in before.items():
                        estimate[key].add_(part, alpha=BETA)
                past[name] = estimate
                found[f"{name}, momentum"].append(share(estimate, exact))
                cost[f"{name}, momentum"] = arguments.probes
        many = [drawn.of("rank1") for _ in range(4 * arguments.probes)]
        found["rank1, per client (four)"].append(share(probed(exact, many), exact))
        cost["rank1, per client (four)"] = f"4 x {arguments.probes}"
        for name, keep in parts.items():
            own = only(exact, keep)
            within = probed(own, [only(drawn.of("signs"), keep) for _ in range(arguments.probes)])
            found[name].append(share(within, own) * dot(own, own) / dot(exact, exact))
            cost[name] = arguments.probes
        found["residual feedback"].append(share(residual, exact))
        fitted = probed(exact, [{name: part / part.norm()} for name, part in residual.items()])
        found["residual feedback, a probe per tensor"].append(share(fitted, exact))
        cost |= {
            "residual feedback": 0,
            "residual feedback, a probe per tensor": len(residual),
        }
    dimensions = sum(part.numel() for part in known[0].values())
    print(f"{dimensions:,} parameters; P / d = {arguments.probes / dimensions:.2g}\n")
    print("| directions | probes per step | share of a gradient step | standard error |")
    print("|---|---|---|---|")
    for name, values in found.items():
        own = torch.tensor(values)
        error = float(own.std() / math.sqrt(len(own)))
        print(f"| {name} | {cost[name]} | {float(own.mean()):.2g} | {error:.1g} |")


if __name__ == "__main__":
    main()
