"""Checkpoints on disk: a run at a completed step, whole or not at all.

A checkpoint is a directory `checkpoint-<step>` in the run directory:

    tensors.safetensors   all tensors, by name
    checkpoint.json       {"format", "step", "sha256" of the tensors, "values": all the rest,
                          "values_sha256"}

It is written under another name, synced to disk and renamed; those before it, but for the latest
few, are removed after that. So whatever stops a run, there is a whole checkpoint, the last one or
the one before. None is written, nor read, with values that are not finite.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hosl_flower.errors import CheckpointError, DivergedError
from hosl_flower.system.untrusted_files import parse_json
from hosl_flower.system.whole_files import save_tensors
from hosl_flower.tensors.raw_bytes import not_finite

FORMAT = 1
_NAME = "checkpoint-"
_TENSORS, _VALUES = "tensors.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """step: the last one completed. values: JSON. What they mean is resume.py's business."""

    step: int
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write(run: Path, checkpoint: Checkpoint, kept: int = 1) -> Path:
    """Add a checkpoint to a run directory and remove those before the latest `kept`; where it is.

    Raises OSError when it cannot be written, DivergedError when its values are not finite; what
    was there stays.
    """
    if name := not_finite(checkpoint.tensors):
        raise DivergedError(
            f"no checkpoint of step {checkpoint.step} is written: {name} has values that are not "
            "finite, training has diverged; lower server-learning-rate or client-learning-rate"
        )
    path = run / f"{_NAME}{checkpoint.step}"
    part = run / f".{path.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_tensors(tensors, part / _TENSORS)
        record = {
            "format": FORMAT,
            "step": checkpoint.step,
            "sha256": _sha256(part / _TENSORS),
            "values": checkpoint.values,
            "values_sha256": _digest(checkpoint.values),
        }
        (part / _VALUES).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for written in (part / _TENSORS, part / _VALUES, part):
            sync(written)
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        sync(run)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    before = sorted(own for own in found(run) if own[0] < checkpoint.step)
    for _, other in before[: len(before) - kept + 1]:
        shutil.rmtree(other, ignore_errors=True)
    return path


def read(run: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step in a run directory, by default the latest. CheckpointError when
    there is none, or when it is damaged or of another version."""
    if not run.is_dir():
        raise CheckpointError(f"resume: there is no run directory {run}")
    own = {number: path for number, path in found(run) if step in (None, number)}
    if not own:
        raise CheckpointError(
            f"{run} has no checkpoint to resume from: a run writes them every checkpoint-every "
            "steps, if that is not 0"
        )
    step, path = max(own.items())
    try:
        record = parse_json((path / _VALUES).read_bytes())
        if record["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {record['format']}, this version of hosl-flower reads {FORMAT}"
            )
        whole = record["values_sha256"] == _digest(record["values"])
        if record["step"] != step or not whole or record["sha256"] != _sha256(path / _TENSORS):
            raise ValueError("its parts do not belong together")
        tensors = load_file(path / _TENSORS)
        if name := not_finite(tensors):
            raise ValueError(f"{name} has values that are not finite")
        return Checkpoint(step, record["values"], tensors)
    except (
        OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it, and resume from another if there is one"
        ) from error


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints of a run directory, the latest first."""
    return sorted((step for step, _ in found(run)), reverse=True)


def sync(path: Path) -> None:
    """Have a file's or a directory's contents on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def found(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of all checkpoints of a run directory, whole or not."""
    numbers = ((path.name.removeprefix(_NAME), path) for path in run.glob(f"{_NAME}*"))
    return [(int(number), path) for number, path in numbers if number.isdecimal()]


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
