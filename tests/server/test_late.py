"""Clients that are late (step-deadline), nodes that are lost, a SuperLink that is gone."""

import contextlib
import math
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity
from grids import LocalGrid, ThreadGrid
from specs import client_spec, history_for

from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import (
    AbsentError,
    ClientError,
    ConfigError,
    LostClientsError,
    SuperLinkError,
)
from hosl_flower.flower import client_calls
from hosl_flower.flower.message_link import EXCHANGE, GridLink
from hosl_flower.flower.nodes import Nodes
from hosl_flower.flower.stream.calls import SESSION
from hosl_flower.flower.stream.link import StreamLink
from hosl_flower.flower.superlink import SuperLink
from hosl_flower.ledger.ledger import Entry
from hosl_flower.methods.load import load_method
from hosl_flower.protocol.messages.activations import Forward
from hosl_flower.protocol.messages.describe import Describe
from hosl_flower.protocol.messages.gradients import Fetch
from hosl_flower.protocol.messages.ledger import Fingerprint
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.run.start import run_in_process
from hosl_flower.server.cohort import Cohort, Question, absent
from hosl_flower.server.kept_labels import kept
from hosl_flower.server.link import Deadline
from hosl_flower.server.losses import BatchPiece
from hosl_flower.server.participation import Participation
from hosl_flower.tasks.answer_words import AnswerWords

SPEC = client_spec(num_clients=3)
LIMITS = ReplyLimits(batch=8, length=32, hidden=64, dtype="float32", classes=2)
NODES = {7 + p: {"partition-id": p, "num-partitions": 3} for p in range(3)}


@pytest.fixture(autouse=True)
def _inside_a_flower_process(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def clients():
    """One for each node, made once: a session takes it up where the last one left it."""
    return [Client(SPEC) for _ in NODES]


@pytest.fixture(autouse=True)
def _a_client_for_each_node(monkeypatch, clients):
    for client in clients:
        client.reset()
    monkeypatch.setattr(
        client_calls, "_client", lambda spec, context: clients[context.node_config["partition-id"]]
    )


@pytest.fixture
def history():
    return history_for(SPEC)


class HeldGrid(LocalGrid):
    """AnswerWords of the nodes in `held` come when they are let out."""

    def __init__(self, nodes):
        super().__init__(nodes)
        self.held, self.kept = set(), {}

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        for i, message in zip(ids, messages, strict=True):
            late = message.metadata.message_type == EXCHANGE
            if late and message.metadata.dst_node_id in self.held:
                self.kept[i] = self.answers.pop(i)
        return ids

    def let_out(self):
        self.held = set()
        self.answers |= self.kept
        self.kept = {}


class Gate:
    """Holds partition 2's client back, in its own thread, until it is let out."""

    def __init__(self, monkeypatch):
        self.event, self.held = threading.Event(), set()
        original = Client._handle

        def handle(client, request):
            if request.partition in self.held:
                self.event.wait(20.0)
            return original(client, request)

        monkeypatch.setattr(Client, "_handle", handle)

    def let_out(self):
        self.held = set()
        self.event.set()


@contextlib.contextmanager
def held_back(kind, history, monkeypatch, spec=SPEC):
    """(link, gate, first): clients of first + the partitions in gate.held do not answer."""
    if kind == "grid":
        gate = HeldGrid(dict(NODES))
        nodes = Nodes(gate, 3, 0, 20.0)
        nodes.wait(0.1, 3)
        yield GridLink(gate, spec, history, LIMITS, 20.0, nodes), gate, 7
        return
    grid, gate = ThreadGrid(dict(NODES)), Gate(monkeypatch)
    nodes = Nodes(grid, 3, 0, 20.0)
    nodes.wait(0.1, 3)
    link = StreamLink(grid, spec, history, LIMITS, 20.0, nodes)
    try:
        yield link, gate, 0
    finally:
        gate.let_out()
        link.close()


@pytest.fixture(params=["grid", "stream"])
def slow(request, history, monkeypatch):
    with held_back(request.param, history, monkeypatch) as held:
        yield held


def session_of(history, **keys):
    """As much of a session as a question needs."""
    config = parse_config({"num-clients": 3, "step-deadline": 0.2, **keys})
    at = {"position": len(history.ledger), "digest": history.ledger.digest()}
    return SimpleNamespace(
        config=config, participation=Participation(clients=dict.fromkeys(range(3))),
        at=lambda step, partition: {"step": step, "partition": partition, **at},
    )  # fmt: skip


def ask(session, link, history, step, partitions):
    """(partitions that answered, seconds) of one question."""
    cohort, question = Cohort(session, step, partitions), Question(session, link)
    at = {"position": len(history.ledger), "digest": history.ledger.digest()}
    for p in partitions:
        question.add(Fingerprint(step=step, partition=p, **at, since=0))
    started = time.monotonic()
    replies = question.answers(cohort)
    now = history.state.mark().fingerprint
    assert all(reply.fingerprints[-1] == now for reply in replies.values())
    return list(replies), time.monotonic() - started


def test_a_step_goes_on_without_the_late_who_are_caught_up_later(slow, history):
    link, gate, first = slow
    session = session_of(history, **{"min-clients": 2})
    assert ask(session, link, history, 1, range(3))[0] == [0, 1, 2]
    gate.held = {first + 2}
    answered, seconds = ask(session, link, history, 2, range(3))
    assert answered == [0, 1]
    assert 0.2 <= seconds < 5
    ((step, partition, reason),) = session.participation.dropped
    assert (step, partition) == (2, 2)
    assert reason == "it did not answer within 0.2 s (step-deadline)"
    assert absent(session, link) == {2}, "not asked again while it is still at it"
    history.commit([Entry(2, (5,), (0.5,), 1e-3)])
    assert ask(session, link, history, 3, (0, 1))[0] == [0, 1]
    gate.let_out()  # its late answer is read by nobody
    give_up = time.monotonic() + 10
    while link.late() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert absent(session, link) == set()
    assert ask(session, link, history, 4, range(3))[0] == [0, 1, 2]


def test_with_too_few_in_time_the_next_to_answer_is_waited_for(slow, history):
    link, gate, first = slow
    session = session_of(history, **{"min-clients": 3})
    gate.held = {first + 2}
    threading.Timer(0.6, gate.let_out).start()
    answered, seconds = ask(session, link, history, 1, range(3))
    assert answered == [0, 1, 2]
    assert 0.5 <= seconds < 5
    assert session.participation.dropped == []


def test_nobody_is_waited_for_longer_than_the_reply_deadline(slow, history):
    link, gate, first = slow
    session = session_of(history, **{"min-clients": 3})
    link.deadline = 0.5
    gate.held = {first + 2}
    with pytest.raises(
        ClientError, match=r"2 client\(s\) left, min-clients = 3; client 2 \(node 9"
    ):
        ask(session, link, history, 1, range(3))


@pytest.fixture(scope="module")
def keepers():
    """As `clients`, of a run whose labels stay on them."""
    return [Client(client_spec(num_clients=3, labels="client")) for _ in NODES]


@pytest.mark.parametrize("kind", ["grid", "stream"])
@pytest.mark.parametrize("least", [2, 3])
def test_gradients_of_labels_that_are_kept_are_waited_for_as_long(
    kind, least, monkeypatch, keepers
):
    def keeper(spec, context):
        return keepers[context.node_config["partition-id"]]

    monkeypatch.setattr(client_calls, "_client", keeper)
    spec = keepers[0].spec
    history = history_for(spec)
    keys = {"labels": "client", "num-clients": 3, "min-clients": least, "step-deadline": 0.2}
    encoder = SimpleNamespace(answers=AnswerWords([[4], [8]]))
    session = SimpleNamespace(config=parse_config(keys), encoder=encoder)
    at = {"step": 1, "position": 0, "digest": history.ledger.digest(), "batch": 0}
    asked = [Forward(**at, partition=p) for p in range(3)]
    states = torch.zeros(6, 1, 64, requires_grad=True)  # of two examples of each client
    pieces = [BatchPiece(m, 0, 2) for m in range(3)]
    batches = [SimpleNamespace(activations=torch.empty(2, 4, 64))] * 3
    with held_back(kind, history, monkeypatch, spec) as (link, gate, first):
        labels = kept(session, link, asked)
        gate.held = {first + 2}
        if least == 3:  # it is indispensable
            threading.Timer(0.6, gate.let_out).start()
            losses = labels.backward(states, batches, pieces, [0.5, 0.25, 0.25])
            assert losses == pytest.approx([math.log(2)] * 3)
            return
        with pytest.raises(LostClientsError) as lost:
            labels.backward(states, batches, pieces, [0.5, 0.25, 0.25])
        ((client, reason),) = lost.value.errors.items()
        assert client == 2
        assert str(reason) == "it did not answer within 0.2 s (step-deadline)"
        assert link.late() == {2}, "it is not asked again while it is still at it"


def test_late_clients_are_waited_for_when_there_are_too_few_others():
    late = [{1, 2}, {1, 2}, {2}]
    link = SimpleNamespace(absent=lambda: set(), late=lambda: late.pop(0))
    config = parse_config({"num-clients": 3, "min-clients": 2})
    assert absent(SimpleNamespace(config=config), link) == {2}
    gone = SimpleNamespace(absent=lambda: {0, 1, 2}, late=lambda: set())
    assert absent(SimpleNamespace(config=config), gone) == {0, 1, 2}, "nobody to wait for"


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"strategy": "strategies.hosl:Hosl"}, "hosl does not use step-deadline"),
        ({"reply-deadline": 2.0}, "step-deadline = 5 has no use: it is not below reply-deadline"),
        ({}, "in process they do so one after the other"),
    ],
)
def test_a_step_deadline_that_would_do_nothing_is_refused(keys, error):
    wanted = {"strategy": "strategies.ho_sfl:HoSfl", "step-deadline": 5.0, **keys}
    with pytest.raises(ConfigError, match=error):
        run_in_process(load_method(parse_config(wanted)))


def test_durations_are_measured_with_clocks_that_do_not_jump():
    root = Path(__file__).parents[2]
    for path in [*root.glob("hosl_flower/**/*.py"), *root.glob("strategies/*.py")]:
        used = re.findall(r"time\.time(?:_ns)?\(|datetime", path.read_text())
        assert not used, f"{path.name}: {used}"


@pytest.fixture
def stream(history):
    """make(grid, indispensable) -> StreamLink, closed at the end."""
    links = []

    def make(grid, indispensable):
        nodes = Nodes(grid, 3, 0, 20.0)
        nodes.wait(0.1, 3)
        links.append(
            StreamLink(grid, SPEC, history, LIMITS, 20.0, nodes, indispensable=indispensable)
        )
        return links[-1]

    yield make
    for link in links:
        link.close()


class MortalGrid(ThreadGrid):
    """A node can be killed with its ClientApp."""

    def kill(self, link, node):
        del self.nodes[node]
        session = link._lines[node].session
        session.token = ""  # nobody dials it any more
        session.lost(session._connection)


def describe(history, link, partition=2):
    at = {"position": len(history.ledger), "digest": history.ledger.digest()}
    ((reply,),) = link.exchange({partition: [Describe(step=1, partition=partition, **at)]}).values()
    return reply


def test_a_node_that_dies_is_replaced_and_its_stream_opened_anew(history, stream):
    link = stream(MortalGrid(dict(NODES)), indispensable=False)
    before = describe(history, link)
    link.grid.kill(link, 9)
    started = time.monotonic()
    with pytest.raises(AbsentError, match=r"client 2 \(node 9\): its SuperNode is gone|not conn"):
        describe(history, link)
    assert link.absent() == {2}
    assert time.monotonic() - started < 5
    link.grid.nodes[44] = NODES[9]
    assert link.absent() == set()
    assert describe(history, link).label_counts == before.label_counts
    assert link.describe_client(2) == "client 2 (node 44)"
    assert 9 not in link._lines


def test_a_node_that_dials_again_after_it_was_let_go_of_is_not_asked(history, stream):
    link = stream(MortalGrid(dict(NODES)), indispensable=False)
    describe(history, link)
    old = link._lines[9]
    link.grid.kill(link, 9)
    link.grid.nodes[44] = NODES[9]
    while 44 not in link._lines:
        link.absent()
        time.sleep(0.05)
    assert old.session.open(old.session.invite().encode())
    at = {"position": 0, "digest": history.ledger.digest()}
    fetch = Fetch(step=1, partition=2, **at, local=1, moments=False)
    with pytest.raises(ClientError, match=r"client 2 \(node 44\).*no longer has the weights"):
        list(link.exchange({2: [fetch]})[2])


def test_a_supernode_restarted_under_its_own_id_is_called_again(history, stream):
    link = stream(MortalGrid(dict(NODES)), indispensable=False)
    before = describe(history, link)
    config = link.grid.nodes[9]
    link.grid.kill(link, 9)
    link.grid.nodes[9] = config  # a registered SuperNode keeps its id
    link.grid.activated = "later"
    assert describe(history, link).label_counts == before.label_counts
    assert sum(m.metadata.message_type == SESSION for m in link.grid.sent) == 4


class RestartedGrid(ThreadGrid):
    """Node 9 is restarted when it has taken the message that opens its session."""

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        opens = messages[0].metadata.message_type == SESSION
        if opens and self.nodes[9] is None:
            self.nodes[9], self.activated = NODES[9], "later"
        return ids


def test_a_supernode_restarted_before_it_first_came_is_called_again(history):
    grid = RestartedGrid({9: NODES[9]})
    nodes = Nodes(grid, 3, 0, 20.0)
    nodes.wait(0.1, 1)
    grid.nodes[9] = None
    link = StreamLink(grid, SPEC, history, LIMITS, 20.0, nodes)
    try:
        assert sum(m.metadata.message_type == SESSION for m in grid.sent) == 2
        assert describe(history, link).held_out_examples == 20
    finally:
        link.close()


def test_another_node_is_waited_for_where_no_client_can_be_missed(history, stream):
    link = stream(MortalGrid(dict(NODES)), indispensable=True)
    before = describe(history, link)
    streams = link.exchange({2: []})
    assert streams == {}
    threading.Timer(0.5, lambda: link.grid.nodes.update({44: NODES[9]})).start()
    original = link._await

    def dies(line, *rest):
        link._await = original
        link.grid.kill(link, 9)
        return original(line, *rest)

    link._await = dies
    assert describe(history, link).label_counts == before.label_counts
    assert link.describe_client(2) == "client 2 (node 44)"


def test_a_node_that_failed_gives_way_to_another_of_its_number(history, caplog):
    """Before Flower has noticed that it is gone."""
    grid = LocalGrid(dict(NODES))
    nodes = Nodes(grid, 3, 0, 20.0)
    nodes.wait(0.1, 3)
    link = GridLink(grid, SPEC, history, LIMITS, 20.0, nodes)
    grid.nodes[9] = {**NODES[9], "crash": True}
    with pytest.raises(ClientError, match="out of memory"):
        describe(history, link)
    grid.nodes[44] = NODES[9]
    assert describe(history, link).train_examples > 0
    assert link.describe_client(2) == "client 2 (node 44)"
    assert "SuperNode 44 takes the place of 9, partition 2" in caplog.text
    asked = len(grid.sent)
    link.absent()
    assert len(grid.sent) == asked, "nobody is in doubt any more"


class Gone:
    """A Grid whose SuperLink is gone: calls never return."""

    def __init__(self, there=False):
        self.there = there

    def get_node_ids(self):
        return [7] if self.there else time.sleep(30)

    def push_messages(self, messages):
        time.sleep(0.5 if self.there else 30)
        return [None]

    pull_messages = push_messages


def test_a_superlink_that_is_gone_is_an_error_soon():
    superlink = SuperLink(Gone(), 600.0, check=0.1)
    for call in (superlink.get_node_ids, lambda: superlink.pull_messages(["m"])):
        started = time.monotonic()
        with pytest.raises(SuperLinkError, match=r"SuperLink is gone.*with resume"):
            call()
        assert time.monotonic() - started < 2


def test_a_slow_call_is_waited_for_while_superlink_answers_others():
    assert SuperLink(Gone(there=True), 600.0, check=0.1).push_messages([]) == [""]
    with pytest.raises(SuperLinkError, match=r"not answered for 0\.2 s"):
        SuperLink(Gone(there=True), 0.2, check=0.1).push_messages([])


def test_what_a_call_raises_is_raised():
    class Refuses(Gone):
        def get_node_ids(self):
            raise KeyError("node")

    with pytest.raises(KeyError):
        SuperLink(Refuses(), 1.0).get_node_ids()


def test_a_message_is_sent_again_when_its_process_dies_but_not_for_nobody(history):
    grid = HeldGrid(dict(NODES))
    nodes = Nodes(grid, 3, 0, 20.0)
    nodes.wait(0.1, 3)
    link = GridLink(grid, SPEC, history, LIMITS, 20.0, nodes)
    grid.held = {9}
    digest = history.ledger.digest()
    describe = Describe(step=1, partition=2, position=0, digest=digest)
    streams = link.exchange({2: [describe]}, until=Deadline(time.monotonic()))
    assert next(streams[2]) is None
    streams[2].close()
    assert link.late() == {2}
    (kept,) = grid.kept
    original = next(m for m in grid.sent if m.metadata.message_id == kept)
    grid.answers[kept] = Message(Error(code=2, reason="killed"), reply_to=original)
    sent = len(grid.sent)
    assert link.late() == set()
    assert len(grid.sent) == sent
