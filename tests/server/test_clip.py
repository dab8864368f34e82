"""scalar-clip: how far one client moves the model, by hand and with one that cheats."""

import math
from types import SimpleNamespace

import pytest
import torch
from links import link_that, scalars_of
from runs import metrics, run_factory
from safetensors.torch import load_file

from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError, DivergedError
from hosl_flower.protocol.messages.activations import Activations
from hosl_flower.protocol.messages.scalars import Scalars
from hosl_flower.server.cohort import Cohort
from hosl_flower.server.session import Session
from hosl_flower.zo.estimator import clip
from strategies.full_zo import FullZo
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl

RATE, CLIP, P = 1e-2, 0.5, 2
KEYS = {
    "client-trainable": "blocks", "client-learning-rate": RATE, "directions": P, "steps": 1,
    "eval-every": 1,
}  # fmt: skip
MANY = {"num_clients": 4, "clients_per_step": 4, "aggregation": "mean"}


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(HoSfl, tiny_opt, tmp_path, **KEYS)


def of_session(**keys):
    """As much of a session as merging scalars needs, and a cohort of clients 0 and 1."""
    config = parse_config({"strategy": "strategies.ho_sfl:HoSfl", "num-clients": 2, **keys})
    session = Session(config, *[None] * 7)
    session.participation.clients = {
        m: SimpleNamespace(train_examples=n) for m, n in ((0, 30), (1, 10))
    }
    return session, Cohort(session, 7, [0, 1])


def test_scalars_are_bounded_on_both_sides_and_0_is_no_bound():
    scalars = torch.tensor([[3.0, -5.0], [0.5, 1.0]])
    assert clip(scalars, 1.0).tolist() == [[1.0, -1.0], [0.5, 1.0]]
    assert clip(scalars, 0.0) is scalars


@pytest.mark.parametrize(
    ("keys", "entry"),
    [
        ({}, [0.75 * 2 + 0.25 * 1, 0.75 * -2 + 0.25 * -2]),
        ({"aggregation": "mean"}, [1.5, -2.0]),
        ({"aggregation": "median"}, [1.5, -2.0]),
        ({"client-seeds": "per-client", "aggregation": "mean"}, [1.0, -1.0, 0.5, -1.0]),
    ],
)
def test_each_clients_scalars_are_clipped_before_they_are_averaged(keys, entry):
    session, cohort = of_session(**{"directions": 2, "scalar-clip": 2.0, **keys})
    sent = torch.tensor([[[1e6, -3.0]], [[1.0, -2.0]]])  # [K, E, P]
    (found,) = HoSfl(session.config).entries(session, cohort, sent)
    assert list(found.scalars) == entry
    assert session.participation.clipped == {0: 2}, "-2 is within"
    assert session.participation.clipped_at == {7: {0: 2}}


def test_what_an_unfinished_step_has_clipped_is_taken_back():
    session, _ = of_session(**{"scalar-clip": 2.0})
    session.history, session.server = SimpleNamespace(ledger=[]), SimpleNamespace(trained={})
    session.clip(6, 0, torch.tensor([3.0, 1.0]))
    place = session.place()
    session.clip(6, 0, torch.tensor([3.0, -3.0]))
    session.clip(7, 1, torch.tensor([3.0, 3.0]))
    assert session.return_to(place)
    assert session.participation.clipped == {0: 1}
    assert session.participation.clipped_at == {6: {0: 1}}


def blown_up(partition, request, reply):
    """Client 0 sends a million times its scalars."""
    if isinstance(reply, Scalars) and partition == 0:
        return Scalars(**{**vars(reply), "scalars": reply.scalars * 1e6})
    return reply


def moved(directory, start):
    """How far the client's blocks have come: the largest of a weight, and the norm."""
    weights = load_file(directory / "model" / "model.safetensors")
    own = [
        (weights[name].double() - start[name].double()).flatten()
        for name in weights
        if ".layers.0." in name or ".layers.1." in name
    ]
    away = torch.cat(own)
    return float(away.abs().max()), float(away.norm()), away.numel()


def test_one_client_moves_the_model_as_far_as_the_bound_says(make, monkeypatch):
    honest, a, config = make(**MANY, scalar_clip=CLIP)
    link_that(monkeypatch, blown_up)
    cheated, b, _ = make(**MANY, scalar_clip=CLIP)
    base = load_file(f"{config.model}/model.safetensors")
    start = load_file(a / "model" / "model.safetensors")
    assert cheated.clients["scalars_clipped"]["0"] == P
    reach = RATE * P * CLIP  # of all clients together; one has a quarter
    largest, norm, count = moved(b, base)
    assert largest <= reach * (1 + 1e-5)
    assert norm <= reach * math.sqrt(count) * (1 + 1e-5)
    # what it changes: from somewhere within its quarter to the quarter's edge
    largest, norm, _ = moved(b, start)
    assert 0 < largest <= 2 * reach / 4 * (1 + 1e-4)
    assert norm <= 2 * reach / 4 * math.sqrt(count) * (1 + 1e-4)
    assert honest.fingerprint != cheated.fingerprint


def test_unclipped_the_loss_leaves_and_clipped_it_stays(make, monkeypatch):
    # the head is probed too: with a server's final norm above it, a client cannot go far wrong
    keys = {
        **MANY, "cut_layer": 3, "steps": 3, "eval_every": 3, "client_learning_rate": 1e-4,
        "server_learning_rate": 1e-3, "save_model": False,
    }  # fmt: skip
    honest, _, _ = make(FullZo, **keys)
    link_that(monkeypatch, blown_up)
    with pytest.raises(DivergedError, match=r"evaluation at step 3: .* has diverged"):
        make(FullZo, **keys)
    held, directory, _ = make(FullZo, **keys, scalar_clip=CLIP)
    assert abs(held.loss - honest.loss) < 0.01
    assert max(abs(g) for row in scalars_of(directory) for g in row) <= CLIP
    rows = [row["clipped"] for row in metrics(directory) if "clipped" in row]
    assert [row["0"] for row in rows] == [P] * 3
    assert held.clients["scalars_clipped"]["0"] == 3 * P
    assert held.clients["fingerprint_checked"] == [0, 1, 2, 3]


def test_a_relay_clips_on_both_sides_alike(make, monkeypatch):
    def loud(partition, request, reply):
        if isinstance(reply, Activations) and request.kind == "probe" and request.coefficient > 0:
            return Activations(**{**vars(reply), "activations": reply.activations * -3})
        return reply

    link_that(monkeypatch, loud)
    keys = {"num_clients": 2, "steps": 2, "eval_every": 2, "save_model": False}
    bare, a, _ = make(Hosl, **keys, client_learning_rate=1e-6)
    assert min(abs(g) for row in scalars_of(a) for g in row) > 0.3
    assert bare.clients["scalars_clipped"] == {}
    held, b, _ = make(Hosl, **keys, scalar_clip=0.3)  # no float32: the nearest one bounds
    assert {abs(g) for row in scalars_of(b) for g in row} == {float(torch.tensor(0.3))}
    assert held.clients["scalars_clipped"] == {"0": P, "1": P}
    assert held.clients["fingerprint_checked"] == [0, 1], "the clients clip as the server does"


def test_a_bound_no_scalar_can_pass_is_refused():
    with pytest.raises(ConfigError, match=r"scalar-clip = .*: input should be less than"):
        parse_config({"scalar-clip": 1e13})
