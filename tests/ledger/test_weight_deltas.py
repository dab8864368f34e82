"""Clients follow the run's weights in 8 bits, and nothing is lost for good (ApplyDeltas)."""

from dataclasses import replace

import pytest
import torch
from specs import client_spec, history_for

from hosl_flower.client.client import Client
from hosl_flower.errors import ProtocolError
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.ledger.ledger import fingerprint
from hosl_flower.ledger.weight_deltas import WeightDeltas
from hosl_flower.protocol.messages.base import Behind, Failure
from hosl_flower.protocol.messages.ledger import Applied, ApplyDeltas, Fingerprint, Restore
from hosl_flower.server.history import History
from hosl_flower.tensors.update_codec import RowLayout, decode_update

ROWS = RowLayout({"w": torch.Size([2, 2])})
SPEC = client_spec(client_trainable="blocks", update_codec="int8")


def test_what_a_change_loses_is_made_up_for():
    """0.3 beside 127 is written as 0 or 1; in 50 steps it is 15, to within a last one."""
    shifts = WeightDeltas(ROWS)
    change = torch.tensor([0.3, 127.0, 0.0, 0.0])
    told = sum(decode_update(ROWS, shifts.encode(change, seed)) for seed in range(50))
    assert told[0] == pytest.approx(15.0, abs=1.05)
    assert told[1] == pytest.approx(50 * 127.0, rel=1e-4)
    assert torch.allclose(told + shifts.lost, 50 * change, atol=1e-3)


def test_what_is_lost_of_a_row_waits_until_the_row_changes_again():
    shifts = WeightDeltas(ROWS)
    first = shifts.encode(torch.tensor([0.3, 127.0, 0.3, 127.0]), 1)
    lost = shifts.lost.clone()
    assert lost.any()
    second = shifts.encode(torch.tensor([0.0, 0.0, 1.0, 2.0]), 2)
    assert first.present.tolist() == [True, True]
    assert second.present.tolist() == [False, True]
    assert torch.equal(shifts.lost[:2], lost[:2])


def moved(history, steps):
    source = torch.Generator().manual_seed(7)
    for step in steps:
        history.shift(step, torch.randn(history.state.elements, generator=source) * 1e-3)


def at(history, position=0, digest=None, **more):
    digest = history.ledger.digest(0) if digest is None else digest
    return {"step": 9, "partition": 0, "position": position, "digest": digest, **more}


def end_of(history):
    return Fingerprint(**at(history, len(history.ledger), history.ledger.digest()), since=0)


@pytest.fixture
def history():
    return history_for(SPEC)


def test_clients_follow_to_the_same_bits_however_far_behind(history):
    early, late = Client(SPEC), Client(SPEC)
    start = history.ledger.digest()
    moved(history, [1])
    catch_up = history.catch_up(0, start, 1, end_of(history))
    assert isinstance(catch_up, ApplyDeltas)
    assert isinstance(next(early.answer([catch_up])), Applied)
    position, digest = early.state.position, early.state.digest
    moved(history, [2, 3])
    ahead = history.catch_up(position, digest, 3, end_of(history))
    whole = history.catch_up(0, start, 3, end_of(history))
    assert (ahead.steps, whole.steps) == ((2, 3), (1, 2, 3))
    for client, catch_up in ((early, ahead), (late, whole)):
        (reply,) = client.answer([catch_up])
        assert (reply.position, reply.digest) == (3, history.ledger.digest())
        assert fingerprint(client.state.parameters) == fingerprint(history.state.parameters)
        (again,) = client.answer([catch_up])  # its receipt was lost, or another partition's
        assert isinstance(again, Applied)
        assert fingerprint(client.state.parameters) == fingerprint(history.state.parameters)


def test_a_client_in_the_middle_of_a_move_takes_what_it_lacks(history):
    """As when one process serves several partitions."""
    client = Client(SPEC)
    start = history.ledger.digest()
    moved(history, [1])
    assert next(client.answer([history.catch_up(0, start, 1, end_of(history))]))
    moved(history, [2])
    both = history.catch_up(0, start, 2, end_of(history))
    (reply,) = client.answer([both])
    assert (reply.position, reply.digest) == (2, history.ledger.digest())
    assert fingerprint(client.state.parameters) == fingerprint(history.state.parameters)


def test_a_client_of_another_history_is_behind(history):
    client, other = Client(SPEC), history_for(SPEC)
    start = history.ledger.digest()
    moved(other, [7])
    assert next(client.answer([other.catch_up(0, start, 1, end_of(other))])).position == 1
    moved(history, [1, 2])
    (reply,) = client.answer([history.catch_up(0, start, 2, end_of(history))])
    assert isinstance(reply, Behind)
    assert (reply.position, reply.digest) == (1, other.ledger.digest())
    whole = history.catch_up(reply.position, reply.digest, 2, end_of(history))
    assert isinstance(whole, Restore)


def test_a_move_that_fails_half_way_leaves_nobodys_weights(history, monkeypatch):
    client = Client(SPEC)
    start = history.ledger.digest()
    moved(history, [1, 2])
    both = history.catch_up(0, start, 2, end_of(history))
    move, calls = ClientState.move, []

    def fails(self, change, seed):
        calls.append(seed)
        move(self, change, seed)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(ClientState, "move", fails)
    assert isinstance(next(client.answer([both])), Failure)
    monkeypatch.undo()
    (reply,) = client.answer([both])
    assert isinstance(reply, Behind)
    whole = history.catch_up(reply.position, reply.digest, 2, end_of(history))
    assert isinstance(next(client.answer([whole])), Applied)
    assert fingerprint(client.state.parameters) == fingerprint(history.state.parameters)


def test_clients_share_the_tensors_of_a_move(history):
    start = history.ledger.digest()
    moved(history, [1, 2])
    a, b = (history.catch_up(0, start, 2, end_of(history)) for _ in range(2))
    assert a.values.data_ptr() == b.values.data_ptr()


def test_what_a_change_undoes_is_not_told_again():
    shifts = WeightDeltas(ROWS)
    first = torch.tensor([0.3, 127.0, 0.0, 0.0])
    told = decode_update(ROWS, shifts.encode(first, 1))
    back = torch.cat([-shifts.lost[:1], torch.tensor([1.0, 0.0, 0.0])])
    told += decode_update(ROWS, shifts.encode(back, 2))
    assert torch.allclose(told + shifts.lost, first + back, atol=1e-5)


def test_what_would_be_more_than_the_weights_is_sent_as_weights(history):
    start = history.ledger.digest()
    moved(history, range(1, 12))
    assert isinstance(history.catch_up(0, start, 11, end_of(history)), Restore)
    assert isinstance(history.catch_up(4, "0" * 16, 11, end_of(history)), Restore)


def test_one_that_lost_more_than_is_kept_starts_from_the_weights(history):
    client = Client(SPEC)
    start = history.ledger.digest()
    moved(history, range(1, 12))
    request = history.catch_up(0, start, 11, end_of(history))
    (reply,) = client.answer([request])
    assert reply.position == 11
    assert fingerprint(client.state.parameters) == fingerprint(history.state.parameters)


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": (1, 2)},
        {"digests": ("0" * 16,) * 2},
        {"present": torch.zeros(1, 3, dtype=torch.bool)},
        {"values": torch.zeros(5, dtype=torch.int8)},
        {"scales": torch.full((1,), float("nan"))},
    ],
)
def test_a_move_that_does_not_fit_changes_nothing(history, damage):
    client = Client(SPEC)
    before = fingerprint(client.state.parameters)
    start = history.ledger.digest()
    moved(history, [1])
    good = history.catch_up(0, start, 1, end_of(history))
    with pytest.raises(ProtocolError, match="move: expected"):
        replace(good, **damage).changes(client.state.rows)
    (reply,) = client.answer([replace(good, **damage)])
    assert isinstance(reply, Failure)
    assert fingerprint(client.state.parameters) == before
    assert client.state.position == 0


def test_16_bit_weights_move_on_average_by_less_than_their_spacing():
    spec = client_spec(client_trainable="blocks", dtype="bfloat16", update_codec="int8")
    client, state = Client(spec), Client(spec).state
    history = History(state, spec.genesis)
    start, before = history.ledger.digest(), state.weights().float()
    for step in range(1, 21):
        history.shift(step, torch.full((state.elements,), 1e-5))
        move = history.catch_up(client.state.position, client.state.digest, step, end_of(history))
        assert isinstance(move, ApplyDeltas)
        assert isinstance(next(client.answer([move])), Applied)
    assert fingerprint(client.state.parameters) == fingerprint(state.parameters)
    assert history.ledger.digest() != start
    assert (state.weights().float() - before).mean() == pytest.approx(2e-4, rel=0.2)
