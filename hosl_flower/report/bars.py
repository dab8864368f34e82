"""Bars of memory and bytes, run beside run; and who took part when."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from hosl_flower.errors import printable
from hosl_flower.report.html import Html, megabytes
from hosl_flower.report.participation import Participation
from hosl_flower.report.runs import Run
from hosl_flower.report.svg import BAD, colour, figure, to_svg

_BINS = 150  # columns of a timeline, at most
_MOST_ROWS = 40  # phases or kinds of message that are drawn
_MOST_LABEL = 40  # characters
_WIDTH = 5.6  # inches, of which two stand side by side on a wide screen


@dataclass(frozen=True)
class Bar:
    """first and second are drawn end to end, the second paler."""

    first: float
    second: float
    text: str


def draw_bars(
    name: str,
    label: str,
    groups: Sequence[str],
    bars: Sequence[Sequence[Bar | None]],
    description: str,
) -> Html:
    """bars: [runs][groups], drawn from the top down; None where there is nothing to draw."""
    rows, ticks, at = [], [], 0.0
    for group in range(len(groups)):  # only what there is takes room
        own = [(place, row[group]) for place, row in enumerate(bars) if row[group] is not None]
        rows += [(at + n, place, bar) for n, (place, bar) in enumerate(own) if bar]
        ticks.append(at + (len(own) - 1) / 2)
        at += len(own) + 0.7
    with figure(_WIDTH, 0.7 + 0.17 * at) as drawn:
        axes = drawn.add_subplot()
        for y, place, bar in rows:
            axes.barh(y, bar.first, color=colour(place))
            axes.barh(y, bar.second, left=bar.first, color=colour(place), alpha=0.45)
            end = (bar.first + bar.second, y)
            axes.annotate(
                bar.text,
                end,
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        axes.set_yticks(ticks, [printable(group, _MOST_LABEL) for group in groups])
        axes.set(xlabel=label, ylim=(at - 1.2, -0.5 - 0.2))
        longest = max(bar.first + bar.second for _, _, bar in rows)
        axes.set_xlim(0, 1.45 * (longest or 1))  # room for the texts
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        return to_svg(drawn, name, description)


def memory_phases(runs: Sequence[Run]) -> list[str]:
    """The phases that happened in any of the runs, in the order they are recorded."""
    peaks = [run.results.client_peak_memory.tensor_bytes for run in runs]
    phases = dict.fromkeys(phase for own in peaks for phase in own)
    happened = [phase for phase in phases if any(own.get(phase, 0) > 0 for own in peaks)]
    return happened[:_MOST_ROWS]


def draw_memory(runs: Sequence[Run], phases: Sequence[str]) -> Html:
    """Peak of a client's tensors by phase; each bar says how many times that of
    the same run's forward pass it is."""

    def bar(run: Run, phase: str) -> Bar | None:
        peaks = run.results.client_peak_memory.tensor_bytes
        size, forward = peaks.get(phase, 0), peaks.get("forward", 0)
        if size <= 0:
            return None
        times = f" = {size / forward:.2f} x" if forward > 0 else ""
        return Bar(size / 2**20, 0.0, f"{size / 2**20:.1f}{times}")

    bars = [[bar(run, phase) for phase in phases] for run in runs]
    said = [
        f"{run.name} {run.over_forward:.2f} times its forward pass"
        for run in runs
        if run.over_forward
    ]
    description = f"Client peak memory in a training step: {'; '.join(said) or 'not recorded'}"
    return draw_bars("memory", "MiB, and times its forward pass", phases, bars, description)


def message_kinds(runs: Sequence[Run]) -> list[str]:
    """Kinds of request in any of the runs, those with most bytes first."""
    sizes: dict[str, int] = {}
    for run in runs:
        for way in (run.results.bytes_up, run.results.bytes_down):
            for kind, sent in way.items():
                sizes[kind] = sizes.get(kind, 0) + sent.bytes
    return sorted(sizes, key=lambda kind: -sizes[kind])[:_MOST_ROWS]


def draw_bytes(runs: Sequence[Run], kinds: Sequence[str]) -> Html:
    """Bytes of a whole run by kind of request, up and, paler, down."""

    def bar(run: Run, kind: str) -> Bar | None:
        up, down = (way.get(kind) for way in (run.results.bytes_up, run.results.bytes_down))
        if up is None and down is None:
            return None
        first, second = (sent.bytes / 1e6 if sent else 0.0 for sent in (up, down))
        return Bar(
            first, second, " + ".join(megabytes(sent.bytes if sent else 0) for sent in (up, down))
        )

    bars = [[bar(run, kind) for kind in kinds] for run in runs]
    totals = (
        f"{run.name} {(run.total(run.results.bytes_up) or 0) / 1e6:.1f} MB up and "
        f"{(run.total(run.results.bytes_down) or 0) / 1e6:.1f} MB down"
        for run in runs
    )
    return draw_bars("bytes", "MB up + down", kinds, bars, f"Bytes sent: {'; '.join(totals)}")


def shares(found: Participation) -> list[list[float]]:
    """[clients][bins]: in what share of the steps of a bin a client took part."""
    drawn = found.drawn or []
    bins = min(len(drawn), _BINS)
    table = [[0.0] * bins for _ in range(found.number)]
    sizes = [0] * bins
    places = [step * bins // len(drawn) for step in range(len(drawn))]
    for place, clients in zip(places, drawn, strict=True):
        sizes[place] += 1
        for client in clients:
            table[client][place] += 1
    return [[n / size for n, size in zip(row, sizes, strict=True)] for row in table]


def draw_participation(title: str, place: int, found: Participation) -> Html:
    """Clients against steps: took part, or was left out (a cross); beside it, steps in all."""
    red, green, blue = to_rgb(colour(place))
    height = min(6.0, max(1.7, 0.9 + 0.2 * found.number))
    with figure(_WIDTH, height) as drawn:
        left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        if found.drawn:
            cells = [[(red, green, blue, share) for share in row] for row in shares(found)]
            extent = (0.5, found.steps + 0.5, found.number - 0.5, -0.5)
            left.imshow(cells, aspect="auto", interpolation="nearest", extent=extent)
        crosses = sorted({(d.step, d.partition) for d in found.drops if d.partition < found.number})
        left.plot([s for s, _ in crosses], [c for _, c in crosses], "x", color=BAD)
        left.set(xlabel="steps", ylabel="client", xlim=(0.5, found.steps + 0.5))
        totals = [found.totals.get(client, 0) for client in range(found.number)]
        right.barh(range(found.number), totals, color=colour(place), alpha=0.8)
        right.set(xlabel="steps in all", ylim=(found.number - 0.5, -0.5))
        left.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        left.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        description = (
            f"{title}: {found.number} clients took part in {min(totals)} to {max(totals)} of "
            f"{found.steps} steps; {found.times} times one was left out"
        )
        return to_svg(drawn, f"clients-{place}", description)
