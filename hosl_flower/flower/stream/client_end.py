"""The client's end of a stream: dial, answer, dial again when the connection breaks."""

import logging
import queue
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated

import grpc
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hosl_flower.errors import ClientError, ProtocolError, RefusedError
from hosl_flower.flower.stream.frames import (
    METHOD,
    MOST_FRAME,
    Key,
    channel_options,
    decode_frame,
    encode_frame,
    read_word,
)
from hosl_flower.flower.stream.server_end import TOKEN
from hosl_flower.protocol.messages.base import Behind, Failure, Reply, Request
from hosl_flower.protocol.messages.registry import REQUESTS
from hosl_flower.system.proxies import is_loopback

log = logging.getLogger("hosl_flower")

MOST_PATIENCE = 60.0  # seconds
_FIRST_PAUSE, _LAST_PAUSE = 0.2, 5.0
_FIRST_CONTACT = 10.0  # seconds of trying before there was any connection
# a name or an address: gRPC takes "unix:/path" and other schemes for an endpoint too
_ENDPOINT = re.compile(r"([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)

Answer = Callable[[Iterable[Request]], Iterator[Reply]]


@dataclass(frozen=True)
class Invitation:
    """What the Flower message that opens a session says.

    endpoint: "host:port". token: good for one connection. authority: the CA certificate, PEM, or
    "" for a connection without TLS. limit: bytes of the longest frame. patience: seconds
    without a connection after which the client gives up.
    """

    endpoint: str
    token: str
    authority: str
    limit: Annotated[int, Field(gt=0, le=MOST_FRAME)]  # gRPC takes -1 for no limit
    patience: Annotated[float, Field(ge=0, le=MOST_PATIENCE, allow_inf_nan=False)]

    def to_json(self) -> str:
        """For the Flower message."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "Invitation":
        """From the Flower message; ProtocolError when it is not one."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise ProtocolError(f"invitation to a stream, {where}: {first['msg']}") from error


_ADAPTER = TypeAdapter(Invitation)


def serve(invitation: Invitation, answer: Answer, insecure: bool = False) -> None:
    """Answer requests until the server closes the session.

    answer: Client.answer. insecure: whether the connection may go beyond this machine without TLS,
    which is this node's decision. Raises ClientError when there was no connection for `patience`
    seconds, or the server refused it; RefusedError for what may not be dialled.
    """
    _check(invitation, insecure)
    caller = _Caller(invitation, answer)
    pause, last_contact = _FIRST_PAUSE, time.monotonic()
    while not caller.closed:
        connections = caller.connections
        try:
            caller.connect()
        except grpc.RpcError as error:
            if caller.connections > connections:
                pause, last_contact = _FIRST_PAUSE, time.monotonic()
            reason = f"{error.code().name}: {error.details()}"
            if error.code() in _REFUSED:
                text = f"stream {invitation.endpoint}: refused"
                raise ClientError(f"{text}: {reason}", public=text) from None
            # the server listens before it invites: one that was never there will not come
            patience = invitation.patience if caller.connections else _FIRST_CONTACT
            if time.monotonic() - last_contact > min(patience, invitation.patience):
                text = f"stream {invitation.endpoint}: no connection for {patience:g} s"
                raise ClientError(f"{text} ({reason})", public=text) from None
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)


def _check(invitation: Invitation, insecure: bool) -> None:
    """RefusedError unless the endpoint is a host and port that may be dialled."""
    endpoint = _ENDPOINT.fullmatch(invitation.endpoint)
    if endpoint is None or int(endpoint[2]) > 65535:
        raise RefusedError(
            f"this client dials host:port alone, got stream-endpoint = {invitation.endpoint[:80]!r}"
        )
    if not (invitation.authority or insecure or is_loopback(endpoint[1].strip("[]"))):
        raise RefusedError(
            f"the stream to {invitation.endpoint} has no TLS and leaves this machine: set "
            "stream-certificate and stream-key in the run config, or, on a network that is "
            "trusted, stream-insecure=true in this SuperNode's --node-config too"
        )


class _Caller:
    """One session, over one connection after the other."""

    def __init__(self, invitation: Invitation, answer: Answer):
        self.invitation, self.answer = invitation, answer
        self.token = invitation.token
        self.closed = False
        self.connections = 0
        self._refused: set[tuple[int, int]] = set()  # (exchange, partition) that ended early

    def connect(self) -> None:
        """Dial and answer until the server closes the session or the connection breaks."""
        own = self.invitation
        options, target = channel_options(own.limit), f"dns:///{own.endpoint}"
        if is_loopback(own.endpoint.rpartition(":")[0]):
            options.append(("grpc.enable_http_proxy", 0))
        if own.authority:
            credentials = grpc.ssl_channel_credentials(own.authority.encode())
            channel = grpc.secure_channel(target, credentials, options=options)
        else:
            channel = grpc.insecure_channel(target, options=options)
        # one reply waits to be sent while the next is computed, never more
        outbox: queue.Queue[bytes | None] = queue.Queue(maxsize=1)
        with channel:
            shown = ((TOKEN, self.token.encode(errors="replace")),)
            call = channel.stream_stream(METHOD)(self._outgoing(outbox), metadata=shown)
            try:
                for frame in call:
                    asked = self._read(frame)
                    del frame  # a cut gradient is not to be held twice while it is answered
                    if asked is not None:
                        self._reply(*asked, call, outbox)
                    elif self.closed:
                        return
                    del asked
            finally:
                call.cancel()
                _end(outbox)

    def _outgoing(self, outbox: "queue.Queue[bytes | None]") -> Iterator[bytes]:
        while (frame := outbox.get()) is not None:
            yield frame
            del frame  # the next may be long in coming

    def _read(self, frame: bytes) -> tuple[Key, Request] | None:
        """What is asked; None for a word, which is heeded, and for what follows a refusal."""
        word = read_word(frame)
        if word is not None:
            self.closed = word["word"] == "close"
            if word["word"] == "welcome":
                self.token, self.connections = str(word.get("token", "")), self.connections + 1
            return None
        key, request = decode_frame(frame, REQUESTS)
        return None if key[:2] in self._refused else (key, request)

    def _reply(
        self, key: Key, request: Request, call: grpc.Call, outbox: "queue.Queue[bytes | None]"
    ) -> None:
        (reply,) = self.answer([request])
        if isinstance(reply, Behind | Failure):
            # what is asked comes in order: of earlier exchanges nothing more will
            self._refused = {known for known in self._refused if known[0] >= key.exchange}
            self._refused.add((key.exchange, key.partition))
        frame = encode_frame(key, reply)
        del reply
        _put(outbox, frame, call)


def _put(outbox: "queue.Queue[bytes | None]", frame: bytes, call: grpc.Call) -> None:
    """Hand over a reply, unless the connection goes meanwhile: then the loop over the call raises
    what ended it."""
    while call.is_active():
        try:
            outbox.put(frame, timeout=1.0)
        except queue.Full:
            continue
        return


def _end(outbox: "queue.Queue[bytes | None]") -> None:
    """Let the thread that sends go."""
    while True:
        try:
            outbox.put_nowait(None)
            return
        except queue.Full:
            try:
                outbox.get_nowait()
            except queue.Empty:
                continue
