"""The pictures of a comparison: curves against steps, bytes and client forwards; the frontier."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a server has no display

from matplotlib import pyplot

from hosl_flower.compare.outcome import Outcome
from hosl_flower.compare.table import Row
from hosl_flower.run.figures import write_picture

_BYTES = "MB up and down"
_AXES: tuple[tuple[str, Callable[[Outcome, int], float]], ...] = (
    ("step", lambda run, step: step),
    (_BYTES, lambda run, step: step * (run.bytes_up + run.bytes_down) / 1e6),
    ("client forward-equivalents", lambda run, step: step * run.forwards),
)

_MARKS = "osD^vP*Xph"


def draw_comparison(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Held-out loss and score of one variant's methods, mean over seeds with its range."""
    figure, grid = pyplot.subplots(2, len(_AXES), figsize=(15, 8), layout="constrained")
    figure.suptitle(title)
    for column, (label, scale) in enumerate(_AXES):
        for place, (what, index) in enumerate((("loss", 1), (rows[0].measure, 2))):
            axes = grid[place][column]
            for number, row in enumerate(rows):
                _draw(axes, row, scale, index, number)
            axes.set(xlabel=label, ylabel=f"held-out {what}")
            if label == _BYTES:  # from kilobytes to gigabytes, and a start at none
                axes.set_xscale("symlog", linthresh=1.0)
            axes.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    try:
        write_picture(figure, path, dpi=110)
    finally:
        pyplot.close(figure)


def _draw(
    axes: pyplot.Axes, row: Row, scale: Callable[[Outcome, int], float], index: int, number: int
) -> None:
    points = list(zip(*(run.curve for run in row.runs), strict=True))
    run = row.runs[0]
    xs = [scale(run, at[0][0]) for at in points]
    if max(xs) <= 0:  # nothing crosses the network
        return
    values = [[one[index] for one in at] for at in points]
    style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
    axes.plot(xs, [statistics.fmean(v) for v in values], label=row.method, **style)
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(xs, low, high, alpha=0.12, color=style["color"], linewidth=0)


def draw_frontier(path: Path, title: str, rows: Sequence[Row]) -> None:
    """How much of first order's benefit in how much client memory: one mark per method. Nothing is
    drawn where control and reference leave no gap."""
    marks = [
        (row.method, row.memory, *row.gap_loss)
        for row in rows
        if row.gap_loss is not None and row.memory is not None
    ]
    if not marks:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (method, memory, gap, error) in enumerate(marks):
        style = {"fmt": _MARKS[number % len(_MARKS)], "color": f"C{number % 10}"}
        axes.errorbar(memory, gap, yerr=error, capsize=3, label=method, **style)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        title=title,
        xlabel="client peak memory in a step, over the control's",
        ylabel="gap closed (held-out loss), with standard error",
    )
    figure.legend(loc="outside right upper")  # methods that learn nothing lie on one another
    axes.grid(alpha=0.3)
    try:
        write_picture(figure, path, dpi=110)
    finally:
        pyplot.close(figure)
