"""Draw docs/pictures/frontier.svg from docs/results/comparisons/methods/results.csv.

python docs/pictures/frontier.py

The picture shows the gap in held-out loss that each method closes against its client's memory.
tests/test_docs.py fails when the committed picture is not what this writes.
"""

import csv
import math
import statistics
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "comparisons" / "methods" / "results.csv"
CONTROL, REFERENCE = "frozen", "split-fo"
# label, color, and where the label stands relative to the mark
METHODS = {
    "frozen": ("frozen client", "#546e7a", (12, 30)),
    "hosl": ("HOSL", "#6a1b9a", (-10, -14)),
    "ho-sfl": ("HO-SFL", "#c62828", (14, -14)),
    "residual": ("residual feedback", "#00796b", (16, 5)),
    "recompute": ("recompute", "#1565c0", (16, 5)),
    "split-fo": ("back-propagation, AdamW", "#bf360c", (-16, 5)),
}
LEFT, TOP, WIDTH, HEIGHT = 80, 50, 640, 300  # of the axes
MOST_MEMORY, LOWEST, HIGHEST = 4.6, -0.2, 1.2


def points() -> dict[str, tuple[float, float, float]]:
    """Client memory over the frozen client's, gap closed and its standard error, by method."""
    runs: dict[str, list[tuple[float, float]]] = {}
    with RESULTS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            runs.setdefault(row["method"], []).append(
                (float(row["loss"]), float(row["peak_bytes"]))
            )
    zero, one = ([loss for loss, _ in runs[name]] for name in (CONTROL, REFERENCE))
    whole = statistics.fmean(z - o for z, o in zip(zero, one, strict=True))
    memory = sum(peak for _, peak in runs[CONTROL])
    found = {}
    for method in METHODS:
        own = [loss for loss, _ in runs[method]]
        gaps = [(z - o) / whole for z, o in zip(zero, own, strict=True)]  # paired by seed
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        peak = sum(peak for _, peak in runs[method]) / memory
        found[method] = peak, statistics.fmean(gaps), error
    return found


def picture() -> str:
    """The SVG file."""
    marks = "\n".join(_mark(method, *point) for method, point in points().items())
    lines = "\n".join([*map(_level, (0, 0.5, 1)), *map(_tick, (1, 2, 3, 4))])
    listed = ", ".join(f"{METHODS[m][0]} {x:.2f} and {y:.2f}" for m, (x, y, _) in points().items())
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 430" width="760" height="430" role="img" \
aria-labelledby="title desc">
  <title id="title">Share of back-propagation's benefit against client memory</title>
  <desc id="desc">Client memory relative to a frozen client, and gap closed: {listed}.</desc>
  <style>
    text {{ font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1c2830; }}
    .small {{ font-size: 13px; fill: #455a64; }}
    .grid {{ stroke: #cfd8dc; }}
  </style>
  <rect width="760" height="430" rx="10" fill="#fafbfc" stroke="#cfd8dc"/>
  <text x="20" y="30" style="font-weight: 600">\
Gap closed (frozen client = 0, back-propagation = 1)</text>
{lines}
{marks}
  <text x="{LEFT + WIDTH / 2:g}" y="396" text-anchor="middle">\
peak client memory in a step (frozen client = 1)</text>
  <text class="small" x="20" y="418">OPT with 4.3M parameters, cut layer 4 of 6, SST-2, \
held-out loss, mean of 3 seeds with standard error</text>
</svg>
"""


def _x(memory: float) -> float:
    return LEFT + WIDTH * memory / MOST_MEMORY


def _y(gap: float) -> float:
    return TOP + HEIGHT * (HIGHEST - gap) / (HIGHEST - LOWEST)


def _level(gap: float) -> str:
    y = _y(gap)
    return (
        f'  <path class="grid" d="M{LEFT} {y:.1f}h{WIDTH}"/>'
        f'<text x="{LEFT - 10}" y="{y + 5:.1f}" text-anchor="end">{gap:g}</text>'
    )


def _tick(memory: float) -> str:
    x = _x(memory)
    return (
        f'  <path class="grid" d="M{x:.1f} {TOP}v{HEIGHT}"/>'
        f'<text x="{x:.1f}" y="{TOP + HEIGHT + 20}" text-anchor="middle">{memory:g}</text>'
    )


def _mark(method: str, memory: float, gap: float, error: float) -> str:
    label, color, (dx, dy) = METHODS[method]
    x, y, high, low = _x(memory), _y(gap), _y(gap + error), _y(gap - error)
    anchor = "end" if dx < 0 else "start"
    return (
        f'  <g stroke="{color}" fill="{color}"><path d="M{x:.1f} {high:.1f}V{low:.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}" stroke="none" '
        f'style="fill: {color}">{label}</text></g>'
    )


if __name__ == "__main__":
    (HERE / "frontier.svg").write_text(picture(), encoding="utf-8")
