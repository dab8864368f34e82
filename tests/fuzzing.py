"""Malformed protocol messages, and what must become of them.

Valid frames of every kind of message are damaged: bytes flipped, cut and spliced; fields of the
header, shapes and dtypes of tensors replaced by values made to hurt. A frame must be decoded or
refused with ProtocolError, and a reply that is decoded must pass the checks of the link or be
refused likewise, without a crash, and without memory or time that its size does not explain.
"""

import json
import random
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from hosl_flower.checks import (
    Limits,
    check_activations,
    check_change,
    check_described,
    check_gradient,
    check_hidden_gradient,
    check_scored,
)
from hosl_flower.errors import ProtocolError
from hosl_flower.link.frames import Key, decode, encode, encode_word, read_word
from hosl_flower.link.records import unpack_replies, unpack_requests
from hosl_flower.messages import (
    REPLIES,
    REQUESTS,
    HeldOutStates,
    HiddenStates,
    Message,
    Reply,
)

NASTY = [
    None, True, -1, 0, 1, 2**31, 2**40, 2**63 - 1, 2**64, 10**400, -(2**63), 1e-320, 1e308,
    float("nan"), float("inf"), "", "a", "\u0000", "\ud800", "x" * 5000, [], [[]], [0] * 3000, {},
    {"kind": "forward"}, [1, "2", None], "0123456789abcdef", "__class__", "../../etc/passwd",
]  # fmt: skip
DTYPES = ["float32", "float16", "bfloat16", "int8", "bool", "int64", "object", "complex64", 7, ""]
ALLOWED_BYTES = 1 << 20  # beyond a few copies of the frame: parsing and messages of errors
ALLOWED_SECONDS = 5.0


class Fuzz:
    """Counts what became of frames. messages: valid ones, of every kind."""

    def __init__(self, messages: list[Message], limits: Limits, seed: int):
        self.random = random.Random(seed)
        self.frames = [encode(Key(1, 0, n), message) for n, message in enumerate(messages)]
        self.frames.append(encode_word("hello", token="t" * 32))
        self.limits = limits
        kinds = (HiddenStates, HeldOutStates)
        self.asked: dict[str, Any] = {m.kind: m for m in messages if isinstance(m, kinds)}
        self.outcomes: Counter[str] = Counter()
        self.most_bytes, self.most_seconds = 0, 0.0

    def run(self, count: int) -> None:
        """Feed so many frames; the first that is not dealt with as it should raises."""
        tracemalloc.start()
        try:
            for _ in range(count):
                self._feed(self._damaged())
        finally:
            tracemalloc.stop()

    def _feed(self, frame: bytes) -> None:
        tracemalloc.reset_peak()
        before, started = tracemalloc.get_traced_memory()[0], time.process_time()
        try:
            self.outcomes[self._outcome(frame)] += 1
        except ProtocolError as error:
            self.outcomes["refused"] += 1
            if not str(error) or "\n" in str(error).strip() or len(str(error)) > 20_000:
                raise AssertionError(f"not one clear line: {str(error)[:500]!r}") from error
        except Exception as error:
            raise AssertionError(f"{error!r} from the frame {frame[:2000]!r}") from error
        used = tracemalloc.get_traced_memory()[1] - before - 4 * len(frame)
        self.most_bytes = max(self.most_bytes, used)
        self.most_seconds = max(self.most_seconds, time.process_time() - started)
        if used > ALLOWED_BYTES or self.most_seconds > ALLOWED_SECONDS:
            raise AssertionError(f"{used} bytes, {self.most_seconds} s for {frame[:2000]!r}")

    def _outcome(self, frame: bytes) -> str:
        if read_word(frame) is not None:
            return "a word"
        if self.random.random() < 0.2 and (records := self._records(frame)) is not None:
            unpack_requests(records) if self.random.random() < 0.5 else unpack_replies(records)
            return "accepted in records"
        _, message = decode(frame, {**REQUESTS, **REPLIES})
        if isinstance(message, Reply):
            self._check(message)
        return "accepted"

    def _records(self, frame: bytes) -> RecordDict | None:
        """The same damage as a Flower message would have it; None where Flower refuses it."""
        parts = _parts(frame)
        if parts is None:
            return None
        envelope, body = parts
        try:
            listed = envelope["tensors"]
            arrays = {
                f"{self.random.choice((0, 0, 0, 1, 10**30, ''))}.{name}": Array(
                    str(dtype),
                    tuple(shape),
                    self.random.choice(("hosl.raw", "numpy.ndarray")),
                    body,
                )
                for name, dtype, shape in listed
            }
            config: dict[str, Any] = {
                "headers": [envelope["header"]],
                "sizes": self.random.choice(([1], [0, 1], [-1, 2], [2**62], [])),
                "spec": self.random.choice(("", "{}", "[" * 3000, envelope["header"])),
            }
            records = {"config": ConfigRecord(config), "arrays": ArrayRecord(arrays)}
            return RecordDict(records)
        except (KeyError, TypeError, ValueError):
            return None

    def _check(self, reply: Reply) -> None:
        checks: dict[str, Callable[[Any], None]] = {
            "activations": lambda r: check_activations(r, self.limits),
            "described": lambda r: check_described(r, self.limits),
            "change": lambda r: check_change(r, 24),
            "gradient": lambda r: check_gradient(r, 24),
            "hidden-gradient": lambda r: check_hidden_gradient(r, self.asked["hidden-states"]),
            "scored": lambda r: check_scored(r, self.asked["held-out-states"]),
        }
        if (check := checks.get(reply.kind)) is not None:
            check(reply)

    def _damaged(self) -> bytes:
        frame = self.random.choice(self.frames)
        damage = self.random.choice(
            [self._flip, self._cut, self._splice, self._header, self._header, self._envelope,
             self._length]
        )  # fmt: skip
        for _ in range(self.random.choice((1, 1, 2, 4))):
            frame = damage(frame)
        return frame

    def _flip(self, frame: bytes) -> bytes:
        changed = bytearray(frame)
        for _ in range(self.random.choice((1, 1, 3, 20))):
            if changed:
                changed[self.random.randrange(len(changed))] = self.random.randrange(256)
        return bytes(changed)

    def _cut(self, frame: bytes) -> bytes:
        return frame[: self.random.randrange(len(frame) + 1)]

    def _splice(self, frame: bytes) -> bytes:
        other = self.random.choice(self.frames)
        at = self.random.randrange(len(frame) + 1)
        return frame[:at] + other[self.random.randrange(len(other)) :]

    def _length(self, frame: bytes) -> bytes:
        return struct.pack("<I", self.random.choice((0, 1, 2**24, 2**31, 2**32 - 1))) + frame[4:]

    def _envelope(self, frame: bytes) -> bytes:
        """The envelope's own values and the tensors it lists."""
        parts = _parts(frame)
        if parts is None:
            return frame
        envelope, body = parts
        listed = envelope.get("tensors")
        if listed and isinstance(listed, list) and self.random.random() < 0.7:
            tensor = self.random.choice(listed)
            if isinstance(tensor, list) and len(tensor) == 3:
                sizes = [self.random.choice([0, 1, 2, 3, *NASTY]) for _ in range(3)]
                tensor[self.random.randrange(3)] = self.random.choice(
                    [self.random.choice(NASTY), self.random.choice(DTYPES), sizes]
                )
        else:
            envelope[self.random.choice([*envelope, "word", "more"])] = self.random.choice(NASTY)
        return _frame(envelope, body)

    def _header(self, frame: bytes) -> bytes:
        """A field of the message."""
        parts = _parts(frame)
        if parts is None:
            return frame
        envelope, body = parts
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
        return _frame({**envelope, "header": json.dumps(header)}, body)


def _parts(frame: bytes) -> tuple[dict[str, Any], bytes] | None:
    if len(frame) < 4:
        return None
    stop = 4 + struct.unpack_from("<I", frame)[0]
    try:
        envelope = json.loads(frame[4:stop])
    except (ValueError, RecursionError):
        return None
    return (envelope, frame[stop:]) if isinstance(envelope, dict) else None


def _frame(envelope: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(envelope).encode()
    return struct.pack("<I", len(text)) + text + body
