"""Which directions count: how much of the gradient a step's probes find, by how they are drawn.

    python tests/benchmarks/directions.py -c model=<a small OPT> -c data-path=<...> -c cut-layer=5

Measured is the squared cosine of an estimate e with the gradient g, a mean over --batches batches
of a server that has trained for --steps on a frozen client, for --probes exact derivatives a step.
It is not the share of the best step's gain: the gain depends on the curvature along e, too, and is
larger (docs/results/directions.md). Directions are drawn as

    rank1, signs, gaussian   zo/directions.py; FZOO divides a step along signs by the losses'
    standard
                             deviation, which changes its length and not where it goes
    LOZO                     U V^T of rank 2, U the same for 10 steps
    SubZero                  U Z V^T, U and V orthonormal, of rank 8
    momentum                 the estimates of the last steps, with weights of 0.9^age: what a client
                             can make again from the ledger
    per client               of one gradient, four times as many, as K clients' own seeds give
    by element               signs times the root mean square of each gradient element over other
                             mini-batches: known, which scalars do not tell, or learned from 200
                             gaussian probes as HiSo (2506.02370) learns it, which divides by it:
                             its squared cosine with RMSProp's step is P / d
    by tensor                signs times each tensor's own root mean square, known
    activations              sum over tokens of random vectors times the input of a linear map, and
                             the batch's rows of embeddings (How to Guess a Gradient, 2312.04709);
                             with each tensor's own size besides
    a part                   of norms and biases, or of the last block, alone
    residual                 residual feedback, which takes no probe; and with a probe for each
                             tensor, which gives its length

Prints a Markdown table, with the cosine with the mean gradient of other mini-batches besides, which
a step of several has to go by: the gradients of two mini-batches may point against each other.
Run-config keys as in a run.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from direction_kinds import Drawn, Parts, cosine, learned, only, probed, rms
from torch import Tensor, nn

from hosl_flower.client.client import Client
from hosl_flower.config.app_config import key_value
from hosl_flower.config.parse import parse_config
from hosl_flower.gradients.backprop import gradients
from hosl_flower.gradients.residual import residual_gradients
from hosl_flower.models.submodels import trainable_parameters
from hosl_flower.protocol.messages.activations import Activations, Forward
from hosl_flower.server.open_session import open_session
from hosl_flower.tensors.cut_gradient import Cotangent
from hosl_flower.zo.directions import DISTRIBUTIONS

BETA = 0.9  # of momentum


class Setting:
    """A client that stands still, a server that has learned over it, mini-batch by mini-batch."""

    def __init__(self, keys: dict[str, Any]):
        strategy = {"device": "cpu", "strategy": "strategies.split_fo:SplitFo"}
        self.config = parse_config(strategy | keys)
        self.session = open_session(self.config, "directions", 1)
        self.client = Client(self.session.spec)
        self.parameters = trainable_parameters(self.client.submodel, self.config.client.trainable)

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


class Table:
    """By name: shares of a mini-batch's gradient, cosines with `mean`, other mini-batches'."""

    def __init__(self, mean: Parts):
        self.mean = mean
        self.found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.cost: dict[str, str] = {}

    def note(self, name: str, probes: object, estimate: Parts, gradient: Parts) -> None:
        self.found[name].append((cosine(estimate, gradient) ** 2, cosine(estimate, self.mean)))
        self.cost[name] = str(probes)

    def show(self) -> None:
        print("| directions | probes per step | share of the gradient | cosine with others' |")
        print("|---|---|---|---|")
        for name, pairs in self.found.items():
            cells = []
            for values in zip(*pairs, strict=True):
                own = torch.tensor(values)
                error = float(own.std() / math.sqrt(len(own)))
                cells.append(f"{float(own.mean()):.2g} +- {error:.1g}")
            print(f"| {name} | {self.cost[name]} | {' | '.join(cells)} |")


def random_directions(table: Table, drawn: Drawn, known: list[Parts], probes: int) -> Any:
    """note(gradient, inputs, tokens) of one mini-batch. known: other mini-batches' gradients."""
    sizes = rms(known, whole=True)
    scales = {
        "by element, known": rms(known, whole=False),
        "by element, learned": learned(drawn, known),
        "by tensor, known": sizes,
    }
    last = max(int(n.split("layers.")[1].split(".")[0]) for n in known[0] if "layers." in n)
    parts: dict[str, Callable[[str, Tensor], bool]] = {
        "norms and biases alone": lambda _, p: p.dim() < 2,
        "the last block alone": lambda n, _: f"layers.{last}." in n,
    }
    past: dict[str, Parts] = {}

    def note(gradient: Parts, inputs: Parts, tokens: Tensor) -> None:
        schemes: dict[str, Callable[[], Parts]] = {
            **{kind: lambda kind=kind: drawn.of(kind) for kind in DISTRIBUTIONS},
            "LOZO": lambda: drawn.lozo(10 * probes),
            "SubZero": drawn.subzero,
            **{name: lambda own=own: drawn.scaled(own) for name, own in scales.items()},
            "activations": lambda: drawn.guessed(inputs, tokens),
            "activations, by tensor": lambda: drawn.guessed(inputs, tokens, sizes),
            **{
                name: lambda keep=keep: only(drawn.of("signs"), keep)
                for name, keep in parts.items()
            },
        }
        for name, draw in schemes.items():
            estimate = probed(gradient, [draw() for _ in range(probes)])
            table.note(name, probes, estimate, gradient)
            if name in ("rank1", "LOZO"):
                for key, part in past.get(name, {}).items():
                    estimate[key].add_(part, alpha=BETA)
                past[name] = estimate
                table.note(f"{name}, momentum", probes, estimate, gradient)
        many = [drawn.of("rank1") for _ in range(4 * probes)]
        table.note("rank1, per client", f"4 x {probes}", probed(gradient, many), gradient)

    return note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--probes", type=int, default=2)
    arguments = parser.parse_args()
    setting = Setting(dict(map(key_value, arguments.keys)))
    setting.train_server(arguments.steps)
    known = [exact for exact, *_ in setting.batches(arguments.steps, arguments.batches)]
    table = Table({name: torch.stack([g[name] for g in known]).mean(0) for name in known[0]})
    drawn = Drawn({name: part.shape for name, part in known[0].items()})
    note = random_directions(table, drawn, known, arguments.probes)
    first = arguments.steps + arguments.batches
    for exact, residual, inputs, tokens in setting.batches(first, arguments.batches):
        note(exact, inputs, tokens)
        table.note("residual feedback", 0, residual, exact)
        fitted = probed(exact, [{name: part / part.norm()} for name, part in residual.items()])
        table.note("residual feedback, a probe for each tensor", len(residual), fitted, exact)
        table.note("the gradient", 0, exact, exact)
    dimensions = sum(part.numel() for part in known[0].values())
    print(f"{dimensions:,} parameters; P / d = {arguments.probes / dimensions:.2g}\n")
    table.show()


if __name__ == "__main__":
    main()
