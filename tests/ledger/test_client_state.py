"""ledger/client_state.py, optim/optimizer.py and server/history.py: replay, snapshots, catching up,
finding drift."""

import math

import pytest
import torch
from entries import ENTRIES
from torch import nn

from hosl_flower.errors import DriftError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.ledger.ledger import Entry
from hosl_flower.optim.gradient import Seeded
from hosl_flower.optim.optimizer import AdamW, square_root
from hosl_flower.protocol.messages.activations import Forward
from hosl_flower.protocol.messages.ledger import CatchUp, Fingerprinted, Restore
from hosl_flower.protocol.wire import wire_bytes
from hosl_flower.server.history import History
from hosl_flower.zo.directions import DISTRIBUTIONS, Layout

CAUSE = Forward(step=7, partition=3, position=4, digest="0" * 16, batch=0)


def state(optimizer="sgd", distribution="rank1", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randn(8, 6, generator=generator),
        "b": torch.randn(8, generator=generator),
    }
    parameters = {n: nn.Parameter(t.to(dtype)) for n, t in tensors.items()}
    return ClientState(parameters, distribution, optimizer, "base")


def history(optimizer="sgd", entries=ENTRIES):
    made = History(state(optimizer), "base")
    made.commit(entries)
    return made


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_training_bit_for_bit(optimizer, distribution, dtype):
    trained, replayed = (state(optimizer, distribution, dtype) for _ in range(2))
    for entry in ENTRIES:
        trained.update(trained.seeded(entry.seeds, entry.scalars), entry.learning_rate)
    replayed.apply(ENTRIES[:1])
    replayed.apply(ENTRIES[1:])  # in two halves: handed on from one client to the next
    assert torch.equal(trained.weights(), replayed.weights())
    assert not torch.equal(trained.weights(), state(optimizer, distribution, dtype).weights())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_update_is_torchs_own_on_the_reconstructed_gradient(optimizer):
    ours, theirs = state(optimizer), state(optimizer)
    parameters = theirs.parameters
    torchs = (
        torch.optim.SGD(parameters.values(), lr=1.0)
        if optimizer == "sgd"
        else torch.optim.AdamW(parameters.values(), lr=1.0, weight_decay=0.0)
    )
    for entry in ENTRIES:
        ours.apply([entry])
        directions = [theirs.layout.draw(seed) for seed in entry.seeds]
        for name, parameter in parameters.items():
            parts = [g * d.dense(name) for g, d in zip(entry.scalars, directions, strict=True)]
            parameter.grad = sum(parts, torch.zeros_like(parameter))
        torchs.param_groups[0]["lr"] = entry.learning_rate
        torchs.step()
    assert torch.allclose(ours.weights(), theirs.weights(), atol=1e-6)


def test_one_adam_step_by_hand():
    # g = 2 s: m = 0.2 s, v = 0.004; bias-corrected 2 s and 4, so theta - 0.5 * 2 s / (2 + 1e-8)
    x = {"x": torch.zeros(5)}
    layout = Layout({"x": x["x"].shape})
    AdamW().step(x, Seeded(layout, [3], [2.0]), 0.5)
    assert torch.allclose(x["x"], -0.5 * layout.draw(3).dense("x"), atol=1e-6)


def test_an_adam_step_does_not_depend_on_its_chunks(monkeypatch):
    whole, chunked = state("adamw", "signs"), state("adamw", "signs")
    whole.apply(ENTRIES)
    monkeypatch.setattr("hosl_flower.tensors.rows._CHUNK_ELEMENTS", 7)
    chunked.apply(ENTRIES)
    assert torch.equal(whole.weights(), chunked.weights())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_snapshot_goes_on_as_a_replay_would(optimizer, dtype):
    straight, restored = state(optimizer, dtype=dtype), state(optimizer, dtype=dtype)
    straight.apply(ENTRIES[:2])
    restored.apply(ENTRIES[3:])  # something else altogether
    restored.restore(straight.snapshot())
    assert restored.mark().fingerprint == straight.mark().fingerprint
    for one in (straight, restored):
        one.apply(ENTRIES[2:])
    assert restored.digest == straight.digest
    assert restored.mark().fingerprint == straight.mark().fingerprint


def test_a_snapshot_is_a_copy():
    one = state("adamw")
    one.apply(ENTRIES)
    snapshot = one.snapshot()
    weights, moments = snapshot.weights.clone(), snapshot.moments.clone()
    one.apply(ENTRIES)
    assert torch.equal(weights, snapshot.weights)
    assert torch.equal(moments, snapshot.moments)


def test_a_snapshot_of_another_model_is_refused():
    one, other = state("adamw"), state()
    one.apply(ENTRIES)
    with pytest.raises(ValueError, match=r"optimizer state \[0, 56\], got \[2, 56\]"):
        other.restore(one.snapshot())
    other.parameters.pop("b")
    with pytest.raises(ValueError, match=r"expected 48 weights of torch\.float32, got 56"):
        other.set_weights(one.weights())


def test_a_client_is_caught_up_by_whichever_is_fewer_bytes():
    made = history("adamw")
    near = made.catch_up(2, made.ledger.digest(2), 4, CAUSE)
    assert isinstance(near, CatchUp)
    assert near.entries == ENTRIES[2:]
    made.commit([Entry(10 + i, (i,), (0.5,), 1e-3) for i in range(60)])
    far = made.catch_up(0, made.ledger.digest(0), 64, CAUSE)
    assert isinstance(far, Restore)
    assert (far.position, far.digest) == (64, made.ledger.digest())
    assert wire_bytes(far) <= made.snapshot_bytes
    near = made.catch_up(60, made.ledger.digest(60), 64, CAUSE)
    assert isinstance(near, CatchUp)
    assert wire_bytes(near) < wire_bytes(far)


def test_a_long_history_does_not_grow_without_bound():
    made = history()
    held = []
    for i in range(300):
        made.commit([Entry(10 + i, (i,), (0.5,), 1e-3)])
        held.append(sum(len(entry.pack()) for entry in made.ledger.entries))
    assert max(held) <= made.snapshot_bytes
    assert len(made.ledger) == 304
    assert len(made.ledger.entries) < 30
    replayed = state()
    replayed.apply(ENTRIES)
    replayed.apply([Entry(10 + i, (i,), (0.5,), 1e-3) for i in range(300)])
    assert made.state.mark().fingerprint == replayed.mark().fingerprint


def test_a_client_with_an_unknown_history_starts_over():
    made = history()
    assert made.catch_up(3, "f" * 16, 4, CAUSE).entries == ENTRIES


def test_square_roots_have_the_bits_of_ieee_754():
    # and not those of the processor at hand, or a ledger would depend on it
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = torch.tensor([math.sqrt(value) for value in values.tolist()], dtype=torch.float64)
    assert torch.equal(square_root(values), exact.float())
    assert torch.equal(
        square_root(torch.tensor([[0.0, 1.0], [4.0, 2.25]])), torch.tensor([[0, 1], [2, 1.5]])
    )


def test_new_weights_are_a_position_nobody_can_replay_to():
    made = history()
    before = made.ledger.digest()
    made.jump(9, torch.arange(56.0))
    assert len(made.ledger) == 5
    request = made.catch_up(4, before, 5, CAUSE)
    assert isinstance(request, Restore)
    other = state()
    other.restore(request.snapshot)
    assert torch.equal(other.weights(), torch.arange(56.0))
    assert other.digest == made.ledger.digest()
    made.commit(ENTRIES[:1])
    assert isinstance(made.catch_up(5, other.digest, 6, CAUSE), CatchUp)


def reply(marks):
    return Fingerprinted(
        step=6,
        seconds=0.0,
        peak_bytes=0,
        positions=tuple(marks),
        fingerprints=tuple(marks.values()),
    )


def test_drift_names_the_client_and_the_step_where_it_began():
    made = history()
    good = {p: m.fingerprint for p, m in made.state.trail.items()}
    assert list(good) == [1, 2, 3, 4]
    made.check(reply(good), "client 3")
    bad = {**good, 3: "0" * 16, 4: "1" * 16}
    with pytest.raises(DriftError, match=r"client 3: .*drifted at step 5: at ledger position 3"):
        made.check(reply(bad), "client 3")
    with pytest.raises(DriftError, match=r"client 3: .*drifted after step 1 and by step 5"):
        made.check(reply({1: good[1], 3: bad[3], 4: bad[4]}), "client 3")
    with pytest.raises(DriftError, match="drifted at or before step 6"):
        made.check(reply({4: bad[4]}), "client 3")
    fresh = History(state(), "base")
    fresh.state.mark()
    with pytest.raises(DriftError, match="drifted before the first step"):
        fresh.check(reply({0: "0" * 16}), "client 3")


def test_large_models_are_fingerprinted_when_asked_only(monkeypatch):
    monkeypatch.setattr("hosl_flower.ledger.client_state._TRAIL_ELEMENTS", 10)
    one = state()
    one.apply(ENTRIES)
    assert one.trail == {}
    assert list({4: one.mark()}) == list(one.trail) == [4]


def test_the_trail_is_bounded(monkeypatch):
    monkeypatch.setattr("hosl_flower.ledger.client_state._TRAIL_LENGTH", 2)
    one = state()
    one.apply(ENTRIES)
    assert list(one.trail) == [3, 4]


def test_fingerprints_after_a_snapshot_belong_to_it():
    one, other = state(), state()
    one.apply(ENTRIES[:2])
    other.apply([Entry(1, (99,), (0.5,), 1.0), *ENTRIES[1:3]])
    other.restore(one.snapshot())
    assert other.trail == {}
    assert other.mark().fingerprint == one.mark().fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_16_bit_weights_are_kept_on_average(dtype):
    # a quarter of the spacing above 1: to the nearest it would always be lost
    spacing = torch.finfo(dtype).eps
    parameters = {"w": torch.nn.Parameter(torch.ones(100, 100, dtype=dtype))}
    client = ClientState(parameters, "rank1", "sgd", "g")
    values = torch.full((10_000,), 1 + spacing / 4, dtype=torch.float64)
    client.assign(values, 3)
    moved = parameters["w"].detach().double() - 1
    assert set(moved.unique().tolist()) == {0.0, spacing}
    assert float(moved.mean()) == pytest.approx(spacing / 4, rel=0.1)


def test_a_jump_to_averaged_weights_is_exact_in_float32():
    history = History(state("sgd"), "g")
    wanted = torch.randn(history.state.elements, generator=torch.Generator().manual_seed(1))
    history.jump(1, wanted.double())
    assert torch.equal(history.state.weights(), wanted)
