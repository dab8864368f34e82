"""What the server asks a client: see messages.py for the whole protocol."""

from dataclasses import field
from typing import Annotated, ClassVar

from pydantic import ConfigDict, FailFast, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from hosl_flower.errors import ProtocolError
from hosl_flower.zo.estimator import Point

Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
# the first bad element is enough: an error for each would be a hundred times the message's size
Counts = Annotated[tuple[Count, ...], FailFast()]
Finites = Annotated[tuple[Finite, ...], FailFast()]
Digests = Annotated[tuple[Digest, ...], FailFast()]
STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, config=STRICT)
class Request:
    """step: training step it belongs to; partition: which client's data; position and digest:
    the ledger it must be answered at; local: how many steps of its own the client has taken
    since (LocalStep), which are in no ledger."""

    kind: ClassVar[str]
    step: Count
    partition: Count
    position: Count
    digest: Digest
    local: Count = field(default=0, kw_only=True)


@dataclass(frozen=True, config=STRICT)
class Describe(Request):
    """Answered at any position."""

    kind: ClassVar[str] = "describe"


@dataclass(frozen=True, config=STRICT)
class Forward(Request):
    """batch: number of the client's own mini-batch; anchor: its cut gradient will come back, and
    probes of it start from these activations, which a client may remember."""

    kind: ClassVar[str] = "forward"
    batch: Count
    anchor: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, config=STRICT)
class Probe(Forward):
    """At theta + coefficient * s(seed)."""

    kind: ClassVar[str] = "probe"
    seed: Count
    coefficient: Finite

    @property
    def point(self) -> Point:
        """Where the client submodel is evaluated."""
        return Point(self.seed, self.coefficient)


@dataclass(frozen=True, config=STRICT)
class Evaluate(Request):
    """batch: number of the held-out batch."""

    kind: ClassVar[str] = "evaluate"
    batch: Count


@dataclass(frozen=True, config=STRICT)
class Continue(Evaluate):
    """The prompts of the batch alone, and the tokens int64 [B, t] that follow them: activations of
    the last of these, or of the prompts where t = 0 (then B need not be known: [0, 0])."""

    kind: ClassVar[str] = "continue"
    tokens: Tensor


@dataclass(frozen=True, config=STRICT)
class Grade(Evaluate):
    """Answers to the batch's prompts, as tokens int64 [B, t]; what follows the end of one counts
    for nothing."""

    kind: ClassVar[str] = "grade"
    tokens: Tensor


@dataclass(frozen=True, config=STRICT)
class HiddenStates(Request):
    """The server submodel's last hidden states float32 [b, M, D] (answers.py) of examples first..
    of mini-batch `batch`, where labels are the client's. Answered at any position.

    losses_only: no gradient is wanted.
    """

    kind: ClassVar[str] = "hidden-states"
    batch: Count
    first: Count
    states: Tensor
    losses_only: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, config=STRICT)
class HeldOutStates(Request):
    """As HiddenStates, of held-out examples first.. . Answered at any position."""

    kind: ClassVar[str] = "held-out-states"
    first: Count
    states: Tensor


@dataclass(frozen=True, config=STRICT)
class Losses(Request):
    """Losses [2Q] of the probes +eps, -eps of each seed: the client makes its update of them.

    clip: what its scalars are bounded to, 0 for nothing; digest_after: of the ledger with that
    update.
    """

    kind: ClassVar[str] = "losses"
    seeds: Counts
    losses: Finites
    epsilon: Finite
    learning_rate: Finite
    digest_after: Digest
    clip: Annotated[Finite, Field(ge=0)] = field(default=0.0, kw_only=True)


@dataclass(frozen=True, config=STRICT)
class LocalProbe(Forward):
    """Probe a surrogate that needs no server, from mini-batch `batch` on, with `directions` seeds
    in each of len(seeds) / directions local steps. learning_rate: of the local updates between
    the steps, which the client takes back at the end. epsilon: the probe distance; 0, of a
    CutGradient, is the derivative itself."""

    directions: Annotated[int, Field(ge=1, lt=2**31)]
    seeds: Counts
    epsilon: Finite
    learning_rate: Finite

    @property
    def local_seeds(self) -> list[tuple[int, ...]]:
        """Seeds of each local step; ProtocolError when they do not fit."""
        steps, rest = divmod(len(self.seeds), self.directions)
        if rest or not steps:
            raise ProtocolError(
                f"{self.kind}: {len(self.seeds)} seeds are no steps of {self.directions} directions"
            )
        size = self.directions
        return [self.seeds[i * size : (i + 1) * size] for i in range(steps)]


@dataclass(frozen=True, config=STRICT)
class HeadProbe(LocalProbe):
    """The surrogate is the loss of the client's auxiliary head; each local step has a mini-batch
    of its own, the next in turn."""

    kind: ClassVar[str] = "head-probe"


@dataclass(frozen=True, config=STRICT)
class Backward(Forward):
    """Loss gradient lambda [B, S, H] at the client's activations of mini-batch `batch`: the
    client's parameters get theirs by back-propagation.

    gradient, scales: lambda / scale, as the run's codec writes it (codec.py).
    """

    kind: ClassVar[str] = "backward"
    gradient: Tensor
    scales: Tensor
    scale: Finite


@dataclass(frozen=True, config=STRICT)
class LocalStep(Backward):
    """As Backward; the client's own optimizer takes a step along the gradient, in place."""

    kind: ClassVar[str] = "local-step"
    learning_rate: Finite


@dataclass(frozen=True, config=STRICT)
class CutGradient(LocalProbe, Backward):
    """Loss gradient lambda at the activations: the surrogate is <lambda, f_c>. lambda and the
    mini-batch are the same in all local steps."""

    kind: ClassVar[str] = "cut-gradient"


@dataclass(frozen=True, config=STRICT)
class LocalTrain(CutGradient):
    """As CutGradient; the client sends how its weights changed, then takes the change back."""

    kind: ClassVar[str] = "local-train"


@dataclass(frozen=True, config=STRICT)
class Fetch(Request):
    """Asks for the weights after `local` steps; moments: and for the state of the optimizer."""

    kind: ClassVar[str] = "fetch"
    moments: bool


@dataclass(frozen=True, config=STRICT)
class Adopt(Request):
    """The weights after `local` steps are the run's: position + 1 is there. weights: their
    fingerprint; digest_after: of the ledger there."""

    kind: ClassVar[str] = "adopt"
    weights: Digest
    digest_after: Digest


@dataclass(frozen=True, config=STRICT)
class Fingerprint(Request):
    """Asks for the hashes of the trainable client parameters from position `since` on."""

    kind: ClassVar[str] = "fingerprint"
    since: Count
