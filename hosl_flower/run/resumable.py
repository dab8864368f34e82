"""The values of a checkpoint, as a run that goes on from it needs them.

A checkpoint's checksums tell damage; who made the file can make them fit anything. So its values
are checked before a run uses them.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hosl_flower.errors import CheckpointError
from hosl_flower.ledger.ledger import Ledger
from hosl_flower.protocol.messages.base import MOST_MEMORY
from hosl_flower.run.checkpoint import Checkpoint, found
from hosl_flower.run.run_files import MetricsLine
from hosl_flower.system.untrusted_files import check_file, check_tree, parse_json, read_bytes
from hosl_flower.tensors.memory import PHASES

_KEPT = ("config.json", "metrics.jsonl", "ledger.jsonl", "log.txt")
_TRACKED = ("tensorboard", "wandb")  # libraries write there; the rest is replaced, not followed
_MOST_LOG = 1 << 40  # bytes of a file of lines

Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Memory = Annotated[int, Field(ge=0, le=MOST_MEMORY, strict=True)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pairs = list[tuple[Count, Count]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Client(_Part):
    genesis: str
    position: Count
    digest: str
    updates: Count
    private_optimizer: bool


class _Session(_Part):
    batches: Pairs
    took_part: Pairs
    evaluator: Count | None
    unchecked: list[Count]
    checked_at: Count
    dropped: list[tuple[Count, Count, str]]
    drop_counts: Pairs = []
    clipped: Pairs = []
    train_examples: Pairs = []
    retaken: Count = 0


class _Traffic(_Part):
    up: dict[str, tuple[Count, Count]]
    down: dict[str, tuple[Count, Count]]
    waited_seconds: Seconds
    client_seconds: Seconds
    peak_bytes: Memory
    tensor_peaks: Annotated[list[Memory], Field(min_length=len(PHASES), max_length=len(PHASES))]


class _Sizes(BaseModel):
    """Bytes of the files that a run adds to: no others are ever cut."""

    model_config = ConfigDict(extra="forbid")

    metrics: Count = Field(alias="metrics.jsonl")
    ledger: Count = Field(alias="ledger.jsonl")


class _Scored(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    step: Count
    loss: float


class _Report(_Part):
    sizes: _Sizes
    metrics_sha256: str = ""  # older checkpoints have none
    evaluations: list[_Scored]
    seconds: dict[str, Seconds]
    wall_seconds: Seconds


class _Values(_Part):
    task: str
    client: _Client
    session: _Session
    traffic: _Traffic
    report: _Report


def check_values(path: Path, values: Any) -> None:
    """CheckpointError, with the key, unless a checkpoint's values have their types and bounds."""
    try:
        TypeAdapter(_Values).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path}, {where}: {first['msg']}, got {first['input']!r:.80}"
        ) from None


def check_links(directory: Path) -> None:
    """CheckpointError where something that a run writes to or goes on from is not its own, but a
    link out of its directory, say."""
    checkpoints = [path for _, path in found(directory)]
    for entry in directory.iterdir():
        try:
            if entry.name in _KEPT:
                check_file(directory, entry)
            elif entry in checkpoints or (entry.name in _TRACKED and entry.is_symlink()):
                check_tree(directory, entry)
        except OSError as error:  # a link that leads nowhere, too
            raise CheckpointError(f"{entry} cannot be read: {error}") from error


def check_files(directory: Path, checkpoint: Checkpoint) -> None:
    """CheckpointError, with file and line, unless the files that a run adds to begin as they were
    when a checkpoint was written."""
    report, client = checkpoint.values["report"], checkpoint.values["client"]
    metrics, ledger = (
        _beginning(directory / name, checkpoint) for name in ("metrics.jsonl", "ledger.jsonl")
    )
    path = directory / "metrics.jsonl"
    for number, line in enumerate(metrics.splitlines(), 1):
        try:
            MetricsLine.model_validate(parse_json(line))
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number}: not a line that a run wrote") from error
    known = report.get("metrics_sha256")
    if known and hashlib.sha256(metrics).hexdigest() != known:
        raise CheckpointError(
            f"{path}: its first {len(metrics)} bytes are not those that the checkpoint of step "
            f"{checkpoint.step} saw"
        )
    path = directory / "ledger.jsonl"
    found = Ledger.read(path, ledger)
    if (len(found), found.digest()) != (client["position"], client["digest"]):
        raise CheckpointError(
            f"{path}, line {len(ledger.splitlines())}: a digest of position {len(found)}, the "
            f"checkpoint of step {checkpoint.step} has position {client['position']} of another "
            "ledger"
        )


def _beginning(path: Path, checkpoint: Checkpoint) -> bytes:
    size = checkpoint.values["report"]["sizes"][path.name]
    try:
        content = read_bytes(path.parent, path, _MOST_LOG)[:size]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(content) < size:
        raise CheckpointError(
            f"{path} is shorter than when the checkpoint of step {checkpoint.step} was "
            "written: files of the run are damaged or missing"
        )
    return content
