"""Adafactor against transformers' own, by hand, and on sparse rows."""

import math

import pytest
import torch
from transformers.optimization import Adafactor as Published

from hosl_flower.optim.adafactor import Adafactor, state_size
from hosl_flower.optim.adafactor_momentum import AdafactorMomentum
from hosl_flower.optim.by_name import make_optimizer, state_shape
from hosl_flower.optim.gradient import Dense, sparse_rows
from hosl_flower.tensors.rounding import quantize

RATE = 0.1


def gradients(shapes, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_it_is_the_published_algorithm():
    shapes = {"matrix": (5, 7), "vector": (6,)}
    own = {name: torch.ones(shape) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    published = Published(
        theirs.values(), lr=RATE, scale_parameter=False, relative_step=False, eps=(1e-30, 1e-3)
    )
    optimizer = Adafactor()
    for number, gradient in enumerate(gradients(shapes, 5), 1):
        optimizer.step(own, Dense(gradient), RATE)
        # theirs keeps 1 - number^decay_rate, ours as Adam with its bias corrected
        new = (1 - 0.999) / (1 - 0.999**number)
        (group,) = published.param_groups
        group["decay_rate"] = math.log(new) / math.log(number) if number > 1 else 0.0
        for name, parameter in theirs.items():
            parameter.grad = gradient[name]
        published.step()
    for name, parameter in theirs.items():
        assert torch.allclose(own[name], parameter, rtol=1e-5, atol=1e-6), name


def test_the_first_step_by_hand():
    # b = 0 at t = 1. rows: mean of squares 1, 4; columns: 2.5, 2.5; u = g / sqrt(R C / mean R)
    parameter = {"w": torch.zeros(2, 2)}
    Adafactor().step(parameter, Dense({"w": torch.tensor([[1.0, -1.0], [2.0, 2.0]])}), RATE)
    assert torch.allclose(parameter["w"], torch.tensor([[-0.1, 0.1], [-0.1, -0.1]]))


def test_sparse_rows_are_the_dense_algorithm():
    dense, sparse = {"e": torch.zeros(9, 4)}, {"e": torch.zeros(9, 4)}
    one, other = Adafactor(), Adafactor()
    for number, gradient in enumerate(gradients({"e": (3, 4)}, 4)):
        rows = torch.tensor([number, number + 2, 8])
        own = sparse_rows(rows, gradient["e"], (9, 4))
        one.step(dense, Dense({"e": own.to_dense()}), RATE)
        other.step(sparse, Dense({"e": own}), RATE)
    assert torch.allclose(dense["e"], sparse["e"], rtol=1e-5, atol=1e-7)
    assert torch.allclose(one.moments["e"], other.moments["e"], rtol=1e-5)
    assert (sparse["e"] != 0).any(1).tolist() == [True] * 6 + [False] * 2 + [True]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_sparse_rows_serve_the_other_optimizers(name):
    dense, sparse = {"e": torch.zeros(9, 4)}, {"e": torch.zeros(9, 4)}
    one, other = make_optimizer(name), make_optimizer(name)
    for gradient in gradients({"e": (2, 4)}, 3):
        own = sparse_rows(torch.tensor([1, 6]), gradient["e"], (9, 4))
        one.step(dense, Dense({"e": own.to_dense()}), RATE)
        other.step(sparse, Dense({"e": own}), RATE)
    assert torch.equal(dense["e"], sparse["e"])


def test_its_state_is_almost_none_and_goes_on_where_it_was():
    parameters = {"b": torch.zeros(6), "m": torch.zeros(5, 7)}
    shapes = {name: p.shape for name, p in parameters.items()}
    optimizer = Adafactor()
    assert optimizer.save(parameters).numel() == 0
    steps = list(gradients(shapes, 4))
    for gradient in steps[:2]:
        optimizer.step(parameters, Dense(gradient), RATE)
    saved = optimizer.save(parameters)
    assert saved.shape == state_shape("adafactor", list(shapes.values())) == (1, 6 + 12)
    assert sum(t.numel() for t in optimizer.tensors()) == 18
    copy = {name: p.clone() for name, p in parameters.items()}
    other = Adafactor()
    other.load(saved, 2, copy)
    for gradient in steps[2:]:
        optimizer.step(parameters, Dense(gradient), RATE)
        other.step(copy, Dense(gradient), RATE)
    assert all(torch.equal(copy[name], p) for name, p in parameters.items())
    assert state_size(torch.Size([50272, 768])) == 51040


def test_a_large_parameter_is_updated_in_chunks_alike(monkeypatch):
    (gradient,) = gradients({"m": (40, 6)}, 1)
    whole, chunked = {"m": torch.zeros(40, 6)}, {"m": torch.zeros(40, 6)}
    Adafactor().step(whole, Dense(gradient), RATE)
    monkeypatch.setattr("hosl_flower.tensors.rows._CHUNK_ELEMENTS", 50)
    Adafactor().step(chunked, Dense(gradient), RATE)
    assert torch.allclose(whole["m"], chunked["m"], rtol=1e-5)


def test_16_bit_weights_are_rounded_at_random():
    parameter = {"m": torch.ones(200, 50, dtype=torch.bfloat16)}
    gradient = {"m": torch.ones(200, 50)}
    Adafactor().step(parameter, Dense(gradient, rounding_seed=7), 1e-3)  # spacing is 0.004
    moved = 1 - parameter["m"].float().mean()
    assert 0.8e-3 < float(moved) < 1.2e-3


def test_a_row_without_a_gradient_beside_a_huge_one_stays_a_number():
    gradient = torch.zeros(4, 3)
    gradient[1] = 1e12
    parameter = {"m": torch.zeros(4, 3)}
    Adafactor().step(parameter, Dense({"m": gradient}), RATE)
    assert torch.isfinite(parameter["m"]).all()
    assert (parameter["m"][[0, 2, 3]] == 0).all()


def test_momentum_averages_the_steps_of_plain_adafactor():
    shapes = {"m": (5, 7), "v": (6,)}
    plain = {name: torch.zeros(shape) for name, shape in shapes.items()}
    own = {name: torch.zeros(shape) for name, shape in shapes.items()}
    average = {name: torch.zeros(shape) for name, shape in shapes.items()}
    expected = {name: torch.zeros(shape) for name, shape in shapes.items()}
    optimizer, momentum = Adafactor(), AdafactorMomentum()
    for number, gradient in enumerate(gradients(shapes, 6), 1):
        before = {name: p.clone() for name, p in plain.items()}
        optimizer.step(plain, Dense(gradient), RATE)
        momentum.step(own, Dense(gradient), RATE)
        for name in shapes:
            average[name] = 0.9 * average[name] + 0.1 * (plain[name] - before[name])
            expected[name] += average[name] / (1 - 0.9**number)
    # a 127th of a row's largest average, six times, over 1 - 0.9 at first
    assert torch.allclose(own["m"], expected["m"], atol=6 * RATE / 127 * 2)
    assert torch.allclose(own["v"], expected["v"], atol=1e-5)  # a row of its own each
    held = sum(t.numel() * t.element_size() for t in momentum.tensors())
    assert held == 4 * 18 + 41 + 4 * (5 + 6)


def test_momentum_moves_rows_whose_gradient_is_past():
    dense, sparse = {"e": torch.zeros(9, 4)}, {"e": torch.zeros(9, 4)}
    one, other = AdafactorMomentum(), AdafactorMomentum()
    for number, gradient in enumerate(gradients({"e": (3, 4)}, 4)):
        own = sparse_rows(torch.tensor([number, number + 2, 8]), gradient["e"], (9, 4))
        before = sparse["e"].clone()
        one.step(dense, Dense({"e": own.to_dense()}), RATE)
        other.step(sparse, Dense({"e": own}), RATE)
    assert torch.allclose(dense["e"], sparse["e"], atol=4 * 2 * RATE / 127)
    assert (sparse["e"] != before).any(1).tolist() == [True] * 6 + [False] * 2 + [True]


def test_a_tall_matrix_has_second_moments_by_element():
    generator = torch.Generator().manual_seed(0)
    own, expected = {"e": torch.zeros(70, 4)}, torch.zeros(70, 4)
    m, v = torch.zeros(70, 4), torch.zeros(70, 4)
    optimizer = AdafactorMomentum()
    for number in range(1, 31):
        rows = torch.randperm(70, generator=generator)[:40].sort().values
        values = torch.randn(40, 4, generator=generator) * torch.tensor([1.0, 0.5, 2.0, 1.0])
        gradient = sparse_rows(rows, values, (70, 4))
        optimizer.step(own, Dense({"e": gradient}), RATE)
        g = gradient.to_dense()
        v = 0.999 * v + 0.001 * g * g
        m = 0.9 * m + 0.1 * g / (v / (1 - 0.999**number)).sqrt().clamp(min=1e-30)
        expected -= RATE * m / (1 - 0.9**number)
    assert (own["e"] - expected).norm() < 0.05 * expected.norm()  # of 8 bits, twice
    held = sum(t.numel() * t.element_size() for t in optimizer.tensors())
    assert held == 2 * (70 * 4 + 4 * 70)


def test_a_tall_matrix_takes_no_huge_step_where_its_moments_round_to_zero():
    gradient = torch.full((70, 4), 1.0)
    gradient[:, 0] = 1e-9  # nothing in 8 bits beside 1
    own = {"e": torch.zeros(70, 4)}
    optimizer = AdafactorMomentum()
    for _ in range(5):
        optimizer.step(own, Dense({"e": gradient}), RATE)
    assert torch.allclose(own["e"][:, 1:], torch.tensor(-0.5), atol=5e-3)
    still = {"e": torch.zeros(70, 4)}
    AdafactorMomentum().step(
        still, Dense({"e": torch.full((70, 4), 1e-24)}), RATE
    )  # its square is 0
    assert (still["e"].abs() < 1e-8).all()
    assert (own["e"][:, 0].abs() < 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_goes_on_where_it_was(dtype):
    shapes = {"b": torch.Size([6]), "m": torch.Size([5, 7]), "e": torch.Size([40, 2])}
    parameters = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    optimizer = AdafactorMomentum()
    assert optimizer.save(parameters).numel() == 0
    steps = list(gradients(shapes, 4))
    for gradient in steps[:2]:
        optimizer.step(parameters, Dense(gradient), RATE)
    saved = optimizer.save(parameters)
    size = 6 + 12 + 120 + (41 + 11) + 120
    assert saved.shape == state_shape("adafactor-momentum", list(shapes.values())) == (1, size)
    copy = {name: p.clone() for name, p in parameters.items()}
    other = AdafactorMomentum()
    other.load(saved, optimizer.steps, copy)
    for gradient in steps[2:]:
        optimizer.step(parameters, Dense(gradient), RATE)
        other.step(copy, Dense(gradient), RATE)
    assert all(torch.equal(parameters[name], copy[name]) for name in shapes)


def test_an_average_in_8_bits_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(8, 64, generator=generator)
    value[3] = 0.0
    total = torch.zeros_like(value)
    for seed in range(400):
        codes, scales = quantize(value, seed, 0, torch.int8)
        error = codes * scales.unsqueeze(1) - value
        assert (error.abs() <= scales.unsqueeze(1) * 1.001).all()
        total += error
    assert torch.equal(codes[3], torch.zeros(64, dtype=torch.int8))
    # a uniform error of at most one step: 0.5 of its square root of the number of draws, 5 times
    assert (total.abs() / 400 <= scales.unsqueeze(1) * 5 * 0.5 / 20 + 1e-9).all()
