"""What a page shows of a run directory: its files, read with nothing taken for granted.

A run may be old, may have failed, may still be going on. What a file lacks is None or empty here,
and a file that cannot be read is a line in `problems`; only a directory that is no run is an error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from hosl_flower.compare.outcome import DIVERGED, Outcome, outcome
from hosl_flower.errors import CheckpointError, HoslError, printable
from hosl_flower.run.run_files import (
    ConfigFile,
    Evaluation,
    MetricsLine,
    Read,
    ResultsFile,
    Sent,
    Update,
)
from hosl_flower.system.untrusted_files import MOST_BYTES, parse_json, read_bytes

_MOST_PICTURE = 1 << 24  # bytes of partition.png: it goes into the page
_MARKS = ("config.json", "metrics.jsonl", "results.json")  # what only run directories have


class PageError(HoslError):
    """A page cannot be made of what was named, or cannot be written."""


@dataclass(frozen=True)
class Run:
    """One run directory. costs: of a training step, None where they cannot be told. diverged: what
    it said when it did. partition: the PNG of who holds which data."""

    directory: Path
    name: str
    results: ResultsFile
    settings: ConfigFile
    metrics: Sequence[MetricsLine]
    ledger: Sequence[Update]
    finished: bool
    diverged: str
    costs: Outcome | None
    partition: bytes | None
    problems: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """As the run names it, else the strategy it was configured with."""
        return self.results.method or str(self.settings.config.get("strategy", ""))

    @property
    def model(self) -> str:
        """A hub id, or the last part of a local path."""
        name = self.results.model or self.settings.model_used
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def pretrained(self) -> bool | None:
        """None where it is not recorded."""
        known = self.results.pretrained
        return self.settings.pretrained if known is None else known

    @property
    def evaluations(self) -> list[Evaluation]:
        """Of the results, or so far."""
        rows = ((row.step, row.held_out) for row in self.metrics)
        so_far = [held_out.model_copy(update={"step": s}) for s, held_out in rows if held_out]
        return self.results.evaluations or so_far

    @property
    def measure(self) -> str:
        """What the score of its evaluations is."""
        return "F1" if any(e.f1 is not None for e in self.evaluations) else "accuracy"

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss)."""
        return [(r.step, r.train_loss) for r in self.metrics if r.train_loss is not None]

    @property
    def steps_done(self) -> int:
        """The last step there is a line of."""
        return max((row.step for row in self.metrics if row.held_out is None), default=0)

    def total(self, way: dict[str, Sent]) -> int | None:
        """Bytes of all kinds; None where none are recorded."""
        return sum(sent.bytes for sent in way.values()) if way else None

    @property
    def over_forward(self) -> float | None:
        """Peak tensor bytes of a training step over those of a forward pass."""
        forward = self.results.client_peak_memory.tensor_bytes.get("forward", 0)
        return self.costs.peak_bytes / forward if self.costs and forward > 0 else None


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in these directories, each once, under names that tell them apart."""
    paths = run_directories(directories)
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [_read(path, printable("/".join(path.parts[-depth:]))) for path in paths]


def run_directories(directories: Sequence[Path]) -> list[Path]:
    """Their absolute paths, each once.

    Raises:
        PageError: where one is no run directory.
    """
    paths = list(dict.fromkeys(path.expanduser().absolute() for path in directories))
    for path in paths:
        _check(path)
    return paths


def _check(path: Path) -> None:
    if _is_run(path):
        return
    found, hint = "no such directory", "name the directory that a run names at its end"
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir())
        runs = [name for name in inside if _is_run(path / name)]
        some = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
        found = f"found {some or 'nothing'}"
        if runs:
            hint = f"name the runs in it, e.g. {path / runs[0]}"
        elif _is_run(path.parent):
            hint = f"name the run it is in, {path.parent}"
    elif path.exists():
        found, hint = "found a file", "name the directory it is in"
    raise PageError(f"{path} is no run directory: expected {', '.join(_MARKS)}; {found}; {hint}")


def _is_run(path: Path) -> bool:
    marks = [name for name in _MARKS if (path / name).is_file()]
    if marks == ["config.json"]:  # a model has one too
        problems: list[str] = []
        return b'"model_type"' not in (_content(path / "config.json", problems) or b"")
    return bool(marks)


def _read(path: Path, name: str) -> Run:
    problems: list[str] = []
    results = _document(path / "results.json", ResultsFile, problems)
    settings = _document(path / "config.json", ConfigFile, problems)
    diverged = _content(path / DIVERGED, problems) if (path / DIVERGED).exists() else None
    picture = path / "partition.png"
    return Run(
        directory=path,
        name=name,
        results=results or ResultsFile(),
        settings=settings or ConfigFile(),
        metrics=_lines(path / "metrics.jsonl", MetricsLine, problems),
        ledger=_lines(path / "ledger.jsonl", Update, problems),
        finished=results is not None and diverged is None,
        diverged="" if diverged is None else diverged.decode(errors="replace").strip(),
        costs=_costs(path) if results and settings else None,
        partition=_content(picture, problems, _MOST_PICTURE) if picture.exists() else None,
        problems=problems,
    )


def _content(path: Path, problems: list[str], most: int = MOST_BYTES) -> bytes | None:
    """A file's; None, and a line about it, where it cannot be read."""
    try:
        return read_bytes(path.parent, path, most)
    except FileNotFoundError:
        problems.append(f"There is no {path.name}.")
    except (OSError, CheckpointError) as error:
        problems.append(f"{path.name} cannot be read: {error}.")
    return None


def _costs(path: Path) -> Outcome | None:
    """What a step costs, as comparisons count it; results of other versions may not say."""
    try:
        found = outcome(path, target=0)
        amounts = (found.bytes_up, found.bytes_down, found.forwards, found.peak_bytes)
        return found if all(map(math.isfinite, amounts)) else None
    except (
        HoslError,
        OSError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
    ):
        return None


_Model = TypeVar("_Model", bound=Read)


def _document(path: Path, model: type[_Model], problems: list[str]) -> _Model | None:
    content = _content(path, problems)
    if content is None:
        return None
    try:
        return model.model_validate(parse_json(content))
    except ValueError as error:  # of json, and of pydantic
        problems.append(f"{path.name} cannot be read: {_reason(error)}.")
    return None


def _lines(path: Path, model: type[_Model], problems: list[str]) -> list[_Model]:
    """The lines up to one that is damaged, as the last of a run that was killed may be."""
    rows: list[_Model] = []
    try:
        for line in (_content(path, problems) or b"").splitlines():
            rows.append(model.model_validate(parse_json(line)))
    except ValueError as error:
        problems.append(f"{path.name} is read up to line {len(rows)} only: {_reason(error)}.")
    return rows


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}".removeprefix(": ")
    return str(error)
