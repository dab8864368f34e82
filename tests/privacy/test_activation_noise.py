"""Noise on activations: its size, that there is one for each example, and what it leaves alone."""

import pytest
import torch
from runs import run_factory, write_questions
from specs import client_spec

from hosl_flower.client.client import Client
from hosl_flower.errors import ConfigError
from hosl_flower.privacy.activation_noise import ActivationNoise
from hosl_flower.privacy.noise_secret import simulated_secret
from hosl_flower.protocol.messages.activations import Forward, Probe
from hosl_flower.protocol.messages.base import Failure
from hosl_flower.protocol.messages.scalars import CutGradient
from strategies.frozen_client import FrozenClient
from strategies.full_zo import FullZo
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl
from strategies.split_zo import SplitZo

SPEC = client_spec(activation_noise=0.5)
OPEN = client_spec()


@pytest.fixture
def make(tiny_opt, tmp_path):
    still = {"directions": 1, "client-learning-rate": 1e-6}
    return run_factory(FrozenClient, tiny_opt, tmp_path, **still)


def sequences(count=3, length=5, hidden=400):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (count, length), generator=generator)
    return torch.randn(count, length, hidden, generator=generator) * 3, ids, torch.ones_like(ids)


def test_noise_has_its_share_of_each_tokens_size():
    h, ids, mask = sequences()
    h[:, 2] *= 100
    noise = ActivationNoise(0.25, b"s").over(h, ids, mask, "w") - h
    share = noise.square().mean(-1).sqrt() / h.square().mean(-1).sqrt()
    assert share.sub(0.25).abs().max() < 4 * 0.25 / (2 * 400) ** 0.5
    assert abs(float((noise / h.square().mean(-1, keepdim=True).sqrt()).mean())) < 0.02


def test_an_example_has_one_noise_at_the_same_weights_wherever_it_is():
    veil = ActivationNoise(1.0, b"s")
    h, ids, mask = sequences()
    noise = veil.over(h, ids, mask, "w") - h
    turned = veil.over(h.flip(0), ids.flip(0), mask, "w") - h.flip(0)
    assert turned.flip(0).allclose(noise, atol=1e-5)
    longer = torch.zeros(3, 7, 400), torch.ones(3, 7, dtype=ids.dtype), torch.zeros(3, 7)
    for wide, own in zip(longer, (h, ids, mask), strict=True):
        wide[:, 2:] = own
    padded = veil.over(*longer, "w")
    assert padded[:, :2].abs().max() == 0
    assert (padded[:, 2:] - h).allclose(noise, atol=1e-5)
    other = ActivationNoise(1.0, b"t").over(h, ids, mask, "w") - h
    assert (other - noise).abs().mean() > 1
    moved = veil.over(h, ids, mask, "other weights") - h
    assert (moved - noise).abs().mean() > 1
    ids[0, 0] += 1
    changed = veil.over(h, ids, mask, "w") - h
    assert (changed[0] - noise[0]).abs().mean() > 1
    assert changed[1:].allclose(noise[1:], atol=1e-5)


def test_pixels_are_an_example_too():
    veil, pixels = ActivationNoise(1.0, b"s"), torch.rand(2, 3, 4, 4)
    h, mask = torch.ones(2, 9, 6), torch.ones(2, 9, dtype=torch.int64)
    first, second = veil.over(h, pixels, mask, "w") - h
    assert (first - second).abs().mean() > 0.5
    assert (veil.over(h[:1], pixels[1:], mask[:1], "w")[0] - 1).allclose(second, atol=1e-6)


def test_sixteen_bits_stay_sixteen():
    h, ids, mask = sequences()
    assert ActivationNoise(0.5, b"s").over(h.bfloat16(), ids, mask, "w").dtype == torch.bfloat16


def asked(spec, *requests, secret=None):
    client = Client(spec, secret=secret or simulated_secret(spec.seed))
    at = {"step": 1, "partition": 0, "position": 0, "digest": client.state.digest}
    return list(client.answer([kind(**at, **own) for kind, own in requests]))


FORWARD = (Forward, {"batch": 0})


def test_what_is_asked_again_is_the_same():
    (first,), (again, twice) = asked(SPEC, FORWARD), asked(SPEC, FORWARD, FORWARD)
    (plain,) = asked(OPEN, FORWARD)
    assert first.activations.equal(again.activations)
    assert first.activations.equal(twice.activations)
    assert not first.activations.allclose(plain.activations, rtol=0.1)
    (other,) = asked(SPEC, FORWARD, secret=b"x" * 32)
    assert not other.activations.allclose(first.activations, rtol=0.1)


def test_probes_do_not_leave_a_client_with_noise(make):
    probe = (Probe, {"batch": 0, "seed": 3, "coefficient": 1e-3})
    (reply,) = asked(SPEC, probe)
    assert isinstance(reply, Failure)
    assert "with activation-noise no probe leaves this client" in reply.error
    for method in (Hosl, SplitZo):
        with pytest.raises(ConfigError, match="does not use activation-noise"):
            make(method, activation_noise=1.0)


def test_a_clients_own_numbers_are_of_its_activations_as_they_are():
    (reply,) = asked(OPEN, FORWARD)
    gradient = torch.randn(reply.activations.shape, generator=torch.Generator().manual_seed(1))
    request = (
        CutGradient,
        {
            "batch": 0, "gradient": gradient, "scales": torch.empty(0), "scale": 1.0,
            "directions": 2, "seeds": (1, 2), "epsilon": 1e-3, "learning_rate": 1e-3,
        },
    )  # fmt: skip
    (noisy,), (plain,) = asked(SPEC, request), asked(OPEN, request)
    assert noisy.scalars.equal(plain.scalars)


def test_central_evaluations_are_without_noise(make):
    still = {"server_learning_rate": 0.0, "steps": 1, "eval_every": 1, "save_model": False}
    plain, _, _ = make(**still)
    split, _, _ = make(**still, activation_noise=1.0)
    central, _, _ = make(**still, activation_noise=1.0, evaluation="central")
    assert central.loss == pytest.approx(plain.loss, rel=1e-6)
    assert abs(split.loss - plain.loss) > 1e-3


def test_the_same_run_with_noise_is_the_same_and_trains_on_it(make):
    keys = {"activation_noise": 1.0, "client_learning_rate": 1e-3, "save_model": False}
    first, _, _ = make(HoSfl, **keys)
    again, _, _ = make(HoSfl, **keys)
    assert again.evaluations == first.evaluations
    plain, _, _ = make(HoSfl, client_learning_rate=1e-3, save_model=False)
    assert plain.evaluations[-1] != first.evaluations[-1]


def test_where_there_are_no_activations_or_text_is_written_noise_is_refused(make, tmp_path):
    with pytest.raises(ConfigError, match="full-zo does not use activation-noise"):
        make(FullZo, cut_layer=3, activation_noise=1.0, server_learning_rate=1e-3)
    own = {"task": "squad", "data-path": str(write_questions(tmp_path / "q")), "prompt": ""}
    with pytest.raises(ConfigError, match="activation-noise is for choices"):
        make(**own, verbalizers="", activation_noise=1.0)
