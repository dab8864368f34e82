"""The files of a run directory, as far as a page needs them: old runs and other versions too."""

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_NAN = float("nan")

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # a larger one is no count of anything


def _drawable(value: float) -> float:
    """No figure is larger, but for one that diverged; and none larger can be drawn."""
    return math.copysign(math.inf, value) if abs(value) > 1e300 else value


Number = Annotated[float, AfterValidator(_drawable)]


class Read(BaseModel):
    """A part of a file: keys that are not known are passed over, none is required that may lack."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Evaluation(Read):
    """Held-out figures after a step."""

    step: Integer = 0
    loss: Number = _NAN
    accuracy: Number = _NAN
    balanced_accuracy: Number | None = None
    majority_accuracy: Number | None = None
    exact_match: Number | None = None
    f1: Number | None = None

    @property
    def score(self) -> float:
        """Accuracy, or F1 of generated answers."""
        return self.accuracy if self.f1 is None else self.f1


class Sent(Read):
    """Of one kind of request, one way."""

    messages: Integer = 0
    bytes: Integer = 0


class Memory(Read):
    """Peaks of the client that needed most: its process, its tensors by phase."""

    bytes: Integer | None = None
    tensor_bytes: dict[str, Integer] = {}


class Dropped(Read):
    """A client that was left out of a step."""

    step: Integer
    partition: Integer
    reason: str = ""


class Clients(Read):
    """Who was there. dropped: the first times of each client; times_dropped: how often in all."""

    number: Integer | None = None
    steps_taken_part: dict[Integer, Integer] = {}
    dropped: list[Dropped] = []
    times_dropped: dict[Integer, Integer] = {}


class Privacy(Read):
    """What differential privacy has cost, by client."""

    epsilon: dict[str, Number] = {}
    delta: Number | None = None
    simulated: bool = False


class ResultsFile(Read):
    """results.json, as far as a page needs it."""

    method: str = ""
    model: str = ""
    task: str = ""
    pretrained: bool | None = None
    notice: str = ""
    seed: Integer | None = None
    steps: Integer | None = None
    accuracy: Number | None = None
    balanced_accuracy: Number | None = None
    majority_accuracy: Number | None = None
    exact_match: Number | None = None
    f1: Number | None = None
    loss: Number | None = None
    held_out_examples: Integer | None = None
    wall_seconds: Number | None = None
    evaluations: list[Evaluation] = []
    seconds_per_step: dict[str, Number] = {}
    bytes_up: dict[str, Sent] = {}
    bytes_down: dict[str, Sent] = {}
    client_peak_memory: Memory = Memory()
    client_parameters: dict[str, Integer] = {}
    clients: Clients = Clients()
    privacy: Privacy | None = None
    fingerprint: str = ""
    ledger_digest: str = ""


class ConfigFile(Read):
    """config.json: keys, and where the run ran."""

    config: dict[str, bool | int | float | str | None] = {}
    model_used: str = ""
    task_used: str = ""
    pretrained: bool | None = None
    notice: str = ""
    versions: dict[str, str] = {}
    python: str = ""
    machine: str = ""


class MetricsLine(Read):
    """A line of metrics.jsonl: a step, or an evaluation."""

    step: Integer
    train_loss: Number | None = None
    held_out: Evaluation | None = None
    seconds: dict[str, Number] = {}
    dropped: dict[Integer, str] = {}


class Update(Read):
    """A line of ledger.jsonl; one without scalars is a digest, or weights sent whole."""

    step: Integer | None = None
    scalars: list[Number] = []
    weights: str | None = None
