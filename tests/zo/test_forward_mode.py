"""zo/forward_mode.py: the exact derivative along a direction, of every use of a parameter."""

import pytest
import torch
from decoders import FULL, IDS, PADDED, TINY, halves, saved  # noqa: F401
from layers import EveryUse, layout_of, named
from runs import run_factory

from hosl_flower.errors import ConfigError
from hosl_flower.tensors.rounding import to_float32
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout
from hosl_flower.zo.estimator import directional
from hosl_flower.zo.forward_mode import along, derivative
from strategies.fedavg_zo import FedAvgZo
from strategies.heron import Heron
from strategies.ho_sfl import HoSfl

PLACES = torch.tensor([[1, 5, 5, 19], [0, 2, 3, 4]])


def exact(model, direction, value, cotangent):
    """<gradient of <cotangent, value>, s>, by back-propagation."""
    parameters = named(model) if isinstance(model, EveryUse) else model.canonical_parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    found = torch.autograd.grad(value(), list(parameters.values()), cotangent, allow_unused=True)
    return sum(
        float((g * direction.dense(name).to(g.dtype)).sum())
        for (name, _), g in zip(parameters.items(), found, strict=True)
        if g is not None
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_use_of_a_parameter_has_its_tangent(distribution):
    model = EveryUse().double()
    direction = layout_of(model, distribution).draw(5)
    with along(named(model), direction):
        tangent = derivative(model(PLACES))
    cotangent = torch.linspace(-1, 1, tangent.numel(), dtype=torch.float64).view_as(tangent)
    expected = exact(model, direction, lambda: model(PLACES), cotangent)
    assert float((tangent * cotangent).sum()) == pytest.approx(expected, rel=1e-10)


def test_without_a_parameter_there_is_none():
    with along({}, Layout({}).draw(1)):
        assert derivative(torch.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", TINY)
def test_every_family_has_one(saved, name):  # noqa: F811
    directory, _ = saved(name)
    client, _ = halves(directory, 2)
    client = client.double()
    parameters = client.canonical_parameters()
    direction = Layout({n: p.shape for n, p in parameters.items()}).draw(3)
    for mask in (FULL, PADDED):
        with along(parameters, direction):
            tangent = derivative(client(IDS, mask))
        cotangent = torch.randn(
            tangent.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )
        cotangent *= mask.unsqueeze(-1)
        expected = exact(client, direction, lambda mask=mask: client(IDS, mask), cotangent)
        # rotary angles and root mean squares are float32 in transformers, and what is added up
        # has both signs
        size = float((tangent * cotangent).abs().sum())
        assert float((tangent * cotangent).sum()) == pytest.approx(expected, abs=1e-6 * size)


def test_scalars_by_hand():
    assert directional(lambda seed: seed / 8, [4, 12]) == [0.25, 0.75]
    assert directional(lambda _: 1e-3, [1]) == [to_float32(1e-3)]
    with pytest.raises(ValueError, match="must be finite"):
        directional(lambda _: float("nan"), [1])


@pytest.fixture
def make(tiny_opt, tmp_path):
    own = {"save-model": False, "num-clients": 2, "server-optimizer": "adamw"}
    return run_factory(HoSfl, tiny_opt, tmp_path, **own)


@pytest.mark.parametrize("method", [HoSfl, FedAvgZo])
def test_a_run_finds_what_ever_smaller_probes_find(make, method):
    keys = {"local_steps": 2, "steps": 2, "client_learning_rate": 1e-2}
    near, _, _ = make(method, **keys, epsilon=1e-4)
    there, _, _ = make(method, **keys, derivative="forward-mode")
    assert there.loss == pytest.approx(near.loss, rel=1e-4)
    assert there.fingerprint != near.fingerprint


def test_micro_batches_change_rounding_only(make):
    keys = {"derivative": "forward-mode", "client_learning_rate": 1e-2}
    whole, _, _ = make(**keys)
    pieces, _, _ = make(**keys, client_micro_batch=2)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)


def test_what_has_no_use_or_no_way_is_refused(make):
    with pytest.raises(ConfigError, match="epsilon has no use without derivative = differences"):
        make(derivative="forward-mode", epsilon=3e-3)
    with pytest.raises(ConfigError, match="heron-sfl does not use derivative"):
        make(Heron, derivative="forward-mode")
