"""Protocol messages as frames of a byte stream: what link/stream.py and link/dial.py exchange.

    frame = length of the envelope, 4 bytes little endian | envelope, JSON | tensors, raw

The envelope holds the exchange, the partition and the place the message belongs to, its JSON
header (protocol/wire.py) and, for each tensor, name, dtype and shape. A frame that carries no
message has a "word" instead: the handshake and the end of a session.
"""

import json
import reprlib
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from hosl_flower.errors import ProtocolError
from hosl_flower.protocol.messages.base import Message
from hosl_flower.protocol.wire import LONGEST_REQUEST, from_wire, to_wire
from hosl_flower.tensors.raw_bytes import dtype_name, raw_bytes, tensor_from_bytes, tensor_size

_LENGTH = struct.Struct("<I")


class Key(NamedTuple):
    """Which message of a session this is, or answers: the same in request and reply. place: in
    the partition's part of the exchange."""

    exchange: int
    partition: int
    place: int


def encode_frame(key: Key, message: Message) -> bytes:
    """A protocol message as a frame; tensors are copied once, into it."""
    header, tensors = to_wire(message)
    listed = [[name, dtype_name(t), list(t.shape)] for name, t in tensors.items()]
    envelope = json.dumps({"key": key, "header": header, "tensors": listed}).encode()
    return b"".join([_LENGTH.pack(len(envelope)), envelope, *map(raw_bytes, tensors.values())])


def encode_word(word: str, **values: Any) -> bytes:
    """A frame that is no protocol message."""
    envelope = json.dumps({"word": word, **values}).encode()
    return _LENGTH.pack(len(envelope)) + envelope


def read_word(frame: bytes) -> dict[str, Any] | None:
    """The values of a word frame, with its "word"; None for a message. Raises ProtocolError."""
    envelope, _ = _open(frame, LONGEST_REQUEST)
    return envelope if "word" in envelope else None


def decode_frame(
    frame: bytes, known: Mapping[str, type], longest: int = LONGEST_REQUEST
) -> tuple[Key, Any]:
    """Key and message of a frame, of one of the `known` kinds, its envelope of at most `longest`
    bytes; ProtocolError for anything else."""
    envelope, start = _open(frame, longest)
    try:
        key = Key(*envelope["key"])
        header, listed = envelope["header"], [(n, d, tuple(s)) for n, d, s in envelope["tensors"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError("frame: its envelope is not of this protocol") from error
    if not all(isinstance(part, int) and part >= 0 for part in key) or not isinstance(header, str):
        raise ProtocolError("frame: its envelope is not of this protocol")
    body, tensors = memoryview(frame)[start:], {}
    for name, dtype, shape in listed:
        if not isinstance(name, str) or not isinstance(dtype, str) or name in tensors:
            raise ProtocolError(f"frame: tensor {reprlib.repr([name, dtype, shape])} is not valid")
        size = tensor_size(dtype, shape)
        tensors[name] = tensor_from_bytes(body[:size], dtype, shape)
        body = body[size:]
    if body:
        raise ProtocolError(f"frame: {len(body)} bytes too many")
    return key, from_wire(header, tensors, known, longest)


def _open(frame: bytes, longest: int) -> tuple[dict[str, Any], int]:
    if len(frame) < _LENGTH.size:
        raise ProtocolError(f"frame: {len(frame)} bytes are too few")
    (length,) = _LENGTH.unpack_from(frame)
    stop = _LENGTH.size + length
    if length > longest or stop > len(frame):
        raise ProtocolError(
            f"frame: an envelope of {length} bytes does not fit {len(frame)}, or is longer than "
            f"{longest}"
        )
    try:
        envelope = json.loads(frame[_LENGTH.size : stop])
    except (ValueError, RecursionError) as error:
        raise ProtocolError("frame: its envelope is not JSON") from error
    if not isinstance(envelope, dict):
        raise ProtocolError("frame: its envelope is no object")
    return envelope, stop


METHOD = "/hosl.Stream/Session"
MOST_FRAME = 2**31 - 1  # bytes that gRPC can be told to send at once


_KEEPALIVE = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 20_000)]


def channel_options(limit: int) -> list[tuple[str, Any]]:
    """gRPC options of both ends. limit: bytes of the longest frame."""
    return [
        ("grpc.max_send_message_length", limit),
        ("grpc.max_receive_message_length", limit),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        *_KEEPALIVE,
    ]
