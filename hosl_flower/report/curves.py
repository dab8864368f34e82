"""Loss and accuracy against steps, bytes, client forwards and time; projected gradients."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hosl_flower.report.html import Html
from hosl_flower.report.runs import Run
from hosl_flower.report.svg import colour, dashes, figure, to_svg

_SMOOTH = 20  # steps in the moving average of the training loss
_POINTS = 250  # of a line, at most: more than a figure of this width shows
_WINDOWS = 60  # in which projected gradients are counted
_LARGEST = 3.5e38  # no scalar of a ledger, which are float32, is larger
_SIZE = (5.4, 3.3)
_MARGINS = {"left": 0.125, "right": 0.95, "bottom": 0.15, "top": 0.97}


@dataclass(frozen=True)
class Axis:
    """What a curve is drawn against. of: a run's value after a step, or None where a run does not
    tell."""

    key: str
    label: str
    of: Callable[[Run], Callable[[int], float] | None]


def _per_step(cost: str, scale: float) -> Callable[[Run], Callable[[int], float] | None]:
    def of(run: Run) -> Callable[[int], float] | None:
        if run.costs is None:
            return None
        each = sum(getattr(run.costs, part) for part in cost.split("+")) * scale
        return (lambda step: step * each) if each > 0 else None

    return of


def _seconds(run: Run) -> Callable[[int], float] | None:
    at, total = {0: 0.0}, 0.0
    for row in run.metrics:
        if "total" in row.seconds:
            total += row.seconds["total"]
            at[row.step] = total
    return (lambda step: at.get(step, math.nan)) if total > 0 else None


AXES = (
    Axis("steps", "steps", lambda run: float),
    Axis("bytes", "MB up and down", _per_step("bytes_up+bytes_down", 1e-6)),
    Axis("forwards", "client forwards", _per_step("forwards", 1.0)),
    Axis("time", "seconds of training", _seconds),
)


def missing(runs: Sequence[Run], axis: Axis) -> list[str]:
    """Names of the runs that cannot be drawn against this."""
    return [run.name for run in runs if axis.of(run) is None]


def draw_losses(runs: Sequence[Run], axis: Axis) -> Html:
    """Held-out loss with marks, and the training loss as a moving mean."""

    def also(axes: Axes, run: Run, scale: Callable[[int], float], place: int) -> None:
        points = thinned(smoothed(run.losses))
        xs = [scale(step) for step, _ in points]
        axes.plot(xs, [loss for _, loss in points], color=colour(place), alpha=0.35, linewidth=1)

    return _draw(runs, axis, "loss", also)


def measured(runs: Sequence[Run]) -> str:
    """What the scores of the runs are."""
    return " or ".join(sorted({run.measure for run in runs}, reverse=True))


def draw_scores(runs: Sequence[Run], axis: Axis) -> Html:
    """Held-out accuracy, over a line at that of the majority class; F1 of generated answers."""

    def also(axes: Axes, run: Run, scale: Callable[[int], float], place: int) -> None:
        if run.results.majority_accuracy is not None:
            accuracy = run.results.majority_accuracy
            axes.axhline(accuracy, color="grey", linestyle=":", linewidth=1)

    return _draw(runs, axis, "score", also, measured(runs))


def _draw(
    runs: Sequence[Run],
    axis: Axis,
    what: str,
    also: Callable[[Axes, Run, Callable[[int], float], int], None],
    label: str = "",
) -> Html:
    """what: of an evaluation, shown under its label."""
    label = label or what
    said = []
    with figure(*_SIZE, _MARGINS) as drawn:
        axes = drawn.add_subplot()
        ends = []
        for place, run in enumerate(runs):
            scale = axis.of(run)
            if scale is None:
                continue
            also(axes, run, scale, place)
            xs = [scale(e.step) for e in run.evaluations]
            ys = [getattr(e, what) for e in run.evaluations]
            axes.plot(
                xs,
                ys,
                marker="o",
                markersize=4,
                color=colour(place),
                linestyle=dashes(place),
                linewidth=1.8,
            )
            if ys:
                ends.append(max(xs))
                said.append(f"{run.name} {ys[0]:.3g} to {ys[-1]:.3g}")
        axes.set(xlabel=axis.label, ylabel=f"held-out {label}")
        if len(ends) > 1 and 0 < 30 * min(ends) < max(ends):  # from kilobytes to gigabytes
            axes.set_xscale("symlog", linthresh=min(ends) / 2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        elif axis is AXES[0]:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid()
        description = f"Held-out {label} against {axis.label}: {'; '.join(said) or 'nothing'}"
        return to_svg(drawn, f"{what}-{axis.key}", description)


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value with up to as many before it, averaged."""
    values = [value for _, value in points]
    windows = (values[max(0, end - _SMOOTH) : end] for end in range(1, len(values) + 1))
    return [
        (step, sum(window) / len(window)) for (step, _), window in zip(points, windows, strict=True)
    ]


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every so many of many points, with the last."""
    stride = math.ceil(len(points) / _POINTS) or 1
    return [*points[:-1:stride], *points[-1:]]


@dataclass(frozen=True)
class Spread:
    """Projected gradients in one window of steps."""

    step: float
    low: float
    quarter: float
    median: float
    three_quarters: float
    high: float


def spreads(run: Run) -> list[Spread]:
    """5, 25, 50, 75 and 95 % of the scalars in the ledger, window by window; [] without any."""
    rows = [(update.step, update.scalars) for update in run.ledger if update.scalars]
    known = [(step, scalars) for step, scalars in rows if step is not None]
    size = math.ceil(len(known) / _WINDOWS) or 1
    found = []
    for start in range(0, len(known), size):
        window = known[start : start + size]
        values = [v for _, scalars in window for v in scalars if abs(v) <= _LARGEST]
        if not values:
            continue
        cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else []
        picked = [cuts[i] for i in (0, 4, 9, 14, 18)] if cuts else values * 5
        found.append(Spread(statistics.fmean(step for step, _ in window), *picked))
    return found


def draw_scalars(run: Run, place: int, found: Sequence[Spread]) -> Html:
    """Bands of the projected gradients over the steps of one run."""
    xs = [spread.step for spread in found]
    with figure(*_SIZE, _MARGINS) as drawn:
        axes = drawn.add_subplot()
        for low, high, alpha in (("low", "high", 0.2), ("quarter", "three_quarters", 0.35)):
            below, above = ([getattr(s, edge) for s in found] for edge in (low, high))
            axes.fill_between(xs, below, above, alpha=alpha, color=colour(place), linewidth=0)
        axes.plot(xs, [s.median for s in found], color=colour(place), linewidth=1.4)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xlabel="steps", ylabel="projected gradient")
        axes.grid()
        first, last = found[0], found[-1]
        description = (
            f"Projected gradients of {run.name}: nine in ten between {first.low:.3g} and "
            f"{first.high:.3g} at first, {last.low:.3g} and {last.high:.3g} in the end"
        )
        return to_svg(drawn, f"scalars-{place}", description)
