"""Whoever connects to a stream's server without a token: in calls, and in bytes that are none."""

import contextlib
import itertools
import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType

import grpc

from hosl_flower.flower.stream.frames import METHOD, read_word
from hosl_flower.flower.stream.server_end import TOKEN, StreamServer

LIMIT = 16 << 20  # bytes of the longest frame
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


class Door:
    """The server of a stream, as it looks from outside. token: of its one session."""

    def __init__(self, port: int, token: str):
        self.address, self.endpoint, self.token = ("127.0.0.1", port), f"127.0.0.1:{port}", token

    def admits(self) -> bool:
        """Whether a call that shows the token is still taken."""
        with grpc.insecure_channel(self.endpoint) as channel:
            stream = call(channel, [(TOKEN, self.token.encode())], iter([]))
            word = read_word(next(stream)) or {}
            stream.cancel()
        self.token = word.get("token", "")
        return word.get("word") == "welcome"


class Server(Door):
    """A StreamServer in this process."""

    def __init__(self, workers: int = 4):
        self.server = StreamServer("127.0.0.1:0", LIMIT, workers)
        super().__init__(self.server.port, self.server.session("a node").token)

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.server.stop()

    def threads(self) -> int:
        """Of those that answer calls, how many there are."""
        pool = {thread.name for thread in self.server._pool._threads}
        return sum(thread.name in pool for thread in threading.enumerate())


def serve(pipe: Connection) -> None:
    """The work of a process that has a server: says (port, token), ends when told anything."""
    with Server() as own:
        pipe.send((own.address[1], own.token))
        pipe.recv()


def call(
    channel: grpc.Channel, metadata: Sequence[tuple[str, bytes | str]], frames: Iterator[bytes]
) -> grpc.Call:
    """A call to the stream's method."""
    return channel.stream_stream(METHOD)(frames, metadata=metadata, timeout=30)


def damaged(token: bytes, source: random.Random) -> list[tuple[str, bytes | str]]:
    """Metadata that show a token which is not quite the right one, or none."""
    at = source.randrange(len(token))
    shown = source.choice(
        [
            b"", token[:at], token + b"\0", token.swapcase(), source.randbytes(43),
            token[:at] + bytes([token[at] ^ 1]) + token[at + 1 :], b"\xff" * source.randrange(9000),
        ]
    )  # fmt: skip
    key = source.choice((TOKEN, TOKEN, TOKEN, "hosl-tokens-bin", "authorization-bin"))
    return [(key, shown)] * source.choice((0, 1, 1, 2, 50))


def knock(door: Door, source: random.Random, frame: bytes) -> None:
    """A call without the right token, which sends a frame or nothing; it must be refused."""
    metadata = damaged(door.token.encode(), source)
    frames = itertools.repeat(frame, source.choice((0, 1, 3)))
    with grpc.insecure_channel(door.endpoint) as channel:
        try:
            list(call(channel, metadata, frames))
        except grpc.RpcError as error:
            refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED)
            if error.code() not in refused:
                raise AssertionError(f"{metadata!r:.300}: {error.code()}") from error
        else:
            raise AssertionError(f"{metadata!r:.300} was let in")


def noise(door: Door, source: random.Random) -> None:
    """A connection that says bytes which are no call: any, or frames of HTTP/2 with any content."""
    said = source.choice((b"", PREFACE, PREFACE + SETTINGS))
    for _ in range(source.choice((0, 1, 1, 3, 20))):
        size = source.choice((0, 1, 9, 100, 16384))
        kind, flags = source.randrange(12), source.randrange(256)
        stream, claimed = source.choice((0, 1, 3, 2**31 - 1)), source.choice((size, 2**24 - 1))
        head = struct.pack(">I", claimed)[1:] + bytes([kind, flags]) + struct.pack(">I", stream)
        said += source.choice((b"", head)) + source.randbytes(size)
    with contextlib.suppress(OSError), socket.create_connection(door.address, 10) as connection:
        connection.settimeout(0.2)
        connection.sendall(said)
        if source.random() < 0.5:
            connection.recv(4096)
