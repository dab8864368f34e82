"""steps-per-message: several steps' client work at the same client weights, over any link; and
what the server does while clients probe."""

import pytest
import torch
from runs import metrics, run_factory
from steps import losses

from hosl_flower.ledger.ledger import Ledger
from hosl_flower.protocol.messages.activations import Forward, Probe
from hosl_flower.protocol.messages.ledger import Losses
from hosl_flower.protocol.messages.scalars import CutGradient
from hosl_flower.run.loop import grouped
from hosl_flower.server.in_process import InProcessLink
from strategies.fedavg_zo import FedAvgZo
from strategies.ho_sfl import HoSfl
from strategies.hosl import Hosl

MANY = {
    "num_clients": 4, "clients_per_step": 2, "client_trainable": "blocks",
    "client_learning_rate": 1e-2, "steps": 6, "eval_every": 6,
}  # fmt: skip


@pytest.fixture
def make(tiny_opt, tmp_path):
    return run_factory(Hosl, tiny_opt, tmp_path, **{"save-model": False})


@pytest.fixture
def sent(monkeypatch):
    """Training requests of every exchange: [(step, kind, position)], exchange by exchange."""
    exchanges = []
    original = InProcessLink._deliver

    def deliver(self, requests, until):
        own = [r for part in requests.values() for r in part]
        kinds = (Probe, Forward, CutGradient, Losses)
        exchanges.append([(r.step, r.kind, r.position) for r in own if isinstance(r, kinds)])
        return original(self, requests, until)

    monkeypatch.setattr(InProcessLink, "_deliver", deliver)
    return exchanges


@pytest.mark.parametrize(
    ("steps", "together", "every", "groups"),
    [
        (5, 1, 2, [[1], [2], [3], [4], [5]]),
        (7, 3, 100, [[1, 2, 3], [4, 5, 6], [7]]),
        (7, 3, 4, [[1, 2, 3], [4], [5, 6, 7]]),
        (3, 50, 1, [[1], [2], [3]]),
    ],
)
def test_groups_of_steps_never_hold_an_evaluation(steps, together, every, groups):
    assert [list(group) for group in grouped(steps, together, every)] == groups


def test_hosl_asks_several_steps_at_the_same_weights_and_commits_them_after(make, sent):
    results, directory, _ = make(steps=4, eval_every=4, steps_per_message=2, directions=1)
    training = [exchange for exchange in sent if any(kind == "forward" for _, kind, _ in exchange)]
    asked = ["probe", "probe", "forward"]
    assert training == [
        [(step, kind, 0) for step in (1, 2) for kind in asked],
        # both updates go with the next message, in ledger order
        [(1, "losses", 0), (2, "losses", 1)]
        + [(step, kind, 2) for step in (3, 4) for kind in asked],
    ]
    assert len(Ledger.read(directory / "ledger.jsonl").entries) == 4
    assert results.clients["fingerprint_checked"] == [0]


def test_the_first_step_of_a_group_is_exact_and_a_frozen_client_makes_all_exact(make):
    _, one, _ = make(steps=4, eval_every=4)
    _, two, _ = make(steps=4, eval_every=4, steps_per_message=2)
    entries = [Ledger.read(d / "ledger.jsonl").entries for d in (one, two)]
    assert entries[0][0] == entries[1][0]
    assert entries[0][1] != entries[1][1], "the second is probed at older client weights"
    frozen = {"client_learning_rate": 0.0, "steps": 4, "eval_every": 4}
    _, a, _ = make(**frozen)
    _, b, _ = make(**frozen, steps_per_message=4)
    assert metrics(a) == metrics(b), "nothing is stale where nothing moves"


@pytest.mark.parametrize("method", [HoSfl, FedAvgZo])
def test_many_clients_share_a_message_over_steps(make, sent, method):
    frozen = {**MANY, "client_learning_rate": 0.0}
    _, a, _ = make(method, **frozen)
    del sent[:]
    results, b, _ = make(method, **frozen, steps_per_message=3)
    forwards = [x for x in sent if any(kind == "forward" for _, kind, _ in x)]
    assert [sorted({step for step, _, _ in x}) for x in forwards] == [[1, 2, 3], [4, 5, 6]]
    assert losses(a) == losses(b)
    assert sum(results.clients["steps_taken_part"].values()) == 6 * 2
    moved, c, _ = make(method, **MANY, steps_per_message=3)
    assert moved.clients["fingerprint_checked"] == [0, 1, 2, 3]
    assert losses(c)[0] == losses(a)[0]


def test_relay_clients_may_share_a_group(make):
    results, _, _ = make(num_clients=2, steps=6, eval_every=6, steps_per_message=3)
    assert results.clients["steps_taken_part"] == {"0": 3, "1": 3}
    assert results.clients["fingerprint_checked"] == [0, 1]


def test_a_client_gets_its_cut_gradient_before_the_server_has_seen_the_others(make, monkeypatch):
    order = []
    deliver, step = InProcessLink._deliver, torch.optim.SGD.step

    def delivers(self, requests, until):
        order.extend(f"to {p}" for p, own in requests.items() if isinstance(own[-1], CutGradient))
        return deliver(self, requests, until)

    def steps(self, *arguments):
        order.append("server steps")
        return step(self, *arguments)

    monkeypatch.setattr(InProcessLink, "_deliver", delivers)
    monkeypatch.setattr(torch.optim.SGD, "step", steps)
    one = {**MANY, "steps": 1, "eval_every": 1, "clients_per_step": 4}
    _, a, _ = make(HoSfl, **one, server_micro_batch=5)
    assert order == ["to 0", "to 1", "to 2", "to 3", "server steps"]
    monkeypatch.setattr(InProcessLink, "pipelined", False)
    del order[:]
    _, b, _ = make(HoSfl, **one, server_micro_batch=5)
    assert order == ["server steps", "to 0", "to 1", "to 2", "to 3"]
    assert metrics(a) == metrics(b), "the same numbers with and without overlap"
