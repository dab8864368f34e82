"""What the cells of an experiment amount to: one row per variant and method, over seeds."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosl_flower.cells import CellError, is_diverged
from hosl_flower.experiment import Cell, Experiment

# Client forward passes of one mini-batch that a request costs, as implemented: P directions per
# local step. A backward pass counts as two forwards, and the first-order client runs its forward
# again for the graph.
_FORWARDS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "forward": lambda keys: 1,
    "probe": lambda keys: 1,
    "cut-gradient": lambda keys: _linear(keys),
    "local-train": lambda keys: _linear(keys),
    "head-probe": lambda keys: keys["local-steps"] * (keys["directions"] + 1),
    "backward": lambda keys: 3,
    "local-step": lambda keys: 3,
}
_UPDATES = ("losses", "catch-up", "restore", "fetch", "adopt")


def _linear(keys: Mapping[str, Any]) -> int:
    """Of E local steps on <lambda, f_c>: the first knows the clean value, unless activations come
    in micro-batches and are not kept."""
    known = not keys["client-micro-batch"]
    return keys["local-steps"] * (keys["directions"] + 1) - known


@dataclass(frozen=True)
class Outcome:
    """One finished run, training alone: bytes and forwards of evaluations are left out.

    forwards: client forward-equivalents per step, of all its clients together. curve: (step, loss,
    accuracy) of the evaluations. to_target: steps until the accuracy was first there, or None.
    """

    accuracy: float
    loss: float
    balanced_accuracy: float
    bytes_up: float
    bytes_down: float
    forwards: float
    peak_bytes: int
    server_seconds: float
    client_seconds: float
    step_seconds: float
    wall_seconds: float
    to_target: int | None
    curve: tuple[tuple[int, float, float], ...]


def outcome(directory: Path, target: float) -> Outcome:
    """Read a run directory."""
    if is_diverged(directory):
        raise CellError(f"{directory} diverged: choose another learning rate for it")
    results = json.loads((directory / "results.json").read_text())
    keys = json.loads((directory / "config.json").read_text())["config"]
    steps = results["steps"]
    sent = {kind: way["messages"] for kind, way in results["bytes_up"].items()}
    training = [k for k in results["bytes_up"] if k in _FORWARDS or k in _UPDATES]
    up, down = (
        sum(results[way][kind]["bytes"] for kind in training if kind in results[way]) / steps
        for way in ("bytes_up", "bytes_down")
    )
    seconds, peaks = results["seconds_per_step"], results["client_peak_memory"]["tensor_bytes"]
    curve = tuple((e["step"], e["loss"], e["accuracy"]) for e in results["evaluations"])
    return Outcome(
        accuracy=results["accuracy"],
        loss=results["loss"],
        balanced_accuracy=results["balanced_accuracy"],
        bytes_up=up,
        bytes_down=down,
        forwards=sum(n * _FORWARDS[k](keys) for k, n in sent.items() if k in _FORWARDS) / steps,
        peak_bytes=max(n for phase, n in peaks.items() if phase not in ("load", "evaluate")),
        server_seconds=seconds["server"],
        client_seconds=seconds["client"],
        step_seconds=seconds["total"],
        wall_seconds=results["wall_seconds"],
        to_target=next((step for step, _, acc in curve if target and acc >= target), None),
        curve=curve,
    )


@dataclass(frozen=True)
class Row:
    """A method in a variant: its runs, and the share of the gap between the control and the
    reference that its loss and its accuracy close (None without a gap to speak of)."""

    variant: str
    method: str
    runs: Sequence[Outcome]
    gap_loss: tuple[float, float] | None
    gap_accuracy: tuple[float, float] | None

    def mean(self, field: str) -> float:
        """Over seeds."""
        return statistics.fmean(getattr(run, field) for run in self.runs)

    def spread(self, field: str) -> float:
        """Standard deviation over seeds; 0 of one."""
        return _spread([getattr(run, field) for run in self.runs])


def rows(experiment: Experiment, cells: Iterable[Cell], out: Path) -> list[Row]:
    """One row per variant and method, in the order of the file."""
    runs: dict[tuple[str, str], list[Outcome]] = {}
    for cell in cells:
        found = outcome(out / cell.name, experiment.target_accuracy)
        runs.setdefault((cell.variant, cell.method), []).append(found)
    table = []
    for variant in experiment.variants:
        zero, one = (
            runs.get((variant, name)) for name in (experiment.control, experiment.reference)
        )
        for method in experiment.methods:
            own = runs[variant, method]
            gaps = [_gap(own, zero, one, field) for field in ("loss", "accuracy")]
            table.append(Row(variant, method, own, *gaps))
    return table


def _gap(
    own: Sequence[Outcome],
    zero: Sequence[Outcome] | None,
    one: Sequence[Outcome] | None,
    field: str,
) -> tuple[float, float] | None:
    """Mean and standard error of (zero - own) / (zero - one).

    Differences are paired by seed, since the runs of one seed share data order and held-out
    examples; they are divided by the mean of zero - one. None where that is not beyond twice its
    standard error: there is nothing to close.
    """
    if zero is None or one is None:
        return None
    whole = [getattr(z, field) - getattr(o, field) for z, o in zip(zero, one, strict=True)]
    if len(whole) < 2:
        return None
    error = _spread(whole) / math.sqrt(len(whole))
    mean = statistics.fmean(whole)
    if abs(mean) <= 2 * error or mean == 0:
        return None
    parts = [(getattr(z, field) - getattr(o, field)) / mean for z, o in zip(zero, own, strict=True)]
    return statistics.fmean(parts), _spread(parts) / math.sqrt(len(parts))


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


COLUMNS = (
    "accuracy", "loss", "gap closed (loss)", "gap closed (accuracy)", "kB up", "kB down",
    "client forwards", "client peak MiB", "server s", "client s", "run s",
)  # fmt: skip


def _cells_of(row: Row) -> list[str]:
    def both(field: str, digits: int) -> str:
        return f"{row.mean(field):.{digits}f} +- {row.spread(field):.{digits}f}"

    def gap(value: tuple[float, float] | None) -> str:
        return "" if value is None else f"{value[0]:.2f} +- {value[1]:.2f}"

    return [
        both("accuracy", 4),
        both("loss", 4),
        gap(row.gap_loss),
        gap(row.gap_accuracy),
        f"{row.mean('bytes_up') / 1e3:.1f}",
        f"{row.mean('bytes_down') / 1e3:.1f}",
        f"{row.mean('forwards'):.1f}",
        f"{row.mean('peak_bytes') / 2**20:.1f}",
        f"{row.mean('server_seconds'):.4f}",
        f"{row.mean('client_seconds'):.4f}",
        f"{row.mean('wall_seconds'):.0f}",
    ]


def _to_target(row: Row) -> list[str]:
    """steps, MB and seconds of training until the target accuracy, as the mean over the seeds that
    came there, and how many did."""
    there = [run for run in row.runs if run.to_target is not None]
    if not there:
        return ["never", "", ""]
    steps = statistics.fmean(run.to_target or 0 for run in there)
    bytes_ = statistics.fmean((r.to_target or 0) * (r.bytes_up + r.bytes_down) for r in there)
    seconds = statistics.fmean((r.to_target or 0) * r.step_seconds for r in there)
    share = "" if len(there) == len(row.runs) else f" ({len(there)} of {len(row.runs)})"
    return [f"{steps:.0f}{share}", f"{bytes_ / 1e6:.1f}", f"{seconds:.1f}"]


def markdown(experiment: Experiment, table: Sequence[Row]) -> str:
    """The main table, one per variant."""
    seeds = len(experiment.seeds)
    goal = experiment.target_accuracy
    reach = ["steps", "MB", "s"] if goal else []
    head = ["method", *COLUMNS, *(f"{what} to {goal:g}" for what in reach)]
    lines = [
        f"Final held-out figures, mean +- standard deviation over {seeds} seed(s); gap closed with "
        f"its standard error: 0 is {experiment.control or 'no control'}, 1 is "
        f"{experiment.reference or 'no reference'}, empty where the two do not differ by more than "
        "twice its standard error. Bytes, forwards (a backward pass counts as two) and seconds are "
        "per training step, of all clients together.",
    ]
    for variant in experiment.variants:
        title = f"### {variant}" if variant else ""
        lines += ["", *([title, ""] if title else []), f"| {' | '.join(head)} |"]
        lines.append("|---" * len(head) + "|")
        for row in table:
            if row.variant == variant:
                own = [row.method, *_cells_of(row), *(_to_target(row) if goal else [])]
                lines.append(f"| {' | '.join(own)} |")
    return "\n".join(lines) + "\n"


def csv_text(experiment: Experiment, cells: Sequence[Cell], out: Path) -> str:
    """One line per run, figures as they are."""
    fields = [f for f in Outcome.__dataclass_fields__ if f != "curve"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "method", "seed", *fields])
    for cell in cells:
        found = outcome(out / cell.name, experiment.target_accuracy)
        writer.writerow(
            [cell.variant, cell.method, cell.seed, *(getattr(found, f) for f in fields)]
        )
    return text.getvalue()
