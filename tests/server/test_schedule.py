"""Schedules of the learning rates: numbers by hand, and what a run makes of them."""

import json

import pytest
from runs import metrics, run_factory

from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.server.schedule import client_rate, rate_factor
from strategies.frozen_client import FrozenClient
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl

LINEAR = {"learning_rate_schedule": "linear"}


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(HoSfl, tiny_opt, tmp_path, **{"save-model": False})


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_factors_by_hand(schedule, factors):
    keys = {"learning-rate-schedule": schedule, "warmup-steps": 2, "steps": 6}
    config = parse_config({**keys, "client-learning-rate": 0.5})
    assert [rate_factor(config, step) for step in range(1, 7)] == pytest.approx(factors, abs=1e-15)
    assert client_rate(config, 1) == 0.25


def test_a_warm_up_over_all_steps_is_refused():
    with pytest.raises(ConfigError, match="warmup-steps = 6 leaves none of the 6 steps"):
        parse_config({"warmup-steps": 6, "steps": 6})


@pytest.mark.parametrize("method", [Hosl, HoSfl])
def test_the_ledger_has_each_steps_rate(make, method):
    _, directory, _ = make(method, **LINEAR, client_learning_rate=1e-3)
    lines = (directory / "ledger.jsonl").read_text().splitlines()
    rates = [row["learning_rate"] for row in map(json.loads, lines) if "learning_rate" in row]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4], rel=1e-12)


def test_the_server_goes_by_it_too(make):
    """The first of two steps is a full one; the second half as long."""
    keys = {"client_learning_rate": 1e-6, "directions": 1, "eval_every": 1, "steps": 2}
    _, falling, _ = make(FrozenClient, **keys, **LINEAR)
    _, constant, _ = make(FrozenClient, **keys)
    _, half, _ = make(FrozenClient, **{**keys, "steps": 1}, server_learning_rate=5e-3)
    start, first, second = losses(falling)
    assert first == losses(constant)[1]
    assert second != losses(constant)[2]
    # plain SGD: to first order in the rate, half the rate is half the way
    assert start - losses(half)[1] == pytest.approx((start - first) / 2, rel=0.1)
    assert first - second == pytest.approx((first - losses(constant)[2]) / 2, rel=0.1)


def losses(directory):
    """Of the evaluations."""
    return [row["held_out"]["loss"] for row in metrics(directory) if "held_out" in row]


def test_a_falling_rate_is_not_gone_on_with_to_another_end(make):
    _, directory, _ = make(**LINEAR, checkpoint_every=2)
    with pytest.raises(ConfigError, match=r"steps = 4, here 6"):
        make(**LINEAR, steps=6, resume=str(directory))
