"""Ways to damage a valid frame of the protocol: bytes flipped, cut and spliced; fields of the
header, shapes and dtypes of tensors replaced by values made to hurt."""

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

from hosl_flower.messages import REPLIES, REQUESTS
from hosl_flower.tensors import DTYPES

NASTY = [
    None, True, -1, 0, 1, 2**31, 2**40, 2**63 - 1, 2**64, 10**400, -(2**63), 1e-320, 1e308,
    float("nan"), float("inf"), "", "a", "\u0000", "\ud800", "x" * 5000, [], [[]], [0] * 3000, {},
    {"kind": "forward"}, [1, "2", None], "0123456789abcdef", "__class__", "../../etc/passwd",
]  # fmt: skip
STRANGE = ["float32", "float16", "bfloat16", "int8", "bool", "int64", "object", "complex64", 7, ""]
# of a tensor's bytes: zeros, and what reads as -nan or -1, nan, 1.0, -inf, small integers
FILLINGS = ["00", "ff", "0000c07f", "0000803f", "000080ff", "01"]


class Damage:
    """frames: valid ones, to start from and to splice with."""

    def __init__(self, frames: list[bytes], seed: int):
        self.random, self.frames = random.Random(seed), frames
        self.ways: list[Callable[[bytes], bytes]] = [
            self.flip, self.cut, self.splice, self.length, self.envelope, self.header, self.header,
            self.tensor, self.tensor,
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
    text = json.dumps(envelope).encode()
    return struct.pack("<I", len(text)) + text + body
