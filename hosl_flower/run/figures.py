"""The pictures of a run directory: its learning curve, and who holds which data."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hosl_flower.errors import printable
from hosl_flower.system.whole_files import put

_MOST_TEXT = 100  # characters
_SMOOTH = 20  # steps in the moving average of the training loss
_SCORES: dict[str, tuple[str, dict[str, str]]] = {
    "accuracy": ("accuracy", {"marker": "o", "color": "C1"}),
    "balanced_accuracy": ("balanced accuracy", {"marker": "s", "linestyle": "--", "color": "C2"}),
    "majority_accuracy": ("accuracy of the majority class", {"linestyle": ":", "color": "0.5"}),
    "f1": ("F1", {"marker": "o", "color": "C1"}),
    "exact_match": ("exact match", {"marker": "s", "linestyle": "--", "color": "C2"}),
}


def draw_curve(directory: Path, title: str) -> Path:
    """Write curve.png: training loss, held-out loss, held-out accuracy or F1 against steps."""
    from matplotlib.figure import Figure  # slow, and a run draws at its end, others never

    rows = [
        json.loads(line)
        for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    held_out = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(printable(title, _MOST_TEXT), parse_math=False)

    steps = range(1, len(losses) + 1)
    if losses:  # with differential privacy nobody tells them
        left.plot(steps, losses, color="0.8", linewidth=0.8, label="train, each step")
        windows = [losses[max(0, i - _SMOOTH) : i] for i in steps]
        means = [sum(window) / len(window) for window in windows]
        left.plot(steps, means, color="C0", label=f"train, mean of {_SMOOTH}")
    at = [step for step, _ in held_out]
    left.plot(at, [row["loss"] for _, row in held_out], "o-", color="C1", label="held-out")
    left.set(xlabel="step", ylabel="cross-entropy")
    left.legend()

    for key, (label, style) in _SCORES.items():
        if held_out and held_out[0][1].get(key) is not None:
            right.plot(at, [row[key] for _, row in held_out], label=label, **style)
    right.set(xlabel="step", ylabel="held-out score")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path = directory / "curve.png"
    write_picture(figure, path)
    return path


def draw_partition(
    path: Path, label_counts: Sequence[Sequence[int]], label_names: Sequence[str]
) -> None:
    """Training examples per client, stacked by label: for one client as for a thousand.

    label_counts: [clients][labels].
    """
    from matplotlib.figure import Figure

    clients = range(len(label_counts))
    totals = [sum(counts) for counts in label_counts]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes: Any = figure.subplots()
    bottom = [0] * len(label_counts)
    for label, name in enumerate(label_names):
        heights = [counts[label] for counts in label_counts]
        shown = printable(str(name), _MOST_TEXT).replace("$", r"\$")  # no formulas
        # bars that touch: with many clients gaps would be all one sees
        width = 0.8 if len(label_counts) <= 50 else 1.0
        axes.bar(clients, heights, bottom=bottom, width=width, label=shown, linewidth=0)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel="client (partition)", ylabel="training examples")
    axes.set_title(f"{clients_with(totals)} examples")
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(totals) <= 10:
        axes.set_xticks(clients)
    figure.legend(title="label", loc="outside right upper")  # a place without bars
    write_picture(figure, path)


def write_picture(figure: Any, path: Path, dpi: int = 120) -> None:
    """A figure as PNG. OSError when it cannot be written; a file that was there stays then."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    put(path, content.getvalue())


def clients_with(counts: Sequence[int]) -> str:
    """The clients that have so many of something: "1 client with 240", "3 clients with 2 to 4"."""
    fewest, most = min(counts), max(counts)
    spread = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"{len(counts)} client{'s' * (len(counts) > 1)} with {spread}"
