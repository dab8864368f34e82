"""The server's end of streams: one long conversation per SuperNode, over connections that may
break and come back.

A client process dials with a token it got in a Flower message, which SuperLink has
authenticated. The token is in the metadata of the call and is checked before anything else of the
call is read; it is good for one connection, and every welcome carries the next one. What
was asked and is not answered is asked again on a new connection, under the same key, so a broken
connection repeats work but loses and doubles none.
"""

import hmac
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from concurrent import futures

# Read when gRPC is loaded. Below errors it logs text that strangers choose, as they sent it.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc

from hosl_flower.errors import ConfigError, ProtocolError
from hosl_flower.flower.stream.frames import (
    METHOD,
    Key,
    channel_options,
    decode_frame,
    encode_frame,
    encode_word,
)
from hosl_flower.protocol.messages.base import Behind, Failure, Reply, Request
from hosl_flower.protocol.messages.registry import REPLIES
from hosl_flower.protocol.wire import LONGEST_REPLY

TOKEN = "hosl-token-bin"  # the key of the token in a call's metadata; its value is bytes
_WINDOW = 4  # replies that may wait unread before the client is held back


_METADATA_BYTES = 4096  # that a call may send before it is known; a token is 43 of them
_STRANGERS = [  # what a connection may cost before one of its calls has shown a token
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10_000),  # a client's connection always has its call
]


class StreamSession:
    """A conversation with one client process. node: for messages to people."""

    def __init__(self, node: str):
        self.node = node
        self.token = secrets.token_urlsafe(32)
        self._changed = threading.Condition()
        self._unanswered: OrderedDict[Key, bytes] = OrderedDict()
        self._unsent: deque[Key] = deque()
        self._replies: dict[Key, Reply] = {}
        self._abandoned: set[Key] = set()  # sent, withdrawn since, and the client is still at it
        self._waiting_for: Key | None = None
        self._connection = 0  # number of the connection that is up; 0 is none
        self._connections = 0
        self._closing = False
        self.lost_at: float | None = None  # since when there is no connection
        self.ever_connected = threading.Event()
        self._first_connected = 0.0
        self.fault = ""  # what the client has sent that it should not

    @property
    def connected(self) -> bool:
        return self._connection > 0

    @property
    def age(self) -> float:
        """Seconds since a client first came."""
        return time.monotonic() - self._first_connected if self.ever_connected.is_set() else 0.0

    @property
    def idle(self) -> bool:
        """Whether everything asked has been answered, and every answer that is wanted taken."""
        with self._changed:
            return not (self._unanswered or self._replies or self._abandoned)

    def ask(self, requests: Mapping[Key, Request]) -> None:
        """Send requests, in order, as soon as the client can take them."""
        with self._changed:
            for key, request in requests.items():
                self._unanswered[key] = encode_frame(key, request)
                self._unsent.append(key)
            self._changed.notify_all()

    def reply(self, key: Key, seconds: float) -> Reply | None:
        """The reply to a request, waited for; None when it has not come in time."""
        give_up = time.monotonic() + seconds
        with self._changed:
            self._waiting_for = key
            self._changed.notify_all()
            while key not in self._replies:
                left = give_up - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            self._waiting_for = None
            reply = self._replies.pop(key, None)
            self._changed.notify_all()
        return reply

    def late(self, partition: int) -> bool:
        """Whether the client still works on something of this partition that was withdrawn."""
        with self._changed:
            return any(key.partition == partition for key in self._abandoned)

    def withdraw(self, exchange: int, partition: int) -> None:
        """Forget what is still open of one client's part of an exchange."""
        with self._changed:
            self._withdraw(exchange, partition)

    def invite(self) -> str:
        """A token for a new process to take this conversation up with."""
        with self._changed:
            self.token = secrets.token_urlsafe(32)
            return self.token

    def close(self) -> None:
        """Tell the client that the conversation is over."""
        with self._changed:
            self._closing, self.token = True, ""
            self._changed.notify_all()

    def _withdraw(self, exchange: int, partition: int) -> None:
        unsent = set(self._unsent)
        for key in [k for k in self._unanswered if k[:2] == (exchange, partition)]:
            del self._unanswered[key]
            if self._connection and key not in unsent:
                self._abandoned.add(key)
        for key in [k for k in self._replies if k[:2] == (exchange, partition)]:
            del self._replies[key]

    def open(self, shown: bytes) -> tuple[int, str] | None:
        """A new connection, which replaces any other: its number and the next token. None unless
        `shown` is the session's token, which is used up by that."""
        with self._changed:
            # compared in constant time; a closed session's token is empty and good for nobody
            if not hmac.compare_digest(self.token.encode(), shown) or not self.token:
                return None
            self._connections += 1
            self._connection, self.lost_at = self._connections, None
            self._unsent = deque(self._unanswered)
            self._abandoned.clear()  # who dials has nothing else to do
            self.token = secrets.token_urlsafe(32)
            self._changed.notify_all()
            if not self.ever_connected.is_set():
                self._first_connected = time.monotonic()
            self.ever_connected.set()
            return self._connection, self.token

    def lost(self, connection: int) -> None:
        """A connection has ended."""
        with self._changed:
            if connection == self._connection:
                self._connection, self.lost_at = 0, time.monotonic()
            self._changed.notify_all()

    def outgoing(self, connection: int) -> Iterator[bytes]:
        """Frames for the client, until the connection or the session ends."""
        while True:
            with self._changed:
                while connection == self._connection and not self._unsent and not self._closing:
                    self._changed.wait()
                if connection != self._connection:
                    return
                key = self._unsent.popleft() if self._unsent else None
                frame = self._unanswered.get(key) if key else encode_word("close")
            if frame is not None:  # else it has been withdrawn; nothing is held while gRPC sends
                yield frame
            frame = None  # nor while there is nothing to send: it may be as long as activations
            if key is None:
                return

    def incoming(self, key: Key, reply: Reply) -> None:
        """A reply from the client; held back while too many replies wait to be read."""
        with self._changed:
            if key in self._abandoned:
                self._abandoned.discard(key)
                if isinstance(reply, Behind | Failure):  # it refuses the rest
                    self._abandoned = {k for k in self._abandoned if k[:2] != key[:2]}
                return
            if self._unanswered.pop(key, None) is None:
                return  # answered already, over another connection, or withdrawn
            if isinstance(reply, Behind | Failure):
                for later in [k for k in self._unanswered if k[:2] == key[:2]]:
                    del self._unanswered[later]  # the client refuses the rest
            self._replies[key] = reply
            del reply  # whoever takes it is to be the only one who has it
            self._changed.notify_all()
            while len(self._replies) > _WINDOW and self._waiting_for is None and self.connected:
                self._changed.wait(1.0)


class StreamServer:
    """Listens for client processes. bind: "host:port", port 0 for any. limit: bytes of the
    longest frame. certificate: (private key, certificate chain), PEM; None is without TLS."""

    def __init__(
        self, bind: str, limit: int, workers: int, certificate: tuple[bytes, bytes] | None = None
    ):
        self._sessions: list[StreamSession] = []
        # a connection takes one thread for each direction
        self._pool = futures.ThreadPoolExecutor(workers)
        options = [*channel_options(limit), *_STRANGERS]
        self._server = grpc.server(self._pool, options=options)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service, method = METHOD.strip("/").split("/")
        generic = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server.add_generic_rpc_handlers((generic,))
        try:
            if certificate is None:
                self.port = self._server.add_insecure_port(bind)
            else:
                credentials = grpc.ssl_server_credentials([certificate])
                self.port = self._server.add_secure_port(bind, credentials)
        except RuntimeError as error:
            raise ConfigError(f"stream-bind: cannot listen on {bind}: {error}") from error
        self._server.start()

    def session(self, node: str) -> StreamSession:
        """A new session, to be dialled with its token."""
        session = StreamSession(node)
        self._sessions.append(session)
        return session

    def forget(self, session: StreamSession) -> None:
        """Nobody dials this session any more."""
        self._sessions.remove(session)

    def stop(self) -> None:
        """Close every session and the port."""
        for session in self._sessions:
            session.close()
        self._server.stop(grace=2.0).wait(5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One connection, as gRPC calls it, before any of its frames is read."""
        shown = dict(context.invocation_metadata()).get(TOKEN, b"")
        admitted = self.admit(shown)
        if admitted is None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown or used token")
            return
        session, connection, token = admitted
        context.add_callback(lambda: session.lost(connection))
        reader = threading.Thread(
            target=self._read, args=(session, connection, frames), daemon=True
        )
        reader.start()
        yield encode_word("welcome", token=token)
        yield from session.outgoing(connection)

    def admit(self, shown: bytes) -> tuple[StreamSession, int, str] | None:
        """The session whose token a call shows, its new connection and the next token; None for
        a stranger."""
        # every session is compared, so that time tells nothing about any; of a copy, since others
        # come and go in another thread
        opened = [(session, session.open(shown)) for session in tuple(self._sessions)]
        return next(((session, *new) for session, new in opened if new is not None), None)

    def _read(self, session: StreamSession, connection: int, frames: Iterator[bytes]) -> None:
        try:
            for frame in frames:
                key, reply = decode_frame(frame, REPLIES, LONGEST_REPLY)
                del frame  # the next may be long in coming
                session.incoming(key, reply)
                del reply
        except ProtocolError as error:  # its connection is cut, whoever waits for it is told
            session.fault = str(error)
        except grpc.RpcError:
            pass
        except Exception as error:  # grpc raises a bare Exception when a call is cancelled
            if type(error) is not Exception:
                session.fault = f"its reply cannot be read: {type(error).__name__}"
                raise
        finally:
            session.lost(connection)
