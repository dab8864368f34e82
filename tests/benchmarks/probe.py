"""What a probe costs: its time over that of a plain forward, in one run.

    python tests/benchmarks/probe.py [--quick]

OPT-125M architecture (random weights), client submodel cut at 5, 8 x 64 tokens, all cores.
`tangent` is the exact derivative along a direction, by forward-mode.
Medians of interleaved repetitions, so that a busy machine slows both alike. `stacked` says what
several directions in one forward could save at most: the time of one plain forward of D times
the batch over that of D forwards (below 1 there is something to gain; perturbing D groups costs
extra). The last line is one JSON object of ratios; nothing is asserted.
"""

import json
import statistics
import sys
import time
from functools import partial

import torch

from hosl_flower.models.base_model import open_base
from hosl_flower.models.split import load_client
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.optim.gradient import Seeded
from hosl_flower.optim.optimizer import Sgd
from hosl_flower.tensors.device import use_threads
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout
from hosl_flower.zo.forward_mode import along, derivative
from hosl_flower.zo.perturbed import perturbed

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # of 64 tokens

REPETITIONS = 5 if "--quick" in sys.argv else 25


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    use_threads(0)
    client = load_client(open_base("random:opt-125m"), 5, torch.float32, "cpu")
    parameters = client.canonical_parameters()
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    ids = torch.randint(5, 50_000, (8, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)

    def forward() -> None:
        with torch.no_grad():
            client(ids, mask)

    work = {"forward": forward}
    for distribution in DISTRIBUTIONS:
        layout = Layout(shapes, distribution)

        def probe(layout: Layout = layout) -> None:
            with perturbed(parameters, layout.draw(1), 1e-3):
                client(ids, mask)

        def update(layout: Layout = layout) -> None:
            Sgd().step(parameters, Seeded(layout, [1], [1e-6]), 1e-6)

        def tangent(layout: Layout = layout) -> None:
            with along(parameters, layout.draw(1)):
                derivative(client(ids, mask))

        own = {"probe": probe, "tangent": tangent, "update": update}
        work |= {f"{name}_{distribution}": run for name, run in own.items()}
    for batch in BATCHES if "--quick" not in sys.argv else BATCHES[:4]:
        work[f"batch_{batch}"] = partial(plain, client, batch)
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(REPETITIONS + 1):
        for name, run in work.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"plain forward: {medians['forward']:.3f} s")
    ratios = {
        n: round(m / medians["forward"], 3)
        for n, m in medians.items()
        if n.startswith(("probe", "tangent", "update"))
    }
    result = {"repetitions": REPETITIONS, "ratio_to_forward": ratios, "stacked": stacked(medians)}
    print(json.dumps(result))


def plain(client: ClientSubmodel, batch: int) -> None:
    ids = torch.full((batch, 64), 7)
    with torch.no_grad():
        client(ids, torch.ones_like(ids))


def stacked(medians: dict[str, float]) -> dict[str, dict[str, float]]:
    """{batch: {D: seconds of one forward of D * batch / seconds of D forwards of batch}}."""
    return {
        f"{batch}x64": {
            str(d): round(medians[f"batch_{d * batch}"] / (d * medians[f"batch_{batch}"]), 3)
            for d in (2, 4, 8)
            if f"batch_{d * batch}" in medians
        }
        for batch in (1, 8)
    }


if __name__ == "__main__":
    main()
