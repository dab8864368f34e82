"""The pictures of a run directory: its learning curve, and who holds which data."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a server has no display

from matplotlib import pyplot

_SMOOTH = 20  # steps in the moving average of the training loss


def draw_curve(directory: Path, title: str) -> Path:
    """Write curve.png: training loss, held-out loss, held-out accuracy against steps."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    held_out = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    figure.suptitle(title)

    steps = range(1, len(losses) + 1)
    left.plot(steps, losses, color="0.8", linewidth=0.8, label="train, each step")
    windows = [losses[max(0, i - _SMOOTH) : i] for i in steps]
    means = [sum(window) / len(window) for window in windows]
    left.plot(steps, means, color="C0", label=f"train, mean of {_SMOOTH}")
    at = [step for step, _ in held_out]
    left.plot(at, [row["loss"] for _, row in held_out], "o-", color="C1", label="held-out")
    left.set(xlabel="step", ylabel="cross-entropy")
    left.legend()

    right.plot(at, [row["accuracy"] for _, row in held_out], "o-", color="C1", label="accuracy")
    balanced = [row["balanced_accuracy"] for _, row in held_out]
    if None not in balanced:
        right.plot(at, balanced, "s--", color="C2", label="balanced accuracy")
    majority = [row["majority_accuracy"] for _, row in held_out]
    if None not in majority:
        label = "accuracy of the majority class"
        right.plot(at, majority, color="0.5", linestyle=":", label=label)
    right.set(xlabel="step", ylabel="held-out accuracy")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path = directory / "curve.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def draw_partition(
    path: Path, label_counts: Sequence[Sequence[int]], label_names: Sequence[str]
) -> None:
    """Training examples per client, stacked by label: for one client as for a thousand.

    label_counts: [clients][labels].
    """
    clients = range(len(label_counts))
    totals = [sum(counts) for counts in label_counts]
    figure, axes = pyplot.subplots(figsize=(11, 4), layout="constrained")
    bottom = [0] * len(label_counts)
    for label, name in enumerate(label_names):
        heights = [counts[label] for counts in label_counts]
        # bars that touch: with many clients gaps would be all one sees
        width = 0.8 if len(label_counts) <= 50 else 1.0
        axes.bar(clients, heights, bottom=bottom, width=width, label=name, linewidth=0)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel="client (partition)", ylabel="training examples")
    axes.set_title(f"{len(totals)} client(s) with {min(totals)} to {max(totals)} examples")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.01)
    figure.legend(title="label", loc="outside right upper")  # a place without bars
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
