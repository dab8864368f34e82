"""link/sessions.py: calls without a token cost the server of a stream next to nothing."""

import hmac
import itertools
import random
import socket
import threading
import time

import grpc
import pytest
from strangers import Server, call, knock, noise

from hosl_flower.flower.stream.frames import METHOD, encode_word, read_word
from hosl_flower.flower.stream.server_end import TOKEN, StreamSession


@pytest.fixture
def server():
    with Server(workers=12) as own:
        yield own


def refused(server, metadata, frames=()):
    """How a call of a stranger ends."""
    with grpc.insecure_channel(server.endpoint) as channel, pytest.raises(grpc.RpcError) as error:
        list(call(channel, metadata, iter(frames)))
    return error.value.code()


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [(TOKEN, b"")],
        [(TOKEN, b"guess")],
        [(TOKEN, b"\xff" * 100)],
        [(TOKEN, b"t" * 2000)],
        [(TOKEN, b"guess"), (TOKEN, b"another")],
        [("hosl-token", "guess")],
    ],
)
def test_a_call_without_a_token_is_refused(server, metadata):
    assert refused(server, metadata) == grpc.StatusCode.UNAUTHENTICATED


def test_a_token_in_a_frame_is_none(server):
    """The server reads no frame of a call that has shown none."""
    frame = encode_word("hello", token=server.token)
    assert refused(server, [], [frame]) == grpc.StatusCode.UNAUTHENTICATED
    assert server.admits()


def test_metadata_beyond_its_limit_never_arrive(server):
    code = refused(server, [(TOKEN, b"t" * 20_000)])
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_frames_of_strangers_are_not_parsed(server, monkeypatch):
    def parsed(*_):
        raise AssertionError("a frame of a stranger was read")

    monkeypatch.setattr("hosl_flower.flower.stream.frames._open", parsed)
    lists = b"[" + b"[]," * 1_000_000 + b"[]]"
    frame = len(lists).to_bytes(4, "little") + lists
    assert refused(server, [], itertools.repeat(frame, 4)) == grpc.StatusCode.UNAUTHENTICATED


def test_two_hundred_silent_strangers_do_not_delay_a_client(server):
    """The server has twelve threads."""
    silence, channels = threading.Event(), []

    def say_nothing():
        silence.wait(30.0)
        yield b""

    for _ in range(200):
        # a channel of its own: a connection of its own
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels.append(grpc.insecure_channel(server.endpoint, options=options))
        call(channels[-1], [], say_nothing())
    try:
        started = time.monotonic()
        assert server.admits()
        assert time.monotonic() - started < 5.0
        assert server.threads() <= 13
    finally:
        silence.set()
        for channel in channels:
            channel.close()


def test_bytes_that_are_no_call_leave_the_server_as_it_was(server):
    source = random.Random(0)
    for _ in range(60):
        noise(server, source)
    assert server.admits()


def test_tokens_that_are_nearly_right_are_refused(server):
    source = random.Random(0)
    for _ in range(100):
        knock(server, source, b"\xff" * 100_000)
    assert server.admits()


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    options = [("grpc.server_handshake_timeout_ms", 300)]
    monkeypatch.setattr("hosl_flower.flower.stream.server_end._STRANGERS", options)
    with Server() as own, socket.create_connection(own.address) as quiet:
        quiet.settimeout(10.0)
        while quiet.recv(4096):  # what HTTP/2 says first, then the end
            pass


def test_a_token_is_used_up_by_one_of_many_who_show_it():
    session = StreamSession("a node")
    token, opened = session.token.encode(), []
    everybody = threading.Barrier(8)

    def show():
        everybody.wait()
        opened.append(session.open(token))

    threads = [threading.Thread(target=show) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(new is not None for new in opened) == 1


def test_tokens_are_compared_in_constant_time(server, monkeypatch):
    compared = []
    original = hmac.compare_digest

    def noted(ours, theirs):
        compared.append(ours)
        return original(ours, theirs)

    monkeypatch.setattr("hosl_flower.flower.stream.server_end.hmac.compare_digest", noted)
    others = [server.server.session(f"node {number}") for number in range(3)]
    assert server.admits()
    assert len(compared) == 1 + len(others), "all of them, whichever matched"


def test_a_client_that_has_shown_its_token_is_welcome(server):
    with grpc.insecure_channel(server.endpoint) as channel:
        stream = channel.stream_stream(METHOD)(
            iter([]), metadata=[(TOKEN, server.token.encode())], timeout=10
        )
        assert read_word(next(stream)) == {
            "word": "welcome",
            "token": server.server._sessions[0].token,
        }
        stream.cancel()
