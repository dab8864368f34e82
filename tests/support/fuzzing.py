"""Malformed protocol messages, and what must become of them.

Valid frames of every kind of message are damaged (damage.py). A frame must be decoded or refused
with ProtocolError, and a message that is decoded must pass the checks of whoever gets it
or be refused likewise, without a crash, and without memory or time that its size does not explain.

tests/benchmarks/fuzz.py damages at random, tests/benchmarks/fuzz_coverage.py keeps what reaches
new code and damages that further.
"""

import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from damage import Damage, parts
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from specs import client_spec

from hosl_flower.errors import ProtocolError
from hosl_flower.flower.records import unpack_invitation, unpack_replies, unpack_requests
from hosl_flower.flower.stream.client_end import Invitation
from hosl_flower.flower.stream.frames import Key, decode_frame, encode_frame, encode_word, read_word
from hosl_flower.flower.stream.server_end import StreamServer, StreamSession
from hosl_flower.ledger.client_state import ClientState
from hosl_flower.ledger.ledger import chain_entries
from hosl_flower.protocol.messages.activations import (
    Activations,
    BatchKey,
    check_same_batch,
)
from hosl_flower.protocol.messages.base import Message, Reply
from hosl_flower.protocol.messages.generation import Continue, Grade
from hosl_flower.protocol.messages.kept_labels import (
    HeldOutStates,
    HiddenStates,
)
from hosl_flower.protocol.messages.ledger import (
    ApplyDeltas,
    CatchUp,
    Fingerprint,
    Restore,
)
from hosl_flower.protocol.messages.registry import REPLIES, REQUESTS
from hosl_flower.protocol.messages.scalars import HeadProbe, LocalProbe
from hosl_flower.protocol.reply_limits import ReplyLimits
from hosl_flower.tasks.generated_answers import IGNORED
from hosl_flower.tensors import update_codec

ALLOWED_BYTES = 1 << 20  # beyond a few copies of the frame: parsing and messages of errors
ALLOWED_SECONDS = 5.0

# what replies that must fit their request answer here
_AT = {"step": 3, "partition": 1, "position": 2, "digest": "0123456789abcdef"}
_ASKED = HeadProbe(
    **_AT, batch=4, directions=3, seeds=tuple(range(6)), epsilon=1e-3, learning_rate=1e-5
)
_SINCE = Fingerprint(**_AT, since=1)
CONTINUE = Continue(**_AT, batch=0, tokens=torch.zeros((2, 1), dtype=torch.int64))
GRADE = Grade(**_AT, batch=0, tokens=torch.zeros((2, 1), dtype=torch.int64))
_SPEC = client_spec().to_json()
_INVITATION = Invitation("host:1", "t" * 32, "", 1 << 20, 60.0).to_json()
_SERVER: Any = SimpleNamespace(_sessions=[StreamSession("fuzz")])


def _state() -> ClientState:
    weights = {"w": torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))}
    return ClientState(weights, "rank1", "adamw", "fuzz")


def _of_answers(reply: Activations) -> Activations:
    """The same batch, of a task whose answers are generated: labels are their tokens."""
    labels = torch.arange(3).repeat(len(reply.attention_mask), 1)
    labels[0, 0] = IGNORED
    return replace(reply, labels=labels)


class Fuzz:
    """Counts what became of frames. messages: valid ones, of every kind."""

    def __init__(self, messages: list[Message], limits: ReplyLimits, seed: int):
        batches = [message for message in messages if isinstance(message, Activations)]
        answers = _of_answers(batches[0])
        messages = [*messages, answers]
        self.frames = [encode_frame(Key(1, 0, n), message) for n, message in enumerate(messages)]
        self.frames.append(encode_word("welcome", token="t" * 32))
        self.damage = Damage(self.frames, seed)
        self.random = self.damage.random
        self.limits = limits
        self.others = [  # of runs that expect other labels
            replace(limits, vocabulary=64, longest=4),
            replace(limits, private_labels=True),
            replace(limits, each=2, shortest=2, label_counts=False),
        ]
        self.batches = [BatchKey.of(batch) for batch in (*batches, answers)]
        kinds = (HiddenStates, HeldOutStates)
        self.asked: dict[str, Any] = {m.kind: m for m in messages if isinstance(m, kinds)}
        self.outcomes: Counter[str] = Counter()
        self.most_bytes, self.most_seconds = 0, 0.0
        self.last = ""  # what became of the last frame, in words

    def run(self, count: int) -> None:
        """Feed so many frames; the first that is not dealt with as it should raises."""
        tracemalloc.start()
        try:
            for _ in range(count):
                self._feed(self.damage.frame())
        finally:
            tracemalloc.stop()

    def _feed(self, frame: bytes) -> None:
        tracemalloc.reset_peak()
        before, started = tracemalloc.get_traced_memory()[0], time.process_time()
        try:
            self.outcomes[self._outcome(frame)] += 1
        except ProtocolError as error:
            self.outcomes["refused"] += 1
            self.last = str(error)
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
        assert StreamServer.admit(_SERVER, frame) is None, "a stranger was let in"
        if read_word(frame) is not None:
            self.last = "a word"
            return "a word"
        if self.random.random() < 0.2 and (records := self._records(frame)) is not None:
            self.random.choice((unpack_requests, unpack_replies, unpack_invitation))(records)
            self.last = "accepted in records"
            return "accepted in records"
        _, message = decode_frame(frame, {**REQUESTS, **REPLIES})
        self._check(message)
        self.last = f"accepted: {message.kind}"
        return "accepted"

    def _records(self, frame: bytes) -> RecordDict | None:
        """The same damage as a Flower message would have it; None where Flower refuses it."""
        both = parts(frame)
        if both is None:
            return None
        envelope, body = both
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
                "spec": self.random.choice(("", "{}", "[" * 3000, envelope["header"], _SPEC)),
                "invitation": self.random.choice(("", "{}", envelope["header"], _INVITATION)),
            }
            records = {"config": ConfigRecord(config), "arrays": ArrayRecord(arrays)}
            return RecordDict(records)
        except (KeyError, TypeError, ValueError):
            return None

    def _check(self, message: Message) -> None:
        """What whoever gets a message looks at before it computes anything."""
        if isinstance(message, CatchUp):
            chain_entries(message.digest, message.entries)
        elif isinstance(message, LocalProbe):
            assert sum(map(len, message.local_seeds)) == len(message.seeds)
        elif isinstance(message, ApplyDeltas):
            message.changes(_state().rows)
        elif isinstance(message, Restore):
            try:
                _state().restore(message.snapshot, message.step)
            except ValueError as error:
                raise ProtocolError(f"restore: {error}") from error
        few = self.random.random() < 0.3
        limits = self.random.choice(self.others) if few else self.limits
        checks: dict[str, Callable[[Any], None]] = {
            "activations": lambda r: self._check_batch(r, limits),
            "continued": lambda r: r.check(CONTINUE, limits, None),
            "graded": lambda r: r.check(GRADE, None, None),
            "described": lambda r: r.check(None, limits, None),
            "change": lambda r: update_codec.check(_state().rows.widths(), r, "int8", r.kind),
            "gradient": lambda r: update_codec.check(_state().rows.widths(), r, "exact", r.kind),
            "scalars": lambda r: r.check(_ASKED, limits, None),
            "weights": lambda r: r.check(None, limits, _state()),
            "fingerprinted": lambda r: r.check(_SINCE, None, None),
            "hidden-gradient": lambda r: r.check(self.asked["hidden-states"], limits, None),
            "scored": lambda r: r.check(self.asked["held-out-states"], None, None),
        }
        if isinstance(message, Reply) and (check := checks.get(message.kind)) is not None:
            check(message)

    def _check_batch(self, reply: Activations, limits: ReplyLimits) -> None:
        """Of a client that answers for a step in several replies, too."""
        reply.check(None, limits, None)
        key = BatchKey.of(reply)
        if key not in self.batches:
            check_same_batch([*self.batches[:1], key], reply.step)
