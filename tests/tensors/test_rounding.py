"""tensors/rounding.py: 16-bit updates by hand, against numpy, and on average; replay equals
training."""

import numpy as np
import pytest
import torch

from hosl_flower.optim.gradient import Seeded
from hosl_flower.optim.optimizer import Sgd
from hosl_flower.tensors.philox import HALVES
from hosl_flower.tensors.rounding import store
from hosl_flower.zo.directions import Layout

SIXTEEN = [torch.bfloat16, torch.float16]


def noise(seed, name, rows, columns):
    """r of the specification: int64 [rows, columns]."""
    u = HALVES.span(seed, f"{name}#round-out", 0, rows).numpy().astype(np.int64)
    v = HALVES.span(seed, f"{name}#round-in", 0, columns).numpy().astype(np.int64)
    return (u[:, None] + v[None, :]) % 65536


def test_the_sixteen_bits_are_uniform_and_uncorrelated():
    r = np.stack([noise(seed, "w", 2, 2).ravel() for seed in range(400)]) / 65536
    assert np.abs(r.mean(0) - 0.5).max() < 0.06
    assert np.abs(r.var(0) - 1 / 12).max() < 0.02
    assert np.abs(np.corrcoef(r.T) - np.eye(4)).max() < 0.2


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_what_16_bits_hold_is_stored_as_it_is(dtype):
    exact = torch.tensor([[0.0, -0.0, 1.0, -1.5, 3e-5, -6e-8, 1000.0, float("inf")]]).to(dtype)
    block = torch.zeros_like(exact)
    store(block, exact.float(), 5, "w", 0)
    assert torch.equal(block, exact)
    store(block, torch.full((1, 8), float("nan")), 5, "w", 0)
    assert torch.isnan(block).all()


def test_bfloat16_is_numpys_integer_arithmetic():
    value = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    block = torch.empty(20, 30, dtype=torch.bfloat16)
    store(block, value, 5, "w", 0)
    bits = value.numpy().view(np.uint32) + noise(5, "w", 20, 30).astype(np.uint32)
    expected = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    assert block.float().numpy().tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("dtype", "value", "low", "high", "share"),
    [
        # bfloat16 has 1/128 between 1 and 2: 1 + 1/512 is a quarter of the way
        (torch.bfloat16, 1 + 1 / 512, 1.0, 1 + 1 / 128, 0.25),
        (torch.bfloat16, -1 - 1 / 512, -1.0, -1 - 1 / 128, 0.25),
        # float16 has 1/1024 there, and 2^-24 below 2^-14
        (torch.float16, 1 + 1 / 4096, 1.0, 1 + 1 / 1024, 0.25),
        (torch.float16, 2.75 * 2**-24, 2 * 2**-24, 3 * 2**-24, 0.75),
        (torch.float16, -0.75 * 2**-24, -(2**-24), 0.0, 0.25),
    ],
)
def test_neighbours_are_drawn_by_distance(dtype, value, low, high, share):
    block = torch.empty(200, 200, dtype=dtype)
    store(block, torch.full((200, 200), value), 7, "w", 0)
    assert set(block.flatten().tolist()) == {low, high}
    assert (block == high).float().mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_small_steps_add_up_as_in_float32(dtype):
    start = torch.randn(60, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    step = 1e-5 * Layout({"w": torch.Size([60, 70])}).draw(0).dense("w")
    stored, nearest = start.clone(), start.clone()
    for seed in range(50):
        store(stored, stored.float() + step, seed, "w", 0)
        nearest = (nearest.float() + step).to(dtype)
    along, lost = (
        float(((end.float() - start.float()) * step).sum() / (50 * step * step).sum())
        for end in (stored, nearest)
    )
    # 4,200 elements near 1, bfloat16: the sum of the roundings has a standard deviation of 0.06
    assert along == pytest.approx(1.0, abs=0.25)
    assert lost < 0.75, "rounding to nearest loses most steps, in every step anew"


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_replay_rounds_as_the_training_did(dtype):
    layout = Layout({"w": torch.Size([30, 40]), "b": torch.Size([30])})
    start = {n: torch.randn(s, generator=torch.Generator().manual_seed(2)).to(dtype)
             for n, s in layout.shapes.items()}  # fmt: skip
    ends = []
    for _ in range(2):
        weights = {n: w.clone() for n, w in start.items()}
        for seed in range(5):
            Sgd().step(weights, Seeded(layout, [seed, seed + 100], [0.5, -1.0]), 1e-4)
        ends.append(weights)
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in start)
    assert (ends[0]["b"] != start["b"]).any()
