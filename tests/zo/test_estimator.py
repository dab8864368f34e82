"""zo/estimator.py: arithmetic a reader can do by hand, then autograd as the judge."""

import copy

import pytest
import torch
from torch import nn

from hosl_flower.optim.gradient import Seeded
from hosl_flower.optim.optimizer import Sgd
from hosl_flower.tensors.rounding import to_float32
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout
from hosl_flower.zo.estimator import Point, estimate, probe_points, projected_gradients
from hosl_flower.zo.perturbed import perturbed


def test_points_two_sided_and_one_sided():
    assert probe_points([7, 9], 0.5) == [
        Point(7, 0.5),
        Point(7, -0.5),
        Point(9, 0.5),
        Point(9, -0.5),
    ]
    assert probe_points([7, 9], 0.5, two_sided=False) == [
        Point(0, 0.0),
        Point(7, 0.5),
        Point(9, 0.5),
    ]


def test_projected_gradients_by_hand():
    # (5 - 1) / (2 * 0.5 * 2) = 2 and (3 - 4) / 2 = -0.5: the 1/Q is inside
    assert projected_gradients([5.0, 1.0, 3.0, 4.0], 0.5) == [2.0, -0.5]
    # (5 - 1) / (0.5 * 2) = 4 and (3 - 1) / 1 = 2
    assert projected_gradients([1.0, 5.0, 3.0], 0.5, two_sided=False) == [4.0, 2.0]


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0], [float("nan"), 1.0]])
def test_values_that_do_not_fit_are_refused(values):
    with pytest.raises(ValueError, match=r"values|finite"):
        projected_gradients(values, 1e-3)


def test_a_quadratic_by_hand():
    # f(x) = |x|^2 / 2 at x = (3, -1), direction s = (s0, s1): two-sided is exact, g = 3 s0 - s1,
    # so theta - eta g s = (3 - eta (3 - s0 s1), -1 - eta (3 s0 s1 - 1))
    x = torch.tensor([3.0, -1.0])
    layout = Layout({"x": x.shape})
    for seed in range(8):
        s = layout.draw(seed).dense("x")

        def surrogate(points, s=s):
            return [float(((x + p.coefficient * s) ** 2).sum() / 2) for p in points]

        (g,) = estimate(surrogate, [seed], 0.25)
        assert g == 3 * s[0] - s[1]
        updated = {"x": x.clone()}
        Sgd().step(updated, Seeded(layout, [seed], [g]), 0.5)
        product = float(s[0] * s[1])
        assert updated["x"].tolist() == [3 - 0.5 * (3 - product), -1 - 0.5 * (3 * product - 1)]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.x = torch.randn(16, 6, generator=generator)

    def loss(self):
        return self.b(torch.tanh(self.a(self.x))).square().mean()


@pytest.fixture
def small():
    return Small()


def surrogate_of(model, layout):
    parameters = dict(model.named_parameters())

    def surrogate(points):
        for point in points:
            with perturbed(parameters, layout.draw(point.seed), point.coefficient):
                yield float(model.loss())

    return surrogate


def layout_of(model, distribution="rank1"):
    return Layout({n: p.shape for n, p in model.named_parameters()}, distribution)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("two_sided", [True, False])
def test_projected_gradient_is_autograds_directional_derivative(small, distribution, two_sided):
    layout = layout_of(small, distribution)
    small.loss().backward()
    for seed in range(5):
        direction = layout.draw(seed)
        exact = sum(float((p.grad * direction.dense(n)).sum()) for n, p in small.named_parameters())
        (g,) = estimate(surrogate_of(small, layout), [seed], 1e-3, two_sided)
        assert g == pytest.approx(exact, rel=0.02, abs=0.05)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mean_over_many_seeds_is_the_gradient(small, distribution):
    layout = layout_of(small, distribution)
    small.loss().backward()
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    seeds = list(range(600))
    scalars = estimate(surrogate_of(small, layout), seeds, 1e-3)
    Sgd().step(dict(small.named_parameters()), Seeded(layout, seeds, scalars), 1.0)
    estimated = torch.cat([(before[n] - p.detach()).flatten() for n, p in small.named_parameters()])
    exact = torch.cat([p.grad.flatten() for _, p in small.named_parameters()])
    assert torch.cosine_similarity(estimated, exact, dim=0) > 0.85
    assert estimated.norm() / exact.norm() == pytest.approx(1.1, abs=0.2)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_an_update_is_the_formula_to_the_last_bit(distribution):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    layout = Layout({"w": weight.shape}, distribution)
    expected = weight.clone()
    for seed, scalar in ((1, 0.3), (2, -1.7)):
        expected = expected - layout.draw(seed).dense("w") * to_float32(1e-2 * scalar)
    updated = {"w": weight.clone()}
    Sgd().step(updated, Seeded(layout, [1, 2], [0.3, -1.7]), 1e-2)
    assert torch.equal(updated["w"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_does_not_depend_on_its_chunks(dtype, monkeypatch):
    weight = torch.randn(100, 33, generator=torch.Generator().manual_seed(3)).to(dtype)
    layout = Layout({"w": weight.shape}, "signs")
    whole, chunked = {"w": weight.clone()}, {"w": weight.clone()}
    Sgd().step(whole, Seeded(layout, [1, 2], [0.3, -1.7]), 1e-2)
    monkeypatch.setattr("hosl_flower.tensors.rows._CHUNK_ELEMENTS", 70)
    Sgd().step(chunked, Seeded(layout, [1, 2], [0.3, -1.7]), 1e-2)
    assert torch.equal(whole["w"], chunked["w"])


def test_a_lazy_surrogate_is_consumed_one_value_at_a_time(small):
    alive = []

    def surrogate(points):
        for point in points:
            alive.append(point)
            yield 1.0
            assert len(alive) == 1
            alive.pop()

    assert estimate(surrogate, [1, 2, 3], 1e-3) == [0.0, 0.0, 0.0]


def test_estimating_leaves_the_weights_alone(small):
    before = copy.deepcopy(small.state_dict())
    estimate(surrogate_of(small, layout_of(small)), [1, 2], 1e-3)
    assert all(torch.equal(v, before[n]) for n, v in small.state_dict().items())
