"""The protocol: what the server asks a client, what the client answers.

Messages are frozen dataclasses whose fields pydantic checks when they are made, also when
they are made from what arrived. On the wire a message is a JSON header plus raw tensors; each
link carries that pair in its own way (link/records.py puts it into a Flower RecordDict), so
every link speaks the same protocol and counts the same bytes.

    Describe   what data do you have?                        -> Described
    Forward    activations of a training batch at theta      -> Activations
    Probe      the same at theta + c * s(seed)               -> Activations
    Evaluate   activations of a held-out batch               -> Activations
    Losses     the true losses of your probes: update theta  -> Applied
    CatchUp    ledger entries you have missed                -> Applied
    Fingerprint  hash of your submodel                       -> Fingerprinted

Any request may be answered by Behind (the client's ledger is shorter or another one: send
CatchUp) or Failure.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.ledger import Entry, Ledger, entries_from_columns
from hosl_flower.tensors import dtype_name, raw_bytes
from hosl_flower.zo import Point

Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, config=_STRICT)
class Request:
    """step: training step it belongs to; partition: which client's data; position and digest:
    the ledger it must be answered at."""

    kind: ClassVar[str]
    step: Count
    partition: Count
    position: Count
    digest: Digest


@dataclass(frozen=True, config=_STRICT)
class Describe(Request):
    """Answered at any position."""

    kind: ClassVar[str] = "describe"


@dataclass(frozen=True, config=_STRICT)
class Forward(Request):
    """batch: number of the client's own mini-batch."""

    kind: ClassVar[str] = "forward"
    batch: Count


@dataclass(frozen=True, config=_STRICT)
class Probe(Forward):
    """At theta + coefficient * s(seed)."""

    kind: ClassVar[str] = "probe"
    seed: Count
    coefficient: Finite

    @property
    def point(self) -> Point:
        """Where the client submodel is evaluated."""
        return Point(self.seed, self.coefficient)


@dataclass(frozen=True, config=_STRICT)
class Evaluate(Request):
    """batch: number of the held-out batch."""

    kind: ClassVar[str] = "evaluate"
    batch: Count


@dataclass(frozen=True, config=_STRICT)
class Losses(Request):
    """Losses [2Q] of the probes +eps, -eps of each seed: the client makes its update of them.

    digest_after: of the ledger with that update.
    """

    kind: ClassVar[str] = "losses"
    seeds: tuple[Count, ...]
    losses: tuple[Finite, ...]
    epsilon: Finite
    learning_rate: Finite
    digest_after: Digest


@dataclass(frozen=True, config=_STRICT)
class CatchUp(Request):
    """Entries from `position` on, as columns: seeds int64 [n], scalars float32 [n] ..."""

    kind: ClassVar[str] = "catch-up"
    steps: tuple[Count, ...]
    counts: tuple[Count, ...]
    learning_rates: tuple[Finite, ...]
    seeds: Tensor
    scalars: Tensor

    @classmethod
    def of(cls, ledger: Ledger, start: int, stop: int, cause: Request) -> "CatchUp":
        """The request that carries entries start..stop, so that `cause` can be answered."""
        entries = ledger.entries[start:stop]
        return cls(
            step=cause.step,
            partition=cause.partition,
            position=start,
            digest=ledger.digest(start),
            steps=tuple(entry.step for entry in entries),
            counts=tuple(len(entry.seeds) for entry in entries),
            learning_rates=tuple(entry.learning_rate for entry in entries),
            seeds=torch.tensor([s for e in entries for s in e.seeds], dtype=torch.int64),
            scalars=torch.tensor([s for e in entries for s in e.scalars], dtype=torch.float32),
        )

    @property
    def entries(self) -> list[Entry]:
        """The ledger entries carried; ProtocolError when the columns do not fit together."""
        try:
            return entries_from_columns(
                self.steps,
                self.counts,
                self.seeds.tolist(),
                self.scalars.tolist(),
                self.learning_rates,
            )
        except ValueError as error:
            raise ProtocolError(f"catch-up: {error}") from error


@dataclass(frozen=True, config=_STRICT)
class Fingerprint(Request):
    """Asks for the hash of the trainable client parameters."""

    kind: ClassVar[str] = "fingerprint"


@dataclass(frozen=True, config=_STRICT)
class Reply:
    """seconds: of client compute; peak_bytes: of client memory so far (memory.py)."""

    kind: ClassVar[str]
    step: Count
    seconds: Finite
    peak_bytes: Count


@dataclass(frozen=True, config=_STRICT)
class Described(Reply):
    """label_counts: training examples per label; memory_meter: what peak_bytes measures."""

    kind: ClassVar[str] = "described"
    train_examples: Count
    held_out_examples: Count
    label_counts: tuple[Count, ...]
    memory_meter: Literal["process_rss", "cuda_allocated"]


@dataclass(frozen=True, config=_STRICT)
class Activations(Reply):
    """activations [B, S, H]; attention_mask [B, S] bool; labels [B] int64 in 0..C-1."""

    kind: ClassVar[str] = "activations"
    activations: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True, config=_STRICT)
class Applied(Reply):
    """The ledger position and digest the client is at now."""

    kind: ClassVar[str] = "applied"
    position: Count
    digest: Digest


@dataclass(frozen=True, config=_STRICT)
class Fingerprinted(Reply):
    """fingerprint: see ledger.fingerprint."""

    kind: ClassVar[str] = "fingerprinted"
    fingerprint: Digest


@dataclass(frozen=True, config=_STRICT)
class Behind(Reply):
    """The client's ledger is this one, not the one the request is for: catch it up first."""

    kind: ClassVar[str] = "behind"
    position: Count
    digest: Digest


@dataclass(frozen=True, config=_STRICT)
class Failure(Reply):
    """What went wrong on the client, in one line."""

    kind: ClassVar[str] = "failure"
    error: Annotated[str, Field(max_length=4000)]


Message = Request | Reply
REQUESTS: dict[str, type[Request]] = {
    cls.kind: cls for cls in (Describe, Forward, Probe, Evaluate, Losses, CatchUp, Fingerprint)
}
REPLIES: dict[str, type[Reply]] = {
    cls.kind: cls for cls in (Described, Activations, Applied, Fingerprinted, Behind, Failure)
}


def to_wire(message: Message) -> tuple[str, dict[str, Tensor]]:
    """A message as (JSON header, tensors by field name)."""
    header: dict[str, Any] = {"kind": message.kind}
    tensors: dict[str, Tensor] = {}
    for field in fields(message):
        value = getattr(message, field.name)
        (tensors if isinstance(value, Tensor) else header)[field.name] = value
    return json.dumps(header, allow_nan=False), tensors


def from_wire(header: str, tensors: Mapping[str, Tensor], known: Mapping[str, type]) -> Any:
    """The message that arrived, of one of the `known` kinds.

    Raises ProtocolError for anything that is not exactly such a message.
    """
    try:
        values = json.loads(header)
    except ValueError as error:
        raise ProtocolError(f"message header is not JSON: {header[:60]!r}") from error
    kind = values.pop("kind", "") if isinstance(values, dict) else ""
    if not isinstance(kind, str) or kind not in known:
        raise ProtocolError(f"expected a message of kind {', '.join(known)}, got {kind!r}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if overlap := values.keys() & tensors.keys():
        raise ProtocolError(f"{kind}: {', '.join(overlap)} came twice")
    try:
        return known[kind](**values, **tensors)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "message"
        raise ProtocolError(f"{kind}: {place}: {first['msg'].lower()}") from error


def wire_bytes(message: Message) -> int:
    """Bytes of the header and the tensors; the transport's own envelope is not counted."""
    header, tensors = to_wire(message)
    return len(header) + sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


@dataclass(frozen=True)
class Limits:
    """What activations may look like in a run: at most `batch` sequences of `length` tokens,
    of width `hidden` and `dtype`, with labels of `classes` classes."""

    batch: int
    length: int
    hidden: int
    dtype: str
    classes: int


def check_activations(reply: Activations, limits: Limits) -> None:
    """ProtocolError unless the reply is a batch this run can use: shapes, dtypes, finite."""
    h, mask, labels = reply.activations, reply.attention_mask, reply.labels
    if h.dim() != 3 or dtype_name(h) != limits.dtype or h.shape[2] != limits.hidden:
        raise ProtocolError(
            f"activations: expected {limits.dtype}[B, S, {limits.hidden}], "
            f"got {dtype_name(h)}{list(h.shape)}"
        )
    batch, length = h.shape[:2]
    if not (0 < batch <= limits.batch and 0 < length <= limits.length):
        raise ProtocolError(
            f"activations: expected at most {limits.batch} sequences of {limits.length} tokens, "
            f"got {batch} of {length}"
        )
    if mask.dtype != torch.bool or mask.shape != h.shape[:2] or not mask[:, -1].all():
        raise ProtocolError(
            f"attention_mask: expected bool{[batch, length]}, left-padded, "
            f"got {dtype_name(mask)}{list(mask.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != (batch,):
        raise ProtocolError(
            f"labels: expected int64[{batch}], got {dtype_name(labels)}{list(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= limits.classes:
        raise ProtocolError(
            f"labels: expected 0..{limits.classes - 1}, got {labels.unique().tolist()}"
        )
    if not torch.isfinite(h).all():
        bad = int((~torch.isfinite(h)).sum())
        raise ProtocolError(f"activations: {bad} of {h.numel()} values are not finite")


class BatchKey(NamedTuple):
    """What the replies about one mini-batch have in common."""

    shape: tuple[int, ...]
    mask: bytes
    labels: tuple[int, ...]

    @classmethod
    def of(cls, reply: Activations) -> "BatchKey":
        """The key of a reply, which need not be kept for it."""
        mask = bytes(raw_bytes(reply.attention_mask))
        return cls(tuple(reply.activations.shape), mask, tuple(reply.labels.tolist()))


def check_same_batch(keys: Sequence[BatchKey], step: int) -> None:
    """ProtocolError unless all replies of a step are about the same mini-batch."""
    if len(set(keys)) > 1:
        raise ProtocolError(
            f"step {step}: the client's activations are of {len(set(keys))} different mini-batches"
        )
