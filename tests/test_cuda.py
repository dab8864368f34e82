"""What must not depend on the device: a ledger's replay, and a run's numbers from run to run."""

import pytest
import torch
from entries import ENTRIES
from runs import metrics, run_factory

from hosl_flower.client.client import Client
from hosl_flower.ledger.client_state import ClientState, fingerprint
from hosl_flower.ledger.ledger import Ledger
from hosl_flower.ledger.weight_deltas import WeightDeltas
from hosl_flower.optim.adafactor_momentum import AdafactorMomentum
from hosl_flower.optim.gradient import Dense, sparse_rows
from hosl_flower.run.start import open_run
from hosl_flower.zo.directions import DISTRIBUTIONS
from strategies.fedavg_zo import FedAvgZo
from strategies.ho_sfl import HoSfl
from strategies.split_fo import SplitFo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(made):
    parameters = {name: torch.nn.Parameter(p.cuda()) for name, p in made.parameters.items()}
    return ClientState(parameters, made.layout.distribution, made.optimizer_name, "base")


def large(optimizer, distribution, dtype):
    """Of so many elements that an operation with one wrong last bit in a thousand shows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (300, 200), "kernel": (64, 32, 3, 3), "b": (500,)}
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.05).to(dtype))
        for name, shape in shapes.items()
    }
    return ClientState(parameters, distribution, optimizer, "base")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replay_gives_the_bits_of_the_cpu(optimizer, distribution, dtype):
    cpu = large(optimizer, distribution, dtype)
    cuda = on_cuda(cpu)
    for made in (cpu, cuda):
        made.apply(ENTRIES)
    assert torch.equal(cpu.weights(), cuda.weights().cpu())
    assert cpu.mark().fingerprint == cuda.mark().fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_changes_of_weights_give_the_bits_of_the_cpu(dtype):
    cpu = large("sgd", "rank1", dtype)
    cuda, shifts = on_cuda(cpu), WeightDeltas(cpu.rows)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        coded = shifts.encode(torch.randn(cpu.elements, generator=generator) * 1e-3, step)
        for made in (cpu, cuda):
            made.move(coded, step)
    assert torch.equal(cpu.weights(), cuda.weights().cpu())


@pytest.mark.parametrize(
    ("strategy", "own"),
    [
        (HoSfl, {"num_clients": 3, "clients_per_step": 2, "client_optimizer": "adamw"}),
        (FedAvgZo, {"num_clients": 3, "local_steps": 2}),
        (FedAvgZo, {"num_clients": 3, "update_codec": "int8"}),
        (SplitFo, {"client_gradient": "residual", "client_optimizer": "adafactor"}),
        (SplitFo, {"client_gradient": "recompute", "client_optimizer": "adafactor-momentum"}),
    ],
    ids=["ho-sfl", "fedavg-zo", "int8", "residual", "recompute"],
)
def test_a_run_repeats_itself_and_is_near_the_cpus(tiny_opt, tmp_path, strategy, own):
    make = run_factory(strategy, tiny_opt, tmp_path)
    if strategy is SplitFo:
        own = {**own, "directions": 1, "client_trainable": "full"}
    one, a, _ = make(**own, device="cuda")
    two, b, _ = make(**own, device="cuda")
    _, c, _ = make(**own, device="cpu")
    assert metrics(a) == metrics(b)
    assert one.fingerprint == two.fingerprint
    losses = [[step["loss"] for step in metrics(d) if "loss" in step] for d in (a, c)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_ledger_of_a_run_on_cuda_is_replayed_on_the_cpu(tiny_opt, tmp_path):
    own = {"num_clients": 3, "clients_per_step": 2, "client_optimizer": "adamw"}
    results, directory, config = run_factory(HoSfl, tiny_opt, tmp_path)(**own, device="cuda")
    client = Client(open_run(HoSfl(config.with_keys({"device": "cpu"})), "again")[0].spec)
    client.follower.apply(Ledger.read(directory / "ledger.jsonl").entries)
    assert fingerprint(client.state.parameters) == results.fingerprint


@pytest.mark.parametrize("sparse", [False, True])
def test_8_bits_are_near_the_cpus(sparse):
    own = {name: {"e": torch.zeros(70, 4, device=name)} for name in ("cpu", "cuda")}
    for device, parameters in own.items():
        optimizer, generator = AdafactorMomentum(), torch.Generator().manual_seed(0)
        for _ in range(3):
            g = torch.randn(70, 4, generator=generator).to(device)
            rows = torch.arange(70, device=device)
            gradient = sparse_rows(rows, g, (70, 4)) if sparse else g
            optimizer.step(parameters, Dense({"e": gradient}), 0.1)
    assert torch.allclose(own["cpu"]["e"], own["cuda"]["e"].cpu(), atol=1e-2)
