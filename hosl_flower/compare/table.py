"""What the cells of an experiment amount to: one row per variant and method, over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hosl_flower.compare.experiment_file import Cell, Experiment
from hosl_flower.compare.outcome import Outcome, outcome


@dataclass(frozen=True)
class Row:
    """A method in a variant: its runs, the share of the gap between the control and the reference
    that its loss and its score close (None without a gap to speak of), and its client's peak
    memory over the control's, which only infers, in a step and with the exchange of weights (None
    without a control)."""

    variant: str
    method: str
    runs: Sequence[Outcome]
    gap_loss: tuple[float, float] | None
    gap_score: tuple[float, float] | None
    memory: float | None
    exchange_memory: float | None

    @property
    def measure(self) -> str:
        """What the score is."""
        return self.runs[0].measure

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
            loss, score = (_gap(own, zero, one, field) for field in ("loss", own[0].measure))
            memory = (_memory(own, zero, f) for f in ("peak_bytes", "exchange_peak_bytes"))
            table.append(Row(variant, method, own, loss, score, *memory))
    return table


def _memory(own: Sequence[Outcome], zero: Sequence[Outcome] | None, field: str) -> float | None:
    if zero is None:
        return None
    return sum(getattr(run, field) for run in own) / sum(run.peak_bytes for run in zero)


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


_COLUMNS = (
    "loss", "gap closed (loss)", "gap closed ({score})", "kB up", "kB down",
    "client forwards", "client peak MiB", "over control", "with exchange", "server s", "client s",
    "run s",
)  # fmt: skip
_SCORES = {"accuracy": ("accuracy",), "f1": ("F1", "exact match")}


def _columns(measure: str) -> list[str]:
    scores = _SCORES[measure]
    return [*scores, *(column.format(score=scores[0]) for column in _COLUMNS)]


def _cells_of(row: Row) -> list[str]:
    def both(field: str, digits: int) -> str:
        return f"{row.mean(field):.{digits}f} +- {row.spread(field):.{digits}f}"

    def gap(value: tuple[float, float] | None) -> str:
        return "" if value is None else f"{value[0]:.2f} +- {value[1]:.2f}"

    return [
        both(row.measure, 4),
        *([both("exact_match", 4)] if row.measure == "f1" else []),
        both("loss", 4),
        gap(row.gap_loss),
        gap(row.gap_score),
        f"{row.mean('bytes_up') / 1e3:.1f}",
        f"{row.mean('bytes_down') / 1e3:.1f}",
        f"{row.mean('forwards'):.1f}",
        f"{row.mean('peak_bytes') / 2**20:.1f}",
        "" if row.memory is None else f"{row.memory:.2f}",
        "" if row.exchange_memory is None else f"{row.exchange_memory:.2f}",
        f"{row.mean('server_seconds'):.4f}",
        f"{row.mean('client_seconds'):.4f}",
        f"{row.mean('wall_seconds'):.0f}",
    ]


def _to_target(row: Row) -> list[str]:
    """steps, MB and seconds of training until the target score, as the mean over the seeds that
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
    lines = [
        f"Final held-out figures, mean +- standard deviation over {seeds} seed(s); gap closed with "
        f"its standard error, paired by seed: 0 is {experiment.control or 'no control'}, 1 is "
        f"{experiment.reference or 'no reference'}, empty where the two do not differ by more than "
        f"twice its standard error.{_interval(seeds)} Bytes, forwards (a backward pass counts as "
        "two) and seconds are per training step, of all clients together. Client peak: of tensors "
        "in a step, over the control's; with exchange: the exchange of weights, every local-steps, "
        "included.",
    ]
    for variant in experiment.variants:
        title = f"### {variant}" if variant else ""
        measure = next(row.measure for row in table if row.variant == variant)
        head = ["method", *_columns(measure), *(f"{what} to {goal:g}" for what in reach)]
        lines += ["", *([title, ""] if title else []), f"| {' | '.join(head)} |"]
        lines.append("|---" * len(head) + "|")
        for row in table:
            if row.variant == variant:
                own = [row.method, *_cells_of(row), *(_to_target(row) if goal else [])]
                lines.append(f"| {' | '.join(own)} |")
    return "\n".join(lines) + "\n"


def _interval(seeds: int) -> str:
    """The width of a 95 % interval of a mean over so few seeds, by Student's t distribution."""
    factor = {2: 12.7, 3: 4.3, 4: 3.2, 5: 2.8}.get(seeds)
    return f" A 95 % interval of {seeds} seeds is +-{factor} standard errors." if factor else ""


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
