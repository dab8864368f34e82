"""What a client answers: see messages.py for the whole protocol."""

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.protocol.messages.requests import STRICT, Count, Counts, Digest, Digests, Finite
from hosl_flower.tensors.memory import PHASES

# summed up over a run, so that a sum stays a number; nobody computes for longer than eleven days
Seconds = Annotated[Finite, Field(ge=0, le=1e6)]
Peaks = Annotated[Counts, Field(min_length=len(PHASES), max_length=len(PHASES))]


@dataclass(frozen=True, config=STRICT)
class Reply:
    """seconds: of client compute; peak_bytes: resident set of the client's process so far;
    tensor_peaks: of its tensors, in the order of memory.PHASES."""

    kind: ClassVar[str]
    step: Count
    seconds: Seconds
    peak_bytes: Count
    tensor_peaks: Peaks = field(default=(0,) * len(PHASES), kw_only=True)


@dataclass(frozen=True, config=STRICT)
class Described(Reply):
    """label_counts: training examples per label, none where labels are the client's;
    memory_meter: what tensor_peaks measures; simulated_noise: the noise of what it sends follows
    from the run's seed; held_out_overlap: an overlap.Overlap, flat, or nothing where the held-out
    part is the data's own or the server is told nothing of it."""

    kind: ClassVar[str] = "described"
    train_examples: Count
    held_out_examples: Count
    label_counts: Counts
    memory_meter: Literal["live_storages", "cuda_allocated"]
    simulated_noise: bool = field(default=False, kw_only=True)
    held_out_overlap: Counts = field(default=(), kw_only=True)


@dataclass(frozen=True, config=STRICT)
class Activations(Reply):
    """activations [R, S, H]; attention_mask [R, S] bool; labels [B] int64 in 0..C-1, or [0] where
    they are the client's. R is B, or B * C where answer words are scored by their tokens
    (answers.py). Where answers are generated, labels [B, A] are the tokens of the last A positions
    (completion.py).

    On the wire activations and scales are as the run's codec writes them; the link hands them
    on decoded, without scales.
    """

    kind: ClassVar[str] = "activations"
    activations: Tensor
    scales: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True, config=STRICT)
class Continued(Reply):
    """As Activations, of prompts [B, S, H] or of one token after each [B, 1, H]; without labels."""

    kind: ClassVar[str] = "continued"
    activations: Tensor
    scales: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, config=STRICT)
class Graded(Reply):
    """scores float32 [B, 2]: exact match and F1 of each answer, 0 to 1."""

    kind: ClassVar[str] = "graded"
    scores: Tensor


@dataclass(frozen=True, config=STRICT)
class HiddenGradient(Reply):
    """loss: mean cross-entropy of the examples of a HiddenStates; gradient: of it with respect to
    the states, float32 [b, M, D], or [0] where only losses were wanted."""

    kind: ClassVar[str] = "hidden-gradient"
    loss: Finite
    gradient: Tensor


@dataclass(frozen=True, config=STRICT)
class Scored(Reply):
    """Of all examples of a HeldOutStates together: how many were right, the sum of the losses."""

    kind: ClassVar[str] = "scored"
    correct: Count
    loss_sum: Finite


@dataclass(frozen=True, config=STRICT)
class Applied(Reply):
    """The ledger position and digest the client is at now."""

    kind: ClassVar[str] = "applied"
    position: Count
    digest: Digest


@dataclass(frozen=True, config=STRICT)
class Scalars(Reply):
    """Projected gradients float32 [E, P] of the client's own surrogate, the 1/P inside. loss: of
    the auxiliary head before the steps, where that is the surrogate."""

    kind: ClassVar[str] = "scalars"
    scalars: Tensor
    loss: Finite = field(default=0.0, kw_only=True)


@dataclass(frozen=True, config=STRICT)
class Update(Reply):
    """Something of the shape of the trainable parameters, as the run's update-codec writes it
    (update_codec.py)."""

    present: Tensor
    values: Tensor
    scales: Tensor


@dataclass(frozen=True, config=STRICT)
class Change(Update):
    """Trainable weights after local training minus those before."""

    kind: ClassVar[str] = "change"


@dataclass(frozen=True, config=STRICT)
class Gradient(Update):
    """Loss gradient of the trainable parameters."""

    kind: ClassVar[str] = "gradient"


@dataclass(frozen=True, config=STRICT)
class Stepped(Reply):
    """How many steps of its own the client has taken now."""

    kind: ClassVar[str] = "stepped"
    local: Count


@dataclass(frozen=True, config=STRICT)
class Weights(Reply):
    """Trainable weights [n] in name order, in their dtype, and the state of the optimizer after
    `updates` updates: moments float32 [k, m] (state.py)."""

    kind: ClassVar[str] = "weights"
    updates: Count
    weights: Tensor
    moments: Tensor


@dataclass(frozen=True, config=STRICT)
class Fingerprinted(Reply):
    """Fingerprints (ledger.fingerprint) at the ledger positions the client has kept them of,
    in order, that of the request last."""

    kind: ClassVar[str] = "fingerprinted"
    positions: Counts
    fingerprints: Digests


@dataclass(frozen=True, config=STRICT)
class Behind(Reply):
    """The client's ledger is this one, not the one the request is for: catch it up first."""

    kind: ClassVar[str] = "behind"
    position: Count
    digest: Digest


@dataclass(frozen=True, config=STRICT)
class Failure(Reply):
    """What went wrong on the client, in one line."""

    kind: ClassVar[str] = "failure"
    error: Annotated[str, Field(max_length=4000)]
