"""Whoever connects to a stream's server without a token: in calls, and in bytes that are none."""

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType

import grpc

from hosl_flower.link.frames import read_word
from hosl_flower.link.sessions import METHOD, TOKEN, StreamServer

LIMIT = 16 << 20  # bytes of the longest frame
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


class Server:
    """A StreamServer on this machine with one session."""

    def __init__(self, workers: int = 4):
        self.server = StreamServer("127.0.0.1:0", LIMIT, workers)
        self.session = self.server.session("a node")
        self.address = "127.0.0.1", self.server.port
        self.endpoint = f"127.0.0.1:{self.server.port}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.server.stop()

    def admits(self) -> bool:
        """Whether a call that shows the token is still taken."""
        with grpc.insecure_channel(self.endpoint) as channel:
            stream = call(channel, [(TOKEN, self.session.token.encode())], iter([]))
            word = read_word(next(stream)) or {}
            stream.cancel()
        return word.get("word") == "welcome"

    def threads(self) -> int:
        """Of those that answer calls, how many there are."""
        pool = {thread.name for thread in self.server._pool._threads}
        return sum(thread.name in pool for thread in threading.enumerate())


def call(
    channel: grpc.Channel, metadata: Sequence[tuple[str, bytes | str]], frames: Iterator[bytes]
) -> grpc.Call:
    """A call to the stream's method."""
    return channel.stream_stream(METHOD)(frames, metadata=metadata, timeout=30)


def noise(server: Server, source: random.Random) -> None:
    """A connection that says bytes which are no call: any, or frames of HTTP/2 with any content."""
    said = source.choice((b"", PREFACE, PREFACE + SETTINGS))
    for _ in range(source.choice((0, 1, 1, 3, 20))):
        size = source.choice((0, 1, 9, 100, 16384))
        kind, flags = source.randrange(12), source.randrange(256)
        stream, claimed = source.choice((0, 1, 3, 2**31 - 1)), source.choice((size, 2**24 - 1))
        head = struct.pack(">I", claimed)[1:] + bytes([kind, flags]) + struct.pack(">I", stream)
        said += source.choice((b"", head)) + source.randbytes(size)
    with contextlib.suppress(OSError), socket.create_connection(server.address, 10) as connection:
        connection.settimeout(0.2)
        connection.sendall(said)
        if source.random() < 0.5:
            connection.recv(4096)
