"""The files of a run directory, as far as a page needs them: old runs and other versions too."""

from typing import Any

from pydantic import BaseModel, ConfigDict

_NAN = float("nan")


class Read(BaseModel):
    """A part of a file: keys that are not known are passed over, none is required that may lack."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Evaluation(Read):
    """Held-out figures after a step."""

    step: int = 0
    loss: float = _NAN
    accuracy: float = _NAN
    exact_match: float | None = None
    f1: float | None = None

    @property
    def score(self) -> float:
        """Accuracy, or F1 of generated answers."""
        return self.accuracy if self.f1 is None else self.f1


class Sent(Read):
    """Of one kind of request, one way."""

    messages: int = 0
    bytes: int = 0


class Memory(Read):
    """Peaks of the client that needed most: its process, its tensors by phase."""

    bytes: int | None = None
    tensor_bytes: dict[str, int] = {}


class Dropped(Read):
    """A client that was left out of a step."""

    step: int
    partition: int
    reason: str = ""


class Clients(Read):
    """Who was there."""

    number: int | None = None
    steps_taken_part: dict[int, int] = {}
    dropped: list[Dropped] = []


class Privacy(Read):
    """What differential privacy has cost, by client."""

    epsilon: dict[str, float] = {}
    delta: float | None = None
    simulated: bool = False


class ResultsFile(Read):
    """results.json, as far as a page needs it."""

    method: str = ""
    model: str = ""
    task: str = ""
    pretrained: bool | None = None
    notice: str = ""
    seed: int | None = None
    steps: int | None = None
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    majority_accuracy: float | None = None
    exact_match: float | None = None
    f1: float | None = None
    loss: float | None = None
    held_out_examples: int | None = None
    wall_seconds: float | None = None
    evaluations: list[Evaluation] = []
    seconds_per_step: dict[str, float] = {}
    bytes_up: dict[str, Sent] = {}
    bytes_down: dict[str, Sent] = {}
    client_peak_memory: Memory = Memory()
    client_parameters: dict[str, int] = {}
    clients: Clients = Clients()
    privacy: Privacy | None = None
    fingerprint: str = ""
    ledger_digest: str = ""


class ConfigFile(Read):
    """config.json: keys, and where the run ran."""

    config: dict[str, Any] = {}
    model_used: str = ""
    task_used: str = ""
    pretrained: bool | None = None
    notice: str = ""
    versions: dict[str, str] = {}
    python: str = ""
    machine: str = ""


class Measured(Read):
    """A line of metrics.jsonl: a step, or an evaluation."""

    step: int
    train_loss: float | None = None
    held_out: Evaluation | None = None
    seconds: dict[str, float] = {}
    dropped: dict[int, str] = {}


class Update(Read):
    """A line of ledger.jsonl; one without scalars is a digest, or weights sent whole."""

    step: int | None = None
    scalars: list[float] = []
    weights: str | None = None
