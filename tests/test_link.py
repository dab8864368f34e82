"""Links: catching up, receipts, refusals; the Grid link with real Flower messages."""

import math
import time

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from hosl_flower import client_app
from hosl_flower.client import Client
from hosl_flower.errors import ClientError, ConfigError, DriftError, ProtocolError
from hosl_flower.ledger import Entry, Ledger, fingerprint
from hosl_flower.link.grid import EXCHANGE, GridLink
from hosl_flower.link.inprocess import InProcessLink
from hosl_flower.link.records import pack
from hosl_flower.messages import (
    Activations,
    Behind,
    Describe,
    Failure,
    Fingerprint,
    Forward,
    Limits,
    Losses,
    Probe,
)
from hosl_flower.spec import ClientSpec
from hosl_flower.tasks import TASKS
from hosl_flower.zo import projected_gradients

SPEC = ClientSpec(
    run="r", model="random:opt-tiny", cut_layer=1, dtype="float32", device="cpu", threads=1,
    client_trainable="blocks", perturbation="rank1", task=TASKS["sms-spam"],
    source="bundled:sms_spam", num_clients=2, train_examples=50, eval_examples=20, batch_size=3,
    eval_batch_size=8, max_length=32, seed=0,
)  # fmt: skip
LIMITS = Limits(batch=8, length=32, hidden=64, dtype="float32", classes=2)


@pytest.fixture(autouse=True)
def _inside_a_flower_process(monkeypatch):
    """Messages can only be made where Flower has said which run and node this is."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def client():
    return Client(SPEC)


@pytest.fixture
def ledger():
    return Ledger(SPEC.genesis)


@pytest.fixture
def link(client, ledger):
    client.reset()
    return InProcessLink(client, ledger, LIMITS)


def at(ledger, step=1, partition=0):
    where = {"position": len(ledger), "digest": ledger.digest()}
    return {"step": step, "partition": partition, **where}


def ask(link, *requests):
    return list(link.exchange({requests[0].partition: requests})[requests[0].partition])


def update(ledger, step=1):
    """A Losses request, with its entry appended to the server's ledger."""
    where = at(ledger, step)
    scalars = projected_gradients([0.5, 0.25], 1e-3)
    ledger.append(Entry(step, (step,), tuple(scalars), 1e-4))
    return Losses(
        **where, seeds=(step,), losses=(0.5, 0.25), epsilon=1e-3, learning_rate=1e-4,
        digest_after=ledger.digest(),
    )  # fmt: skip


def test_replies_come_in_order_and_only_when_asked_for(link, ledger, client, monkeypatch):
    handled = []
    original = client._handle
    monkeypatch.setattr(client, "_handle", lambda r: handled.append(r.kind) or original(r))
    replies = link.exchange({0: [Forward(**at(ledger), batch=0), Describe(**at(ledger))]})[0]
    assert handled == []
    assert isinstance(next(replies), Activations)
    assert handled == ["forward"]
    assert next(replies).train_examples == 25


def test_posted_requests_travel_with_the_next_exchange(link, ledger, client):
    link.post(update(ledger))
    assert len(client.ledger) == 0
    (reply,) = ask(link, Forward(**at(ledger), batch=0))
    assert isinstance(reply, Activations)
    assert client.ledger.digest() == ledger.digest()
    link.post(update(ledger, 2))
    link.flush()
    assert client.ledger.digest() == ledger.digest()


def test_a_client_that_lost_its_process_is_caught_up_to_the_same_bits(link, ledger, client):
    for step in (1, 2, 3):
        link.post(update(ledger, step))
        link.flush()
    before = fingerprint(client.parameters)
    client.reset()
    assert fingerprint(client.parameters) != before
    (reply,) = ask(link, Fingerprint(**at(ledger, 4)))
    assert reply.fingerprint == before
    assert link.traffic.down["catch-up"][0] == 1


def test_a_lost_update_in_the_outbox_is_caught_up_too(link, ledger, client):
    link.post(update(ledger, 1))
    link.flush()
    client.reset()
    link.post(update(ledger, 2))
    ask(link, Forward(**at(ledger, 3), batch=0))
    assert client.ledger.digest() == ledger.digest()


def test_an_update_another_partition_made_is_not_made_twice(link, ledger, client):
    request = update(ledger, 1)
    link.post(request)
    link.flush()
    once = fingerprint(client.parameters)
    link.post(request)
    link.flush()
    assert fingerprint(client.parameters) == once


def test_a_client_with_another_history_starts_over_from_its_base(link, ledger, client):
    client._apply([Entry(9, (99,), (0.5,), 1e-2)])
    link.post(update(ledger, 1))
    link.flush()
    fresh = Client(SPEC)
    fresh._apply(ledger.entries)
    assert fingerprint(client.parameters) == fingerprint(fresh.parameters)


def test_an_update_that_disagrees_with_the_servers_is_drift(link, ledger):
    request = update(ledger)
    wrong = Losses(**{**vars(request), "losses": (0.5, 0.125)})
    with pytest.raises(ClientError, match=r"DriftError.*the server's"):
        ask(link, wrong)


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (lambda led: Forward(**at(led, partition=2), batch=0), "partition 2 is not one of 2"),
        (lambda led: Probe(**at(led), batch=0, seed=1, coefficient=1e30), "not finite"),
    ],
)
def test_what_a_client_cannot_do_is_an_error_with_its_name_and_step(
    link, ledger, request_, complaint
):
    with pytest.raises((ClientError, ProtocolError), match=rf"client \d, step 1.*{complaint}"):
        ask(link, request_(ledger))


class Workers(InProcessLink):
    """As Ray or a real fleet: each delivery lands in whichever process `pick` says."""

    def __init__(self, ledger, pick):
        super().__init__(None, ledger, LIMITS)
        self.processes, self.pick, self.deliveries = {}, pick, 0

    def _deliver(self, requests):
        replies = {}
        for partition, own in requests.items():
            worker = self.pick(self.deliveries)
            self.deliveries += 1
            client = self.processes.setdefault(worker, Client(SPEC))
            replies[partition] = iter(list(client.answer(own)))
        return replies


@pytest.mark.parametrize(
    "pick",
    [lambda n: n, lambda n: n % 2, lambda n: n // 2 % 2, lambda n: (n * n + n // 3) % 3],
    ids=["a new process each time", "alternating", "pairs", "mixed"],
)
def test_it_does_not_matter_which_process_answers(ledger, pick):
    link = Workers(ledger, pick)
    prints = []
    for step in range(1, 7):
        partition = step % 2
        where = at(ledger, step, partition)
        (reply,) = ask(link, Fingerprint(**where))
        prints.append(reply.fingerprint)
        request = update(ledger, step)
        link.post(Losses(**{**vars(request), "partition": partition}))
    link.flush()
    reference = Client(SPEC)
    expected = []
    for entry in ledger.entries:
        expected.append(reference.fingerprint())
        reference._apply([entry])
    assert prints == expected


class Rogue(InProcessLink):
    """Replies are changed on their way."""

    def __init__(self, change, *args):
        super().__init__(*args)
        self.change = change

    def _deliver(self, requests):
        return {p: map(self.change, replies) for p, replies in super()._deliver(requests).items()}


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"step": 7}, ProtocolError, "expected activations of step 1, got activations of step 7"),
        ({"activations": torch.zeros(3, 5, 63)}, ProtocolError, r"expected .*\[B, S, 64\]"),
        ({"activations": torch.full((3, 5, 64), math.nan)}, ProtocolError, "not finite"),
    ],
)
def test_a_bad_reply_names_client_step_and_request(client, ledger, change, error, complaint):
    client.reset()

    def tamper(reply):
        mask = torch.ones(3, 5, dtype=torch.bool)
        changed = {"attention_mask": mask, **change} if "activations" in change else change
        return Activations(**{**vars(reply), **changed})

    link = Rogue(tamper, client, ledger, LIMITS)
    with pytest.raises(error, match=rf"client 0, step 1, forward: .*{complaint}"):
        ask(link, Forward(**at(ledger), batch=0))


def test_a_reply_of_another_kind_or_none_is_refused(client, ledger):
    client.reset()
    done = {"step": 1, "seconds": 0.0, "peak_bytes": 0}
    silent = Rogue(lambda r: r, client, ledger, LIMITS)
    silent._deliver = lambda requests: {0: iter(())}
    with pytest.raises(ClientError, match="client 0, step 1, forward: no reply"):
        ask(silent, Forward(**at(ledger), batch=0))
    stubborn = Rogue(
        lambda r: Behind(**done, position=0, digest=ledger.digest()), client, ledger, LIMITS
    )
    with pytest.raises(ProtocolError, match="expected activations of step 1, got behind"):
        ask(stubborn, Forward(**at(ledger), batch=0))
    failing = Rogue(lambda r: Failure(**done, error="DataError: gone"), client, ledger, LIMITS)
    with pytest.raises(ClientError, match="client 0, step 1, forward: DataError: gone"):
        ask(failing, Forward(**at(ledger), batch=0))


def test_a_receipt_with_the_wrong_digest_is_drift(client, ledger):
    client.reset()
    link = Rogue(lambda r: type(r)(**{**vars(r), "digest": "0" * 16}), client, ledger, LIMITS)
    with pytest.raises(DriftError, match="client 0, step 1, losses"):
        ask(link, update(ledger))


class LocalGrid:
    """A Grid whose SuperNodes are function calls: real Messages, real ClientApp handlers."""

    def __init__(self, nodes):
        self.nodes = nodes  # node id -> node config, or None for a node that never answers
        self.answers = {}
        self.sent = []

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            config = self.nodes[message.metadata.dst_node_id]
            message.metadata._message_id = f"m{len(self.sent)}"
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            if config is not None:
                self.answers[ids[-1]] = self.answer(message, config)
        return ids

    def answer(self, message, config):
        context = Context(1, message.metadata.dst_node_id, config, RecordDict(), {})
        if config.get("crash"):
            return Message(Error(code=2, reason="out of memory"), reply_to=message)
        if message.metadata.message_type == EXCHANGE:
            return client_app.exchange(message, context)
        return client_app.node(message, context)

    def pull_messages(self, ids):
        return [self.answers.pop(i) for i in ids if i in self.answers]


def grid_link(nodes, ledger, deadline=20.0):
    return GridLink(LocalGrid(nodes), SPEC, ledger, LIMITS, deadline, nodes_deadline=0.1)


def test_the_grid_link_gives_the_replies_of_the_in_process_link(link, ledger):
    over_grid = grid_link({71: {"partition-id": 1}, 70: {"partition-id": 0}}, ledger)
    assert over_grid.nodes == {0: 70, 1: 71}
    requests = [
        Probe(**at(ledger), batch=0, seed=5, coefficient=1e-3),
        Forward(**at(ledger), batch=0),
    ]
    for mine, theirs in zip(ask(link, *requests), ask(over_grid, *requests), strict=True):
        assert torch.equal(mine.activations, theirs.activations)
        assert torch.equal(mine.labels, theirs.labels)
    assert link.traffic.down == over_grid.traffic.down
    assert len(over_grid.grid.sent) == 2 + 1, "one message per exchange, however many requests"


def test_many_activations_travel_in_several_messages(ledger, monkeypatch):
    largest = 8 * 32 * 64 * 4
    monkeypatch.setattr("hosl_flower.link.grid._MESSAGE_BYTES", 2 * largest)
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, ledger)
    asked = len(link.grid.sent)
    requests = [Forward(**at(ledger), batch=number) for number in range(5)]
    replies = link.exchange({0: requests})[0]
    assert len(link.grid.sent) == asked + 1
    first = [next(replies), next(replies)]
    assert len(link.grid.sent) == asked + 1, "the next message waits until it is wanted"
    rest = list(replies)
    assert len(link.grid.sent) == asked + 3
    alone = [ask(link, request)[0] for request in requests]
    for one, other in zip([*first, *rest], alone, strict=True):
        assert torch.equal(one.activations, other.activations)


def test_spare_nodes_are_left_alone(ledger):
    nodes = {5: None, 6: {}, 7: {"partition-id": 0}, 8: {"partition-id": 1}, 9: {"partition-id": 7}}
    assert grid_link(nodes, ledger).nodes == {0: 7, 1: 8}


def test_the_client_app_caches_one_client_and_never_mixes_runs(ledger):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, ledger)
    ask(link, Describe(**at(ledger)))
    (first,) = client_app._cached.values()
    ask(link, Describe(**at(ledger, partition=1)))
    assert list(client_app._cached.values()) == [first]
    link.spec = ClientSpec(**{**vars(SPEC), "run": "another"})
    ask(link, Describe(**at(ledger)))
    (second,) = client_app._cached.values()
    assert second is not first


def test_a_nodes_own_data_path_is_used(ledger, tmp_path):
    own = tmp_path / "mine.csv"
    rows = [f"{'spam' if i % 3 == 0 else 'ham'},message {i}" for i in range(10)]
    own.write_text("Label,SMS\n" + "\n".join(rows))
    nodes = {7: {"partition-id": 0, "data-path": str(own)}, 8: {"partition-id": 1}}
    link = grid_link(nodes, ledger)
    assert ask(link, Describe(**at(ledger)))[0].train_examples == 8
    assert ask(link, Describe(**at(ledger, partition=1)))[0].train_examples == 25


def test_a_client_that_cannot_start_says_why(ledger):
    link = grid_link(
        {7: {"partition-id": 0, "model-path": "/no/model"}, 8: {"partition-id": 1}}, ledger
    )
    with pytest.raises(ClientError, match=r"client 0 \(node 7\).*'/no/model' does not exist"):
        ask(link, Describe(**at(ledger)))


def test_a_crashed_clientapp_is_named_with_its_reason(ledger):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, ledger)
    link.grid.nodes[7] = {"partition-id": 0, "crash": True}
    with pytest.raises(ClientError, match=r"client 0 \(node 7\) failed: out of memory"):
        ask(link, Describe(**at(ledger)))


def test_a_silent_node_ends_at_the_deadline(ledger):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, ledger)
    link.grid.nodes[7], link.deadline = None, 0.2
    started = time.monotonic()
    with pytest.raises(ClientError, match=r"client 0 \(node 7\) did not answer within 0.2 s"):
        ask(link, Describe(**at(ledger)))
    assert time.monotonic() - started < 5


def test_replies_that_are_not_ours_are_refused(ledger, monkeypatch):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, ledger)

    def foreign(message, context):
        return Message(RecordDict({"config": ConfigRecord({})}), reply_to=message)

    monkeypatch.setattr(client_app, "exchange", foreign)
    with pytest.raises(ProtocolError, match=r"client 0 \(node 7\): expected records"):
        ask(link, Describe(**at(ledger)))


@pytest.mark.parametrize(
    ("nodes", "complaint"),
    [
        (
            {7: {"partition-id": 0}},
            r"num-clients = 2 needs 2 SuperNodes, 1 are connected.*num-supernodes=2",
        ),
        ({7: {"partition-id": 0}, 8: {}}, "SuperNode 8 has no partition-id"),
        ({7: {"partition-id": 0}, 8: {"partition-id": 0}}, "both serve partition 0"),
        ({7: {"partition-id": 0}, 8: {"partition-id": 5}}, "no SuperNode answered for partition 1"),
    ],
)
def test_a_federation_that_does_not_fit_is_refused(ledger, nodes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        grid_link(nodes, ledger)


def test_garbage_sent_to_a_client_app_is_answered_with_a_failure(ledger):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, ledger)
    garbage = pack([Describe(**at(ledger))])  # no spec
    link.grid.push_messages([Message(garbage, dst_node_id=7, message_type=EXCHANGE)])
    (answer,) = link.grid.answers.values()
    assert "ProtocolError" in answer.content["config"]["headers"][0]
