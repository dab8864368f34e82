"""How exact a probe is in 16 bits: projected gradients against the exact directional derivative.

    python tests/benchmarks/precision.py [--quick] [--model opt-tiny] [--write FILE]

Random weights, cut in the middle, 4 x 16 tokens, 32 directions over all the client (--quick: 8).
The exact derivative is back-propagated in float64 through the same client, its weights those that
the dtype holds. Two surrogates: HOSL's, two-sided differences of the loss, and HO-SFL's, one-sided
<lambda, h>, computed as clients and server do, the latter by forward-mode differentiation too,
which has no epsilon. Errors are root mean squares over the directions,
relative to that of the derivatives: 1 is as bad as an estimate of zero. The last line is one
JSON object.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.models.base_model import open_base
from hosl_flower.models.split import load_client, load_server
from hosl_flower.models.submodels import ClientSubmodel, ServerSubmodel
from hosl_flower.tensors.device import torch_dtype, use_threads
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout
from hosl_flower.zo.estimator import Point, estimate
from hosl_flower.zo.forward_mode import along, derivative
from hosl_flower.zo.perturbed import perturbed

EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DTYPES = ("float32", "bfloat16", "float16")


class Setting:
    """A client of one dtype with its server, a batch, and the exact gradient of the loss."""

    def __init__(self, model: str, dtype: str):
        base = open_base(f"random:{model}")
        cut = base.blocks // 2
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 5000, (4, 16), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.labels = torch.tensor([0, 1, 1, 0])
        self.client: ClientSubmodel = load_client(base, cut, torch_dtype(dtype), "cpu")
        self.server: ServerSubmodel = load_server(base, cut, torch.float32, "cpu")
        self.rows = self.server.lm_head.weight.detach()[[100, 200]]
        self.parameters = self.client.canonical_parameters()
        with torch.no_grad():
            self.anchor = self.client(self.ids, self.mask).float()
        leaf = self.anchor.clone().requires_grad_()
        self.cut_gradient = torch.autograd.grad(self.loss(leaf), leaf)[0]
        self.exact = self._exact_gradient(load_client(base, cut, torch.float64, "cpu"))

    def loss(self, activations: Tensor) -> Tensor:
        logits = self.server.answer_logits(activations, self.mask, self.rows)
        return F.cross_entropy(logits, self.labels)

    def _exact_gradient(self, double: ClientSubmodel) -> dict[str, Tensor]:
        """The client gradient float64, by parameter."""
        copies = double.canonical_parameters()
        for name, parameter in copies.items():
            parameter.data.copy_(self.parameters[name])
        h = double(self.ids, self.mask)
        (h * self.cut_gradient.double()).sum().backward()
        return {n: p.grad for n, p in copies.items() if p.grad is not None}

    def derivative(self, layout: Layout, seed: int) -> float:
        direction = layout.draw(seed)
        return sum(float((g * direction.dense(n)).sum()) for n, g in self.exact.items())

    def probe(self, layout: Layout, point: Point) -> Tensor:
        with perturbed(self.parameters, layout.draw(point.seed), point.coefficient):
            return self.client(self.ids, self.mask).float()

    def hosl(self, layout: Layout, seed: int, epsilon: float) -> float:
        def values(points: list[Point]) -> list[float]:
            with torch.no_grad():
                return [float(self.loss(self.probe(layout, point))) for point in points]

        return estimate(values, [seed], epsilon)[0]

    def ho_sfl(self, layout: Layout, seed: int, epsilon: float) -> float:
        difference = self.probe(layout, Point(seed, epsilon)).double() - self.anchor.double()
        return float((difference * self.cut_gradient.double()).sum()) / epsilon

    def forward_mode(self, layout: Layout, seed: int) -> float:
        with along(self.parameters, layout.draw(seed)):
            tangent = derivative(self.client(self.ids, self.mask))
        return float((tangent.double() * self.cut_gradient.double()).sum())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="opt-tiny")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    use_threads(0)
    seeds = range(8 if args.quick else 32)
    errors: dict[str, dict[str, float]] = {}
    print("relative error" + "".join(f"{epsilon:>9g}" for epsilon in EPSILONS) + "  forward-mode")
    for dtype in DTYPES:
        setting = Setting(args.model, dtype)
        for distribution in DISTRIBUTIONS[:2]:
            layout = Layout({n: p.shape for n, p in setting.parameters.items()}, distribution)
            exact = torch.tensor([setting.derivative(layout, seed) for seed in seeds])
            for method in (setting.hosl, setting.ho_sfl):
                row = {}
                for epsilon in EPSILONS:
                    found = torch.tensor([method(layout, seed, epsilon) for seed in seeds])
                    row[f"{epsilon:g}"] = round(float((found - exact).norm() / exact.norm()), 4)
                if method == setting.ho_sfl:
                    found = torch.tensor([setting.forward_mode(layout, seed) for seed in seeds])
                    row["forward-mode"] = round(float((found - exact).norm() / exact.norm()), 4)
                name = f"{dtype} {distribution} {method.__name__}"
                errors[name] = row
                print(f"{name:28}" + "".join(f"{e:>9.3f}" for e in row.values()), flush=True)
    result = {"model": args.model, "directions": len(seeds), "relative_error": errors}
    if args.write:
        args.write.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
