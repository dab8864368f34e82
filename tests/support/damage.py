"""Ways to damage a valid frame of the protocol: bytes flipped, cut and spliced; fields of the
header, shapes and dtypes of tensors replaced by values made to hurt."""

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

from hosl_flower.protocol.messages.registry import REPLIES, REQUESTS
from hosl_flower.tensors.raw_bytes import DTYPES

NASTY = [
    None, True, -1, 0, 1, 2**31, 2**40, 2**63 - 1, 2**64, 10**400, -(2**63), 1e-320, 1e308,
    float("nan"), float("inf"), "", "a", "\u0000", "\ud800", "x" * 5000, [], [[]], [0] * 3000, {},
    {"kind": "forward"}, [1, "2", None], "0123456789abcdef", "__class__", "../../etc/passwd",
]  # fmt: skip
STRANGE = ["float32", "float16", "bfloat16", "int8", "bool", "int64", "object", "complex64", 7, ""]
# of a tensor's shape: products that overflow 64 bits, where they are not 0
HUGE = [0, 0, 1, 2, 2**20, 2**31, 2**32, 2**39, 2**40 - 1, 2**40, 2**62, 2**63 - 1, 2**64]
DEPTHS = [1, 50, 400, 800, *range(900, 1000, 7), 1000, 5000]  # Python's own limit is among them
_HERE = "put what is nested here"
# of a tensor's bytes: zeros, and what reads as -nan or -1, nan, 1.0, -inf, small integers
FILLINGS = ["00", "ff", "0000c07f", "0000803f", "000080ff", "01"]


class Damage:
    """frames: valid ones, to start from and to splice with."""

    def __init__(self, frames: list[bytes], seed: int):
        self.random, self.frames = random.Random(seed), frames
        self.ways: list[Callable[[bytes], bytes]] = [
            self.flip, self.cut, self.splice, self.length, self.envelope, self.header, self.header,
            self.tensor, self.tensor, self.sizes, self.nested,
        ]  # fmt: skip

    def frame(self) -> bytes:
        """A valid frame, damaged once or several times."""
        frame = self.random.choice(self.frames)
        damage = self.random.choice(self.ways)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            frame = damage(frame)
        return frame

    def flip(self, frame: bytes) -> bytes:
        changed = bytearray(frame)
        for _ in range(self.random.choice((1, 1, 3, 20))):
            if changed:
                changed[self.random.randrange(len(changed))] = self.random.randrange(256)
        return bytes(changed)

    def cut(self, frame: bytes) -> bytes:
        return frame[: self.random.randrange(len(frame) + 1)]

    def splice(self, frame: bytes) -> bytes:
        other = self.random.choice(self.frames)
        at = self.random.randrange(len(frame) + 1)
        return frame[:at] + other[self.random.randrange(len(other)) :]

    def length(self, frame: bytes) -> bytes:
        return struct.pack("<I", self.random.choice((0, 1, 2**24, 2**31, 2**32 - 1))) + frame[4:]

    def envelope(self, frame: bytes) -> bytes:
        """The envelope's own values and the tensors it lists."""
        both = parts(frame)
        if both is None:
            return frame
        envelope, body = both
        listed = envelope.get("tensors")
        if listed and isinstance(listed, list) and self.random.random() < 0.7:
            tensor = self.random.choice(listed)
            if isinstance(tensor, list) and len(tensor) == 3:
                sizes = [self.random.choice([0, 1, 2, 3, *NASTY]) for _ in range(3)]
                tensor[self.random.randrange(3)] = self.random.choice(
                    [self.random.choice(NASTY), self.random.choice(STRANGE), sizes]
                )
        else:
            envelope[self.random.choice([*envelope, "word", "more"])] = self.random.choice(NASTY)
        return join(envelope, body)

    def header(self, frame: bytes) -> bytes:
        """A field of the message."""
        both = parts(frame)
        if both is None:
            return frame
        envelope, body = both
        try:
            header = json.loads(envelope["header"])
            names = [*header, "kind", "activations", "extra"]
        except (KeyError, TypeError, ValueError):
            return frame
        name = self.random.choice(names)
        if self.random.random() < 0.15:
            header.pop(name, None)
        else:
            kinds = [*REQUESTS, *REPLIES] if name == "kind" else NASTY
            header[name] = self.random.choice(kinds)
        return join({**envelope, "header": json.dumps(header)}, body)

    def tensor(self, frame: bytes) -> bytes:
        """A tensor of another shape, dtype or content, with as many bytes as that needs."""
        both = parts(frame)
        if both is None or not isinstance(listed := both[0].get("tensors"), list) or not listed:
            return frame
        envelope, body = both
        if not all(map(_sound, listed)):  # damaged already
            return frame
        chosen, start, pieces = self.random.randrange(len(listed)), 0, []
        for index, (_, dtype, shape) in enumerate(listed):
            stop = start + math.prod(shape) * DTYPES[dtype].itemsize
            pieces.append(self._filled(listed[index]) if index == chosen else body[start:stop])
            start = stop
        return join(envelope, b"".join(pieces))

    def sizes(self, frame: bytes) -> bytes:
        """A tensor of sizes whose product is huge, or 0; where it is 0 its bytes fit."""
        both = parts(frame)
        if both is None or not isinstance(listed := both[0].get("tensors"), list) or not listed:
            return frame
        envelope, body = both
        entry = self.random.choice(listed)
        if not isinstance(entry, list) or len(entry) != 3:
            return frame
        entry[2] = [self.random.choice(HUGE) for _ in range(self.random.randrange(1, 7))]
        if self.random.random() < 0.8:  # alone, since others have bytes
            envelope["tensors"], body = [entry], b""
        return join(envelope, body)

    def nested(self, frame: bytes) -> bytes:
        """A value of the envelope, of a tensor's entry or of the message inside many lists or
        objects, and perhaps not a whole number of brackets."""
        both = parts(frame)
        if both is None:
            return frame
        envelope, body = both
        listed = envelope.get("tensors")
        place = self.random.random()
        if place < 0.4 and isinstance(envelope.get("header"), str):
            key = self.random.choice(('"kind"', '"step"', '"seconds"', '"batch"'))
            envelope["header"] = f'{{{key}: "{_HERE}", {envelope["header"][1:]}'
        elif place < 0.7 and isinstance(listed, list):
            entry = self.random.choice([["x", "float32", [1]], *listed])
            if isinstance(entry, list) and entry:
                entry[self.random.randrange(len(entry))] = _HERE
            envelope["tensors"] = [entry]
        else:
            envelope[self.random.choice(("key", "header", "tensors", "more"))] = _HERE
        depth = self.random.choice(DEPTHS)
        opened, closed = self.random.choice((("[", "]"), ('{"a":', "}")))
        inside = opened * depth + "1" + closed * (depth - self.random.choice((0, 0, 0, 1)))
        text = json.dumps(envelope)
        text = text.replace(f'\\"{_HERE}\\"', inside.replace('"', '\\"'))
        text = text.replace(f'"{_HERE}"', inside)
        return _framed(text.encode(errors="replace"), body)

    def _filled(self, entry: list[Any]) -> bytes:
        """New content of a tensor, whose dtype and shape change in place."""
        if self.random.random() < 0.3:
            entry[1] = self.random.choice(list(DTYPES))
        if self.random.random() < 0.7:
            dimensions = self.random.choice((0, 1, 1, 2, 2, 3, 3, 4, 5))
            entry[2] = [self.random.choice((0, 1, 2, 3, 4, 5, 9, 33)) for _ in range(dimensions)]
        size = math.prod(entry[2]) * DTYPES[entry[1]].itemsize
        if size > 1 << 16:
            entry[2], size = [0], 0
        filling = bytes.fromhex(self.random.choice(FILLINGS))
        return (filling * size)[:size]


def _sound(entry: Any) -> bool:
    """Whether an entry of the envelope is of a tensor that could be there."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    dtype, shape = entry[1:]
    fits = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**20 for n in shape)
    return fits and len(shape) < 6 and isinstance(dtype, str) and dtype in DTYPES


def parts(frame: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Envelope and tensors of a frame, if it has an envelope."""
    if len(frame) < 4:
        return None
    stop = 4 + struct.unpack_from("<I", frame)[0]
    try:
        envelope = json.loads(frame[4:stop])
    except (ValueError, RecursionError):
        return None
    return (envelope, frame[stop:]) if isinstance(envelope, dict) else None


def join(envelope: dict[str, Any], body: bytes) -> bytes:
    """The inverse."""
    return _framed(json.dumps(envelope).encode(), body)


def _framed(text: bytes, body: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text + body
