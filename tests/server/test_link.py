"""Links: catching up, receipts, refusals; the Grid link with real Flower messages."""

import math
import time

import pytest
import torch
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from grids import LocalGrid
from specs import client_spec, history_for

from hosl_flower.client.client import Client
from hosl_flower.errors import (
    AbsentError,
    ClientError,
    ConfigError,
    DriftError,
    ProtocolError,
)
from hosl_flower.flower import client_calls
from hosl_flower.flower.message_link import EXCHANGE, GridLink
from hosl_flower.flower.nodes import Nodes
from hosl_flower.flower.records import pack
from hosl_flower.ledger.ledger import Entry
from hosl_flower.protocol.messages.activations import Activations, Forward, Probe
from hosl_flower.protocol.messages.base import Behind, Failure
from hosl_flower.protocol.messages.describe import Describe
from hosl_flower.protocol.messages.ledger import Applied, Fingerprint, Losses
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.server.in_process import InProcessLink
from hosl_flower.zo.estimator import projected_gradients

SPEC = client_spec()
LIMITS = ReplyLimits(batch=8, length=32, hidden=64, dtype="float32", classes=2)


@pytest.fixture(autouse=True)
def _inside_a_flower_process(monkeypatch):
    """Messages can only be made where Flower has said which run and node this is."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def client():
    return Client(SPEC)


@pytest.fixture
def history():
    return history_for(SPEC)


@pytest.fixture
def link(client, history):
    client.reset()
    return InProcessLink(client.answer, history, LIMITS)


def at(history, step=1, partition=0):
    where = {"position": len(history.ledger), "digest": history.ledger.digest()}
    return {"step": step, "partition": partition, **where}


def ask(link, *requests):
    return list(link.exchange({requests[0].partition: requests})[requests[0].partition])


def update(history, step=1, directions=1):
    """A Losses request, with its entry made part of the server's history."""
    where, seeds = at(history, step), tuple(range(step, step + directions))
    losses = (0.5, 0.25) * directions
    history.commit([Entry(step, seeds, tuple(projected_gradients(losses, 1e-3)), 1e-4)])
    return Losses(
        **where, seeds=seeds, losses=losses, epsilon=1e-3, learning_rate=1e-4,
        digest_after=history.ledger.digest(),
    )  # fmt: skip


def test_replies_come_in_order_and_only_when_asked_for(link, history, client, monkeypatch):
    handled = []
    original = client._handle
    monkeypatch.setattr(client, "_handle", lambda r: handled.append(r.kind) or original(r))
    replies = link.exchange({0: [Forward(**at(history), batch=0), Describe(**at(history))]})[0]
    assert handled == []
    assert isinstance(next(replies), Activations)
    assert handled == ["forward"]
    assert next(replies).train_examples == 25


def test_posted_requests_travel_with_the_next_exchange(link, history, client):
    link.post(update(history))
    assert client.state.position == 0
    (reply,) = ask(link, Forward(**at(history), batch=0))
    assert isinstance(reply, Activations)
    assert client.state.digest == history.ledger.digest()
    link.post(update(history, 2))
    link.flush()
    assert client.state.digest == history.ledger.digest()


def test_a_client_that_lost_its_process_is_caught_up_to_the_same_bits(link, history, client):
    for step in (1, 2, 3):
        link.post(update(history, step))
        link.flush()
    before = client.state.mark().fingerprint
    client.reset()
    assert client.state.mark().fingerprint != before
    (reply,) = ask(link, Fingerprint(**at(history, 4), since=0))
    assert reply.fingerprints[-1] == before
    assert link.traffic.down["catch-up"][0] == 1


def test_a_lost_update_in_the_outbox_is_caught_up_too(link, history, client):
    link.post(update(history, 1))
    link.flush()
    client.reset()
    link.post(update(history, 2))
    ask(link, Forward(**at(history, 3), batch=0))
    assert client.state.digest == history.ledger.digest()


def test_receipts_of_updates_the_ledger_has_let_go_of_since():
    """One weight matrix [64, 64] under adapters of rank 1: 128 weights are fewer bytes than an
    entry of 100 directions, so that the ledger holds none of them."""
    spec = client_spec(client_trainable="lora", lora_rank=1, lora_targets="q_proj")
    history, client = history_for(spec), Client(spec)
    link = InProcessLink(client.answer, history, LIMITS)
    requests = [update(history, step, directions=100) for step in (1, 2, 3)]
    assert history.ledger.start == 3
    for again in (False, True):  # and once more, as if the receipts had been lost
        for request in requests:
            link.post(request)
        link.flush()
        assert client.state.position == 3, again
        assert client.state.mark().fingerprint == history.state.mark().fingerprint
    other = Applied(step=3, seconds=0.0, peak_bytes=0, position=3, digest="0" * 16)
    with pytest.raises(DriftError, match="which is not the server's"):
        link._check(0, requests[-1], other)


def test_an_update_another_partition_made_is_not_made_twice(link, history, client):
    request = update(history, 1)
    link.post(request)
    link.flush()
    once = client.state.mark().fingerprint
    link.post(request)
    link.flush()
    assert client.state.mark().fingerprint == once


def test_a_client_with_another_history_starts_over_from_its_base(link, history, client):
    client.follower.apply([Entry(9, (99,), (0.5,), 1e-2)])
    link.post(update(history, 1))
    link.flush()
    fresh = Client(SPEC)
    fresh.follower.apply(history.ledger.entries)
    assert client.state.mark().fingerprint == fresh.state.mark().fingerprint


def test_an_update_that_disagrees_with_the_servers_is_drift(link, history):
    request = update(history)
    wrong = Losses(**{**vars(request), "losses": (0.5, 0.125)})
    with pytest.raises(ClientError, match=r"client 0, step 1, losses: DriftError.*the server's"):
        ask(link, wrong)


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (lambda led: Forward(**at(led, partition=2), batch=0), "partition 2 is not one of 2"),
        (lambda led: Probe(**at(led), batch=0, seed=1, coefficient=1e30), "not finite"),
    ],
)
def test_what_a_client_cannot_do_is_an_error_with_its_name_and_step(
    link, history, request_, complaint
):
    with pytest.raises((ClientError, ProtocolError), match=rf"client \d, step 1.*{complaint}"):
        ask(link, request_(history))


class Workers(InProcessLink):
    """As Ray or a real fleet: each delivery lands in whichever process `pick` says."""

    def __init__(self, history, pick, spec=SPEC):
        super().__init__(None, history, LIMITS)
        self.processes, self.pick, self.deliveries, self.spec = {}, pick, 0, spec

    def _deliver(self, requests, until):
        replies = {}
        for partition, own in requests.items():
            worker = self.pick(self.deliveries)
            self.deliveries += 1
            client = self.processes.setdefault(worker, Client(self.spec))
            replies[partition] = iter(list(client.answer(own)))
        return replies


@pytest.mark.parametrize(
    "pick",
    [lambda n: n, lambda n: n % 2, lambda n: n // 2 % 2, lambda n: (n * n + n // 3) % 3],
    ids=["a new process each time", "alternating", "pairs", "mixed"],
)
def test_it_does_not_matter_which_process_answers(history, pick):
    link = Workers(history, pick)
    prints = []
    for step in range(1, 7):
        partition = step % 2
        where = at(history, step, partition)
        (reply,) = ask(link, Fingerprint(**where, since=0))
        prints.append(reply.fingerprints[-1])
        request = update(history, step)
        link.post(Losses(**{**vars(request), "partition": partition}))
    link.flush()
    reference = Client(SPEC)
    expected = []
    for entry in history.ledger.entries:
        expected.append(reference.state.mark().fingerprint)
        reference.follower.apply([entry])
    assert prints == expected


class Rogue(InProcessLink):
    """Replies are changed on their way."""

    def __init__(self, change, *args):
        super().__init__(*args)
        self.change = change

    def _deliver(self, requests, until):
        return {
            p: map(self.change, replies) for p, replies in super()._deliver(requests, until).items()
        }


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"step": 7}, ProtocolError, "expected activations of step 1, got activations of step 7"),
        ({"activations": torch.zeros(3, 5, 63)}, ProtocolError, r"expected .*\[B, S, 64\]"),
        ({"activations": torch.full((3, 5, 64), math.nan)}, ProtocolError, "not finite"),
    ],
)
def test_a_bad_reply_names_client_step_and_request(client, history, change, error, complaint):
    client.reset()

    def tamper(reply):
        mask = torch.ones(3, 5, dtype=torch.bool)
        changed = {"attention_mask": mask, **change} if "activations" in change else change
        return Activations(**{**vars(reply), **changed})

    link = Rogue(tamper, client.answer, history, LIMITS)
    with pytest.raises(error, match=rf"client 0, step 1, forward: .*{complaint}"):
        ask(link, Forward(**at(history), batch=0))


def test_a_reply_of_another_kind_or_none_is_refused(client, history):
    client.reset()
    done = {"step": 1, "seconds": 0.0, "peak_bytes": 0}
    silent = Rogue(lambda r: r, client.answer, history, LIMITS)
    silent._deliver = lambda requests, until: {0: iter(())}
    with pytest.raises(ClientError, match="client 0, step 1, forward: no reply"):
        ask(silent, Forward(**at(history), batch=0))
    stubborn = Rogue(
        lambda r: Behind(**done, position=0, digest=history.ledger.digest()),
        client.answer,
        history,
        LIMITS,
    )
    with pytest.raises(ProtocolError, match="catch-up: expected applied of step 1, got behind"):
        ask(stubborn, Forward(**at(history), batch=0))
    failing = Rogue(
        lambda r: Failure(**done, error="DataError: gone"), client.answer, history, LIMITS
    )
    with pytest.raises(ClientError, match="client 0, step 1, forward: DataError: gone"):
        ask(failing, Forward(**at(history), batch=0))


def test_a_receipt_with_the_wrong_digest_is_drift(client, history):
    client.reset()
    link = Rogue(
        lambda r: type(r)(**{**vars(r), "digest": "0" * 16}), client.answer, history, LIMITS
    )
    with pytest.raises(DriftError, match="client 0, step 1, losses"):
        ask(link, update(history))


def grid_link(nodes, history, deadline=20.0, spec=SPEC, per_node=0, required=None):
    grid = LocalGrid(nodes)
    found = Nodes(grid, spec.num_clients, per_node, deadline)
    found.wait(0.1, spec.num_clients if required is None else required)
    return GridLink(grid, spec, history, LIMITS, deadline, found)


def serving(link):
    return {p: link.nodes.of(p).id for p in link.nodes.served()}


def test_the_grid_link_gives_the_replies_of_the_in_process_link(link, history):
    over_grid = grid_link({71: {"partition-id": 1}, 70: {"partition-id": 0}}, history)
    assert serving(over_grid) == {0: 70, 1: 71}
    requests = [
        Probe(**at(history), batch=0, seed=5, coefficient=1e-3),
        Forward(**at(history), batch=0),
    ]
    for mine, theirs in zip(ask(link, *requests), ask(over_grid, *requests), strict=True):
        assert torch.equal(mine.activations, theirs.activations)
        assert torch.equal(mine.labels, theirs.labels)
    assert link.traffic.down == over_grid.traffic.down
    assert len(over_grid.grid.sent) == 2 + 1, "one message per exchange, however many requests"


def test_many_activations_travel_in_several_messages(history, monkeypatch):
    largest = 8 * 32 * 64 * 4
    monkeypatch.setattr("hosl_flower.flower.message_link._MESSAGE_BYTES", 2 * largest)
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)
    asked = len(link.grid.sent)
    requests = [Forward(**at(history), batch=number) for number in range(5)]
    replies = link.exchange({0: requests})[0]
    assert len(link.grid.sent) == asked + 1
    first = [next(replies), next(replies)]
    assert len(link.grid.sent) == asked + 1, "the next message waits until it is wanted"
    rest = list(replies)
    assert len(link.grid.sent) == asked + 3
    alone = [ask(link, request)[0] for request in requests]
    for one, other in zip([*first, *rest], alone, strict=True):
        assert torch.equal(one.activations, other.activations)


def test_spare_nodes_are_left_alone(history):
    nodes = {5: None, 6: {}, 7: {"partition-id": 0}, 8: {"partition-id": 1}, 9: {"partition-id": 7}}
    assert serving(grid_link(nodes, history)) == {0: 7, 1: 8}


def test_the_client_app_caches_one_client_and_never_mixes_runs(history):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)
    ask(link, Describe(**at(history)))
    (first,) = client_calls._cached.values()
    ask(link, Describe(**at(history, partition=1)))
    assert list(client_calls._cached.values()) == [first]
    link.spec = client_spec(run="another")
    ask(link, Describe(**at(history)))
    (second,) = client_calls._cached.values()
    assert second is not first


def test_a_nodes_own_data_path_is_used(history, tmp_path):
    own = tmp_path / "mine.csv"
    rows = [f"{'spam' if i % 3 == 0 else 'ham'},message {i}" for i in range(10)]
    own.write_text("Label,SMS\n" + "\n".join(rows))
    nodes = {7: {"partition-id": 0, "data-path": str(own)}, 8: {"partition-id": 1}}
    link = grid_link(nodes, history)
    assert ask(link, Describe(**at(history)))[0].train_examples == 8
    assert ask(link, Describe(**at(history, partition=1)))[0].train_examples == 25


def test_a_client_that_cannot_start_is_named_and_says_why_in_its_log(history, caplog):
    link = grid_link(
        {7: {"partition-id": 0, "model-path": "/no/model"}, 8: {"partition-id": 1}}, history
    )
    with pytest.raises(
        ClientError, match=r"client 0 \(node 7\).*in the log of this client"
    ) as error:
        ask(link, Describe(**at(history)))
    assert "/no/model" not in str(error.value)
    assert "'/no/model' does not exist" in caplog.text


def test_a_crashed_clientapp_is_named_with_its_reason(history):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)
    link.grid.nodes[7] = {"partition-id": 0, "crash": True}
    with pytest.raises(ClientError, match=r"client 0 \(node 7\) failed: out of memory"):
        ask(link, Describe(**at(history)))


def test_a_silent_node_ends_at_the_deadline(history):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)
    link.grid.nodes[7], link.deadline = None, 0.2
    started = time.monotonic()
    with pytest.raises(ClientError, match=r"client 0 \(node 7\) did not answer within 0.2 s"):
        ask(link, Fingerprint(**at(history), since=0))
    assert time.monotonic() - started < 5


def test_a_description_has_the_time_a_node_has_to_start(history):
    """It loads its data for that, which a reply-deadline of seconds does not allow for."""
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)
    link.deadline, link.nodes.deadline = 0.1, 0.4
    link.grid.nodes[7] = None
    started = time.monotonic()
    with pytest.raises(ClientError, match=r"client 0 \(node 7\) did not answer within 0.4 s"):
        ask(link, Describe(**at(history)))
    assert time.monotonic() - started >= 0.4
    assert {message.metadata.ttl for message in link.grid.sent[-1:]} == {0.4}


def test_replies_that_are_not_ours_are_refused(history, monkeypatch):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)

    def foreign(message, context):
        return Message(RecordDict({"config": ConfigRecord({})}), reply_to=message)

    monkeypatch.setattr(client_calls, "exchange", foreign)
    with pytest.raises(ProtocolError, match=r"client 0 \(node 7\): expected records"):
        ask(link, Describe(**at(history)))


@pytest.mark.parametrize("shape", [(0, 2**39, 2**39), (2**62, 0, 2), (2**62,), (0,) * 5, (-1, 0)])
def test_a_tensor_whose_size_overflows_is_that_clients_error_alone(history, monkeypatch, shape):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)
    original = client_calls.exchange

    def overflows(message, context):
        answer = original(message, context)
        if context.node_id == 7:
            arrays = answer.content["arrays"]
            arrays["0.activations"] = Array("float32", shape, "hosl.raw", b"")
        return answer

    monkeypatch.setattr(client_calls, "exchange", overflows)
    streams = link.exchange({p: [Forward(**at(history, 1, p), batch=0)] for p in (0, 1)})
    with pytest.raises(ProtocolError, match=r"client 0 \(node 7\): tensor shape"):
        list(streams[0])
    assert len(list(streams[1])) == 1


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
def test_a_federation_that_does_not_fit_is_refused(history, nodes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        grid_link(nodes, history)


def test_garbage_sent_to_a_client_app_is_answered_with_a_failure(history):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)
    garbage = pack([[Describe(**at(history))]])  # no spec
    link.grid.push_messages([Message(garbage, dst_node_id=7, message_type=EXCHANGE)])
    (answer,) = link.grid.answers.values()
    assert "ProtocolError" in answer.content["config"]["headers"][0]


NODES = {7: {"partition-id": 0, "num-partitions": 2}, 8: {"partition-id": 1, "num-partitions": 2}}
FIVE = client_spec(num_clients=5)


def test_nodes_share_the_clients_and_answer_for_each(caplog):
    caplog.set_level("INFO", logger="hosl_flower")
    history = history_for(FIVE)
    over_grid = grid_link(NODES, history, spec=FIVE)
    assert serving(over_grid) == {0: 7, 1: 8, 2: 7, 3: 8, 4: 7}
    assert "5 client(s) on 2 SuperNode(s), up to 3 clients on each" in caplog.text
    plain = InProcessLink(Client(FIVE).answer, history, LIMITS)
    asked = len(over_grid.grid.sent)
    requests = {
        p: [Describe(**at(history, 1, p)), Forward(**at(history, 1, p), batch=0)] for p in range(5)
    }
    answers, expected = (link.exchange(requests) for link in (over_grid, plain))
    for partition in (4, 0, 2, 1, 3):  # in any order
        (described, forward), (_, theirs) = list(answers[partition]), list(expected[partition])
        assert described.train_examples == 10
        assert torch.equal(forward.activations, theirs.activations)
    assert len(over_grid.grid.sent) == asked + 2, "one message per node, however many clients"


@pytest.mark.parametrize(("per_node", "nodes"), [(5, 1), (3, 2), (2, 3), (1, 5)])
def test_clients_per_node_says_how_many_nodes_are_needed(per_node, nodes):
    history = history_for(FIVE)
    there = {50 + i: {"partition-id": i} for i in range(nodes)}
    link = grid_link(there, history, spec=FIVE, per_node=per_node)
    assert serving(link) == {p: 50 + p % nodes for p in range(5)}
    if nodes > 1:
        del there[50]
        with pytest.raises(ConfigError, match=f"num-clients = 5 needs {nodes} SuperNodes"):
            grid_link(there, history, spec=FIVE, per_node=per_node)


def test_one_failing_client_of_a_node_does_not_stop_the_others():
    history = history_for(FIVE)
    link = grid_link(NODES, history, spec=FIVE)
    requests = {p: [Forward(**at(history, 1, p), batch=0)] for p in (0, 2, 4)}
    requests[2] = [Probe(**at(history, 1, 2), batch=-0, seed=1, coefficient=1e30), *requests[2]]
    streams = link.exchange(requests)
    assert len(list(streams[0])) == 1
    with pytest.raises(ProtocolError, match=r"client 2 \(node 7\).*not finite"):
        list(streams[2])
    assert len(list(streams[4])) == 1


def test_activations_of_many_clients_travel_in_several_messages(monkeypatch):
    largest = 8 * 32 * 64 * 4
    monkeypatch.setattr("hosl_flower.flower.message_link._MESSAGE_BYTES", 2 * largest)
    history = history_for(FIVE)
    link = grid_link(NODES, history, spec=FIVE)
    asked = len(link.grid.sent)
    requests = {p: [Forward(**at(history, 1, p), batch=b) for b in range(3)] for p in (0, 2, 4)}
    streams = link.exchange(requests)
    assert len(link.grid.sent) == asked + 1
    found = {p: list(streams[p]) for p in (4, 0, 2)}
    assert len(link.grid.sent) == asked + 5, "9 forwards, two in each message"
    plain = InProcessLink(Client(FIVE).answer, history, LIMITS).exchange(requests)
    for partition, replies in found.items():
        for mine, theirs in zip(replies, plain[partition], strict=True):
            assert torch.equal(mine.activations, theirs.activations)


def test_a_client_whose_process_died_is_asked_again(history):
    link = grid_link({7: {"partition-id": 0}, 8: {"partition-id": 1}}, history)
    original, died = link.grid.answer, []

    def dies_twice(message, config):
        if len(died) < 2:
            died.append(message)
            client_calls._cached.clear()
            return Message(Error(code=2, reason="killed"), reply_to=message)
        return original(message, config)

    link.grid.answer = dies_twice
    history.commit([Entry(1, (5,), (0.5,), 1e-3)])
    (reply,) = ask(link, Fingerprint(**at(history), since=0))
    assert reply.fingerprints[-1] == history.state.mark().fingerprint
    assert len(died) == 2


@pytest.mark.parametrize("gone", [False, True], ids=["silent", "gone"])
def test_a_second_try_that_nobody_answers_is_told_from_an_error(history, gone):
    there = {7: {"partition-id": 0}, 8: {"partition-id": 1}}
    link = grid_link(there, history)

    def dies(message, config):
        there[7] = None
        if gone:
            del there[7]
        return Message(Error(code=2, reason="killed"), reply_to=message)

    link.grid.answer, link.deadline = dies, 0.2
    with pytest.raises(ClientError) as failed:
        ask(link, Fingerprint(**at(history), since=0))
    assert isinstance(failed.value, AbsentError) is not gone
    assert ("failed: killed" if gone else "did not answer within 0.2 s") in str(failed.value)


def test_a_late_joiner_is_found_and_caught_up(history, caplog):
    caplog.set_level("INFO", logger="hosl_flower")
    there = {7: {"partition-id": 0}}
    link = grid_link(there, history, required=1)
    assert "1 client(s) have no node yet and may join later" in caplog.text
    with pytest.raises(ClientError, match="client 1: its SuperNode is not connected"):
        ask(link, Forward(**at(history, 1, 1), batch=0))
    history.commit([Entry(1, (5,), (0.5,), 1e-3)])
    there[9] = {"partition-id": 1}
    (reply,) = ask(link, Fingerprint(**at(history, 2, 1), since=0))
    assert reply.fingerprints[-1] == history.state.mark().fingerprint
    assert link.traffic.down["catch-up"][0] == 1


def test_a_node_that_went_and_came_back_under_another_id_is_found(history):
    there = {7: {"partition-id": 0}, 8: {"partition-id": 1}}
    link = grid_link(there, history)
    link.deadline = 0.2
    there[8] = None  # goes silent: its message is lost
    with pytest.raises(ClientError, match=r"client 1 \(node 8\) did not answer"):
        ask(link, Describe(**at(history, 1, 1)))
    del there[8]
    with pytest.raises(ClientError):
        ask(link, Describe(**at(history, 1, 1)))
    there[33] = {"partition-id": 1}
    assert ask(link, Describe(**at(history, 1, 1)))[0].train_examples == 25
    assert serving(link) == {0: 7, 1: 33}


def test_a_node_that_claims_a_taken_number_later_changes_nothing(history, caplog):
    there = {7: {"partition-id": 0}}
    link = grid_link(there, history, required=1)
    there[9] = {"partition-id": 0}  # and partition 1 is still missing
    assert link.absent() == {1}
    assert ask(link, Describe(**at(history)))[0].train_examples == 25
    assert serving(link) == {0: 7}
    assert "both serve partition 0" in caplog.text
    del there[7]  # it was the same node, restarted: now its old id is gone
    assert link.absent() == {1}
    assert serving(link) == {0: 9}


def test_a_node_whose_first_answer_fails_is_asked_again(history):
    nodes = {7: {"partition-id": 0}, 8: {"partition-id": 1}}
    grid, failed = LocalGrid(nodes), []
    original = grid.answer

    def fails_once(message, config):
        if not failed:
            failed.append(message)
            return Message(Error(code=2, reason="busy"), reply_to=message)
        return original(message, config)

    grid.answer = fails_once
    found = Nodes(grid, 2, 0, 20.0)
    found.wait(5.0, 2)
    assert found.served() == [0, 1]


def test_a_silent_node_costs_one_deadline_however_much_it_was_asked(monkeypatch):
    monkeypatch.setattr("hosl_flower.flower.message_link._MESSAGE_BYTES", 1)
    history = history_for(FIVE)
    link = grid_link({7: {"partition-id": 0, "num-partitions": 1}}, history, spec=FIVE)
    link.grid.nodes[7], link.deadline = None, 0.3
    asked, started = len(link.grid.sent), time.monotonic()
    streams = link.exchange({p: [Forward(**at(history, 1, p), batch=0)] for p in range(5)})
    for replies in streams.values():
        with pytest.raises(ClientError, match=r"did not answer within 0\.3 s"):
            list(replies)
    assert time.monotonic() - started < 1.2
    assert len(link.grid.sent) == asked + 1
    assert link.traffic.down == {}, "what nobody answered is not counted"


def test_snapshots_are_spread_over_messages_by_their_size(monkeypatch):
    history = history_for(FIVE)
    link = grid_link(NODES, history, spec=FIVE)
    history.jump(1, torch.zeros(history.state.elements))
    monkeypatch.setattr(
        "hosl_flower.flower.message_link._MESSAGE_BYTES", 5 * history.state.elements
    )
    asked = len(link.grid.sent)
    streams = link.exchange({p: [Fingerprint(**at(history, 2, p), since=1)] for p in (0, 2, 4)})
    for replies in streams.values():
        assert next(replies).fingerprints[-1] == history.state.mark().fingerprint
    assert len(link.grid.sent) == asked + 3, "one snapshot in each"


def test_a_late_node_does_not_move_other_clients():
    history = history_for(FIVE)
    there = {
        7: {"partition-id": 0, "num-partitions": 3},
        8: {"partition-id": 1, "num-partitions": 3},
    }
    link = grid_link(there, history, spec=FIVE, required=3)
    before = serving(link)
    there[9] = {"partition-id": 2, "num-partitions": 3}
    link.absent()
    assert serving(link) == {**before, 2: 9}


def test_a_client_far_behind_gets_a_snapshot_when_that_is_fewer_bytes():
    lora = client_spec(client_trainable="lora", client_optimizer="adamw", lora_rank=1)
    history = history_for(lora)
    link = InProcessLink(Client(lora).answer, history, LIMITS)
    history.commit([Entry(i, (i, i + 1), (0.5, 0.25), 1e-3) for i in range(400)])
    (reply,) = ask(link, Fingerprint(**at(history, 400), since=400))
    assert reply.fingerprints[-1] == history.state.mark().fingerprint
    assert link.traffic.down["restore"][0] == 1
    assert "catch-up" not in link.traffic.down
    history.commit([Entry(400, (1, 2), (0.5, 0.25), 1e-3)])  # the optimizer's state came too
    (reply,) = ask(link, Fingerprint(**at(history, 401), since=401))
    assert reply.fingerprints[-1] == history.state.mark().fingerprint
    assert link.traffic.down["catch-up"][0] == 1


@pytest.mark.parametrize("pick", [lambda n: n, lambda n: n % 2], ids=["new each time", "two"])
def test_many_clients_are_served_by_whichever_process(pick):
    history = history_for(FIVE)
    link = Workers(history, pick, FIVE)
    for step in range(1, 6):
        asked = {p: [Fingerprint(**at(history, step, p), since=0)] for p in range(step % 3, 5)}
        for replies in link.exchange(asked).values():
            (reply,) = replies
            assert reply.fingerprints[-1] == history.state.mark().fingerprint
        history.commit([Entry(step, (step,), (0.5,), 1e-3)])


def test_one_data_path_for_several_clients_is_refused(tmp_path):
    own = tmp_path / "mine.csv"
    nodes = {7: {"partition-id": 0, "num-partitions": 1, "data-path": str(own)}}
    with pytest.raises(ConfigError, match=r"serves clients 0, 1, 2, 3, 4 with one data-path"):
        grid_link(nodes, history_for(FIVE), spec=FIVE)
    nodes[7]["data-path"] = str(tmp_path / "{partition}.csv")
    for p in range(5):
        rows = [f"{'spam' if i % 3 == 0 else 'ham'},message {i}" for i in range(10 + 5 * p)]
        (tmp_path / f"{p}.csv").write_text("Label,SMS\n" + "\n".join(rows))
    history = history_for(FIVE)
    link = grid_link(nodes, history, spec=FIVE)
    described = {p: ask(link, Describe(**at(history, 1, p)))[0].train_examples for p in range(5)}
    assert described == {0: 8, 1: 12, 2: 16, 3: 20, 4: 24}
