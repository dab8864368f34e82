"""flower/stream/link.py, flower/stream/server_end.py, flower/stream/client_end.py,
flower/stream/frames.py: the same replies over a stream, also over one that breaks; strangers stay
out; nothing is left behind."""

import datetime
import json
import threading
import time

import grpc
import pytest
import torch
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity
from grids import ThreadGrid
from runs import metrics, run_factory
from specs import client_spec, history_for

from hosl_flower.client.client import Client
from hosl_flower.errors import AbsentError, ClientError, ConfigError, ProtocolError, RefusedError
from hosl_flower.flower import client_calls
from hosl_flower.flower.nodes import Nodes
from hosl_flower.flower.processes import free_port
from hosl_flower.flower.stream import client_end as dialling
from hosl_flower.flower.stream.calls import SESSION
from hosl_flower.flower.stream.frames import (
    METHOD,
    Key,
    decode_frame,
    encode_frame,
    encode_word,
    read_word,
)
from hosl_flower.flower.stream.link import StreamLink, longest_frame
from hosl_flower.flower.stream.server_end import TOKEN
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.ledger.ledger import Entry
from hosl_flower.protocol.messages.activations import Activations, Forward, Probe
from hosl_flower.protocol.messages.describe import Describe
from hosl_flower.protocol.messages.gradients import Fetch, Gradient, LocalStep
from hosl_flower.protocol.messages.ledger import Fingerprint
from hosl_flower.protocol.messages.registry import REPLIES, REQUESTS
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.protocol.wire import LONGEST_REPLY
from hosl_flower.server.history import History
from hosl_flower.server.in_process import InProcessLink
from hosl_flower.tensors.activation_codec import encode_activations
from hosl_flower.tensors.raw_bytes import DTYPES
from hosl_flower.tensors.update_codec import encode_update
from strategies.ho_sfl import HoSfl

SPEC = client_spec(num_clients=5)
LIMITS = ReplyLimits(batch=8, length=32, hidden=64, dtype="float32", classes=2)
TWO = {"num-partitions": 2}
NODES = {7: {"partition-id": 0, **TWO}, 8: {"partition-id": 1, **TWO}}


@pytest.fixture(autouse=True)
def _inside_a_flower_process(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(autouse=True)
def _a_client_for_each_thread(monkeypatch):
    """ClientApps are processes; here they are threads, which must not share a Client."""
    local = threading.local()

    def client(spec, context):
        own = getattr(local, "client", None)
        if own is None or own.spec != spec:
            local.client = Client(spec)
        return local.client

    monkeypatch.setattr(client_calls, "_client", client)


@pytest.fixture
def history():
    return history_for(SPEC)


@pytest.fixture
def make(history):
    """Factory of stream links, closed at the end."""
    links = []

    def stream(nodes=NODES, deadline=20.0, grid=None, **more):
        grid = grid or ThreadGrid(dict(nodes))
        found = Nodes(grid, SPEC.num_clients, 0, deadline)
        found.wait(0.1, 1)
        links.append(StreamLink(grid, SPEC, history, LIMITS, deadline, found, **more))
        return links[-1]

    yield stream
    for link in links:
        link.close()
        for thread in link.grid.threads:
            thread.join(20.0)
            assert not thread.is_alive(), "a session outlived its link"


def at(history, step=1, partition=0):
    where = {"position": len(history.ledger), "digest": history.ledger.digest()}
    return {"step": step, "partition": partition, **where}


def work(history, partitions=range(5), step=1):
    return {
        p: [
            Describe(**at(history, step, p)),
            Forward(**at(history, step, p), batch=0),
            Probe(**at(history, step, p), batch=0, seed=5, coefficient=1e-3),
        ]
        for p in partitions
    }


def check_same(history, link, partitions=range(5)):
    """The stream's replies are those of a plain function call."""
    plain = InProcessLink(Client(SPEC).answer, history, LIMITS)
    expected = plain.exchange(work(history, partitions))
    for partition, replies in link.exchange(work(history, partitions)).items():
        (described, *mine), (same, *theirs) = list(replies), list(expected[partition])
        assert described.label_counts == same.label_counts
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.activations, other.activations)
    return plain


def test_the_replies_are_those_of_the_in_process_link(history, make):
    link = make()
    plain = check_same(history, link)
    assert link.traffic.down == plain.traffic.down
    assert sum(m.metadata.message_type == SESSION for m in link.grid.sent) == 2, "one per node"
    history.commit([Entry(1, (5,), (0.5,), 1e-3)])
    for partition, replies in link.exchange(
        {p: [Fingerprint(**at(history, 2, p), since=0)] for p in range(5)}
    ).items():
        assert next(replies).fingerprints[-1] == history.state.mark().fingerprint, partition
    assert sum(m.metadata.message_type == SESSION for m in link.grid.sent) == 2


def test_replies_may_be_read_in_any_order_and_not_at_all(history, make):
    link = make()
    streams = link.exchange(work(history))
    for partition in (4, 1, 3):
        assert len(list(streams[partition])) == 3
    next(streams[0])
    del streams  # 2 was never looked at, 0 not to the end
    check_same(history, link)


def test_a_failing_client_does_not_stop_the_others(history, make):
    link = make()
    requests = work(history, (0, 2, 4))
    requests[2].insert(1, Probe(**at(history, 1, 2), batch=0, seed=1, coefficient=1e30))
    streams = link.exchange(requests)
    assert len(list(streams[0])) == 3
    with pytest.raises(ProtocolError, match=r"client 2 \(node 7\).*not finite"):
        list(streams[2])
    assert len(list(streams[4])) == 3
    check_same(history, link)


def cut_connections(link):
    for line in link._lines.values():
        line.session.lost(line.session._connection)


def test_a_connection_that_breaks_goes_on_at_the_same_request(history, make):
    link = make()
    plain = InProcessLink(Client(SPEC).answer, history, LIMITS)
    expected = plain.exchange(work(history))
    streams = link.exchange(work(history))
    for partition, replies in streams.items():
        next(expected[partition])
        next(replies)
        cut_connections(link)
        mine, theirs = list(replies), list(expected[partition])
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.activations, other.activations)
    assert sum(m.metadata.message_type == SESSION for m in link.grid.sent) == 2, "only redialled"


class DyingGrid(ThreadGrid):
    """The ClientApp of node 8 dies after its third reply, once; Flower reports it."""

    def __init__(self, nodes):
        super().__init__(nodes)
        self.died = False

    def run(self, message, config):
        if message.metadata.dst_node_id != 8 or self.died:
            super().run(message, config)
            return
        self.died = True
        spec, invitation = client_calls.unpack_invitation(message.content)
        client, count = Client(spec), 0

        def answer(requests):
            nonlocal count
            count += 1
            if count > 3:
                raise SystemExit
            return client.answer(requests)

        try:
            client_calls.serve(invitation, answer)
        except SystemExit:
            self.answers[message.metadata.message_id] = Message(
                Error(code=2, reason="killed"), reply_to=message
            )


def test_a_client_whose_process_died_is_called_again(history, make):
    history.commit([Entry(1, (5,), (0.5,), 1e-3)])
    link = make(grid=DyingGrid(dict(NODES)))
    check_same(history, link)
    assert link.grid.died
    assert sum(m.metadata.message_type == SESSION for m in link.grid.sent) == 3


def test_a_client_that_stalls_is_absent_after_the_deadline(history, make, monkeypatch):
    link = make(deadline=30.0)
    original, stall = Client._handle, threading.Event()

    def stalls(self, request):
        if request.partition == 1:
            stall.wait(20.0)
        return original(self, request)

    monkeypatch.setattr(Client, "_handle", stalls)
    list(link.exchange(work(history, (0,)))[0])  # it has loaded its data
    link.deadline = link.nodes.deadline = 1.0
    streams = link.exchange(work(history, (0, 1)))
    assert len(list(streams[0])) == 3
    started = time.monotonic()
    with pytest.raises(AbsentError, match=r"client 1 \(node 8\) did not answer within 1 s"):
        list(streams[1])
    assert time.monotonic() - started < 5
    stall.set()
    monkeypatch.setattr(Client, "_handle", original)
    link.deadline = 30.0
    check_same(history, link)  # what it still had to say about the old exchange is not mixed up


def test_a_description_may_take_longer_than_a_reply(history, make, monkeypatch):
    """The client loads its data for it."""
    link = make(deadline=30.0)
    original = Client._handle

    def loads(self, request):
        if isinstance(request, Describe):
            time.sleep(1.5)
        return original(self, request)

    monkeypatch.setattr(Client, "_handle", loads)
    link.deadline = 1.0
    (described,) = link.exchange({0: [Describe(**at(history, 1, 0))]})[0]
    assert described.kind == "described"


def framed(envelope):
    text = envelope.encode()
    return len(text).to_bytes(4, "little") + text


def overflowing(*sizes):
    """A reply with an empty tensor of these sizes: their product overflows, or is huge."""
    header = json.dumps(json.dumps({"kind": "graded", "step": 1, "seconds": 0.0, "peak_bytes": 0}))
    tensors = json.dumps([["scores", "float32", sizes]])
    return framed(f'{{"key": [1, 0, 0], "header": {header}, "tensors": {tensors}}}')


HOSTILE = {
    "zero first": overflowing(0, 2**39, 2**39),
    "zero last": overflowing(2**39, 2**39, 0),
    "zero and 64 bits": overflowing(0, 2**62, 2),
    "64 bits": overflowing(2**62),
    "a huge product": overflowing(2**39, 2**39, 2**39, 2**39),
    "many zeros": overflowing(*[0] * 5),
    "a deep key": framed(f'{{"key": {"[" * 980}{"]" * 980}, "header": "", "tensors": []}}'),
    "a deep name": framed(
        f'{{"key": [1, 0, 0], "header": "", "tensors": [[{"[" * 950}{"]" * 950}, 1, []]]}}'
    ),
    "a deep header": framed(f'{{"key": [1, 0, 0], "tensors": [], "header": "{"[" * 100_000}"}}'),
    "a long header": framed(f'{{"key": [1, 0, 0], "tensors": [], "header": "{"x" * (1 << 20)}"}}'),
}


@pytest.mark.parametrize("frame", HOSTILE.values(), ids=HOSTILE)
def test_hostile_frames_are_one_short_protocol_error(frame):
    with pytest.raises(ProtocolError) as refused:
        decode_frame(frame, REPLIES, LONGEST_REPLY)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "frame",
    [b"garbage", HOSTILE["zero first"], HOSTILE["a deep name"]],
    ids=["no frame", "0", "[["],
)
def test_a_client_that_sends_garbage_is_told_apart_at_once(history, make, monkeypatch, frame):
    link = make({7: {"partition-id": 0, "num-partitions": 1}})
    original = dialling.encode_frame

    def garbage(key, message):
        return frame if key.partition == 0 else original(key, message)

    monkeypatch.setattr(dialling, "encode_frame", garbage)
    streams = link.exchange(work(history, (0, 1)))
    started = time.monotonic()
    with pytest.raises(ProtocolError, match=r"client 0 \(node 7\): "):
        list(streams[0])
    assert time.monotonic() - started < 15  # of a deadline of 20
    assert len(list(streams[1])) == 3, "it goes on over a new connection"


def test_a_client_that_cannot_start_says_why(make, monkeypatch):
    def refuses(spec, context):
        raise RefusedError("no such model here")

    monkeypatch.setattr(client_calls, "_client", refuses)
    with pytest.raises(ClientError, match=r"no SuperNode came.*no such model here"):
        make()


def test_nodes_that_never_dial_are_asked_about_the_endpoint(history):
    grid = ThreadGrid(dict(NODES))
    nodes = Nodes(grid, SPEC.num_clients, 0, 20.0)
    nodes.wait(0.1, 1)
    grid.nodes, nodes.deadline = dict.fromkeys(NODES), 0.2  # as behind a firewall
    why = r"2 were called and none has dialled 127\.0\.0\.1:\d+ within 0\.2 s.*stream-endpoint"
    with pytest.raises(ClientError, match=f"no SuperNode came to its session; {why}"):
        StreamLink(grid, SPEC, history, LIMITS, 0.2, nodes)


def test_the_window_keeps_a_fast_client_from_running_ahead(history, make):
    link = make({7: {"partition-id": 0, "num-partitions": 1}})
    many = [Forward(**at(history), batch=number % 3) for number in range(20)]
    replies = link.exchange({0: many})[0]
    next(replies)
    time.sleep(1.0)
    (line,) = link._lines.values()
    assert len(line.session._replies) <= 5
    assert len(list(replies)) == 19


@pytest.fixture(scope="module")
def authority():
    """A certificate for localhost, signed by itself: (key, certificate), PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    own = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return own, certificate.public_bytes(pem)


def test_a_stream_with_tls(history, make, authority):
    port = free_port()
    tls = {
        "endpoint": f"localhost:{port}", "bind": f"127.0.0.1:{port}", "certificate": authority,
    }  # fmt: skip
    link = make(authority=authority[1].decode(), **tls)
    check_same(history, link)
    with pytest.raises(grpc.RpcError) as refused:
        dial(link, b"guess")
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE, "without TLS there is no talking"


def dial(link, token):
    """What a stranger gets that shows this token."""
    with grpc.insecure_channel(link.endpoint) as channel:
        return list(channel.stream_stream(METHOD)(iter([]), metadata=[(TOKEN, token)], timeout=10))


def test_a_token_is_good_once_and_never_after_the_end(history, make):
    link = make({7: {"partition-id": 0, "num-partitions": 1}})
    (message,) = [m for m in link.grid.sent if m.metadata.message_type == SESSION]
    _, invitation = client_calls.unpack_invitation(message.content)
    token = invitation.token.encode()
    with pytest.raises(grpc.RpcError) as refused:
        dial(link, token)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    check_same(history, link)
    link.close()
    with pytest.raises(grpc.RpcError) as gone:
        dial(link, token)
    assert gone.value.code() == grpc.StatusCode.UNAVAILABLE, "the port is closed"


def test_frames_carry_messages_unchanged():
    forward = Forward(step=1, partition=2, position=0, digest="0" * 16, batch=3)
    key, back = decode_frame(encode_frame(Key(4, 2, 1), forward), REQUESTS)
    assert (key, back) == (Key(4, 2, 1), forward)
    assert read_word(encode_frame(Key(4, 2, 1), forward)) is None
    assert read_word(encode_word("close", a=1)) == {"word": "close", "a": 1}


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "exact"), ("bfloat16", "fp16")])
def test_the_longest_activations_fit_a_frame(history, dtype, codec):
    """1024 sequences of 384 tokens with answers of 256: labels are 2 MiB, scales 1.5 MiB, and
    what a frame may have beside its tensors is 1 MiB."""
    rows, tokens, answer, width = 1024, 384, 256, 64
    limits = ReplyLimits(
        rows, tokens, width, dtype, 1, codec=codec, longest=answer, vocabulary=50272
    )
    payload, scales = encode_activations(
        torch.zeros(rows, tokens, width, dtype=DTYPES[dtype]), codec
    )
    reply = Activations(
        step=1,
        seconds=0.0,
        peak_bytes=0,
        activations=payload,
        scales=scales,
        attention_mask=torch.ones(rows, tokens, dtype=torch.bool),
        labels=torch.zeros(rows, answer, dtype=torch.int64),
    )
    reply.check(None, limits, None)
    assert len(encode_frame(Key(1, 0, 0), reply)) <= longest_frame(limits, history)


def test_messages_that_no_stream_can_carry_are_refused_before_it_listens(history):
    grid = ThreadGrid(dict(NODES))
    nodes = Nodes(grid, SPEC.num_clients, 0, 20.0)
    nodes.wait(0.1, 1)
    wide = ReplyLimits(batch=8, length=1 << 16, hidden=1 << 12, dtype="float32", classes=2)
    with pytest.raises(ConfigError, match=r"may take \d+ bytes, .* at most 2147483647: set link"):
        StreamLink(grid, SPEC, history, wide, 20.0, nodes)


def test_processes_that_serve_several_clients_follow_by_changes_of_weights(history, make):
    """Partitions 0, 2 and 4 are one process's, 1 and 3 the other's; none is asked in every step."""
    link = make()

    def ask(step, partitions):
        requests = {p: [Fingerprint(**at(history, step, p), since=0)] for p in partitions}
        for partition, replies in link.exchange(requests).items():
            (reply,) = replies
            history.check(reply, f"client {partition}")

    source = torch.Generator().manual_seed(3)
    for step, partitions in ((1, (0, 1)), (2, (2, 1)), (3, (0, 3)), (4, (4, 1, 2))):
        change = torch.randn(history.state.elements, generator=source) * 1e-3
        history.shift(step, change)
        ask(step, partitions)
    kinds = {kind: messages for kind, (messages, _) in link.traffic.down.items()}
    assert kinds == {"move": 8, "restore": 1, "fingerprint": 9}  # 4, first asked, lacks too many


@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_the_longest_gradient_fits_a_frame(codec):
    """Of two million rows, that is, two million words on which are there."""
    weights = torch.nn.Parameter(torch.ones(2_000_000, 1))
    state = ClientState({"w": weights}, "rank1", "sgd", "g")
    coded = encode_update(state.rows, [("w", weights.detach())], codec, seed=1)
    reply = Gradient(step=1, seconds=0.0, peak_bytes=0, **vars(coded))
    limits = ReplyLimits(1, 8, 8, "float32", 1)
    assert len(encode_frame(Key(1, 0, 0), reply)) <= longest_frame(limits, History(state, "g"))


def broken_frames():
    good = encode_frame(
        Key(0, 0, 0), Forward(step=1, partition=2, position=0, digest="0" * 16, batch=3)
    )
    yield b""
    yield good[:10]
    yield good + b"x"
    yield b"\xff\xff\xff\xff" + good[4:]
    yield good.replace(b'"key": [0', b'"key": [-1')
    yield good.replace(b'"key"', b'"kez"')
    yield good.replace(b'"tensors": []', b'"tensors": [["x", "float32", [9]]]')
    yield good.replace(b'"tensors": []', b'"tensors": [["x", "object", [1]]]')
    yield good.replace(b'"tensors": []', b'"tensors": [[1]]')


@pytest.mark.parametrize("index", range(9))
def test_broken_frames_are_one_protocol_error(index):
    frame = list(broken_frames())[index]
    if index in (5, 6, 7, 8):  # keep the length right
        body = frame[4:]
        frame = len(body).to_bytes(4, "little") + body
    with pytest.raises(ProtocolError):
        decode_frame(frame, {**REQUESTS, **REPLIES})


def test_a_client_with_weights_of_its_own_stays_with_its_worker(history, make, monkeypatch):
    # simulated workers serve any client, but after a local step only one has its weights
    monkeypatch.setattr(Nodes, "simulated", True)
    link = make()
    link._wait_for_any()
    cut = {"gradient": torch.zeros(0), "scales": torch.empty(0), "scale": 1.0}
    for partition in range(4):
        (clean,) = link.exchange({partition: [Forward(**at(history, 1, partition), batch=0)]})[
            partition
        ]
        cut["gradient"] = torch.ones_like(clean.activations)
        step = LocalStep(**at(history, 1, partition), batch=0, learning_rate=1e-3, **cut)
        (stepped,) = link.exchange({partition: [step]})[partition]
        assert stepped.local == 1
        link._lines = dict(reversed(link._lines.items()))  # as if a worker had come or gone
        fetch = Fetch(**at(history, 1, partition), local=1, moments=False)
        (weights,) = link.exchange({partition: [fetch]})[partition]
        assert not torch.equal(weights.weights, history.state.weights())


def test_a_session_that_has_lasted_long_enough_is_opened_anew(history, make):
    link = make(longest=0.5)
    streams = link.exchange(work(history))
    next(streams[0])
    time.sleep(0.6)
    for partition, replies in link.exchange(work(history, (1,))).items():
        assert len(list(replies)) == 3, partition  # node 8 was idle, node 7 is in the middle
    calls = [m.metadata.dst_node_id for m in link.grid.sent if m.metadata.message_type == SESSION]
    assert calls == [7, 8], "nothing is closed in the middle of an exchange"
    for partition in range(5):
        list(streams[partition])
    time.sleep(0.6)
    check_same(history, link)
    calls = [m.metadata.dst_node_id for m in link.grid.sent if m.metadata.message_type == SESSION]
    assert calls == [7, 8, 7, 8]
    assert sum(thread.is_alive() for thread in link.grid.threads) == 2, "the old ones returned"


class OverStream(HoSfl):
    """Runs on Flower, as far as a grid of threads is that."""

    def run_in_process(self):
        self.start(ThreadGrid(dict(NODES)))


def test_a_run_whose_labels_stay_on_the_clients_is_the_in_process_one(tiny_opt, tmp_path):
    make = run_factory(
        HoSfl, tiny_opt, tmp_path, **{"client-trainable": "blocks", "save-model": False}
    )
    keys = {"labels": "client", "num_clients": 3, "clients_per_step": 2, "aggregation": "mean"}
    _, plain, _ = make(**keys)
    endpoint = f"127.0.0.1:{free_port()}"
    _, streamed, _ = make(OverStream, link="stream", stream_endpoint=endpoint, **keys)
    assert metrics(streamed) == metrics(plain)
    ledgers = [(run / "ledger.jsonl").read_text() for run in (plain, streamed)]
    assert ledgers[0] == ledgers[1]


def test_no_port_is_given_twice_nor_one_the_system_may_give():
    ports = [free_port() for _ in range(300)]
    assert len(set(ports)) == 300
    assert max(ports) < 32768
