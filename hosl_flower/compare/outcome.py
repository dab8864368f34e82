"""What one finished run of an experiment says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosl_flower.errors import HoslError
from hosl_flower.run.headline import headline
from hosl_flower.system.untrusted_files import read_json

DIVERGED = "diverged.txt"  # in the run directory of a run that did

# A backward pass counts as two, and the forward is run again for its graph. Recomputing and
# residual feedback are booked at the most that was measured, operations over those of one forward:
# 3.7 to 3.8, and 3.1 (OPT, texts of 32 tokens) to 3.7 (Llama). The exact rules were measured at 3.7
# to 3.9 (OPT) and 4.4 (Llama, three blocks), which makes 4.7 with many blocks.
_GRADIENT: dict[str, float] = {"backprop": 3, "exact": 4.7, "recompute": 3.8, "residual": 3.7}

# Client forward passes of one mini-batch that a request costs, as implemented: P directions per
# local step.
_FORWARDS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "forward": lambda keys: 1,
    "probe": lambda keys: 1,
    "cut-gradient": lambda keys: _linear(keys),
    "local-train": lambda keys: _linear(keys),
    "head-probe": lambda keys: keys["local-steps"] * (keys["directions"] + 1),
    "backward": lambda keys: _GRADIENT[keys.get("client-gradient", "backprop")],
    "local-step": lambda keys: _GRADIENT[keys.get("client-gradient", "backprop")],
}
_NOT_TRAINING = ("load", "evaluate")
_SCORES = ("accuracy", "balanced_accuracy", "exact_match", "f1")
_UPDATES = ("losses", "catch-up", "move", "restore", "fetch", "adopt", "hidden-states")


class CellError(HoslError):
    """A run of an experiment failed."""


def is_diverged(directory: Path) -> bool:
    """Whether the run ended because training left the finite numbers: it would again."""
    return (directory / DIVERGED).is_file()


def _linear(keys: Mapping[str, Any]) -> int:
    """Of E local steps on <lambda, f_c>. Differences: the first step knows the clean value, unless
    activations come in micro-batches and are not kept. A derivative needs no clean value; a pass
    that carries a tangent counts as two (zo/forward_mode.py)."""
    steps, directions = keys["local-steps"], keys["directions"]
    if keys.get("derivative") == "forward-mode":
        return 2 * steps * directions
    known = not keys["client-micro-batch"]
    return steps * (directions + 1) - known


@dataclass(frozen=True)
class Outcome:
    """Figures of one finished run, of its training alone: evaluations' bytes and forwards and the
    memory of loading are left out.

    forwards: client forward-equivalents per step, of all its clients together. peak_bytes: of a
    client's tensors in a step. exchange_peak_bytes: the same, or in sending and taking weights
    where that is more. curve: (step, loss, score) of the evaluations. to_target: steps until the
    score was first there, or None.
    """

    accuracy: float | None
    loss: float
    balanced_accuracy: float | None
    exact_match: float | None
    f1: float | None
    bytes_up: float
    bytes_down: float
    forwards: float
    peak_bytes: int
    exchange_peak_bytes: int
    server_seconds: float
    client_seconds: float
    step_seconds: float
    wall_seconds: float
    to_target: int | None
    curve: tuple[tuple[int, float, float], ...]

    @property
    def measure(self) -> str:
        """What its score is: "accuracy", or "f1" of generated answers."""
        return "f1" if self.accuracy is None else "accuracy"


def outcome(directory: Path, target: float) -> Outcome:
    """Read a run directory."""
    if is_diverged(directory):
        raise CellError(f"{directory} diverged: choose another learning rate for it")
    results = read_json(directory, directory / "results.json")
    keys = read_json(directory, directory / "config.json")["config"]
    steps = results["steps"]
    sent = {kind: way["messages"] for kind, way in results["bytes_up"].items()}
    training = [k for k in results["bytes_up"] if k in _FORWARDS or k in _UPDATES]
    up, down = (
        sum(results[way][kind]["bytes"] for kind in training if kind in results[way]) / steps
        for way in ("bytes_up", "bytes_down")
    )
    seconds, peaks = results["seconds_per_step"], results["client_peak_memory"]["tensor_bytes"]
    peaks = {phase: n for phase, n in peaks.items() if phase not in _NOT_TRAINING}
    curve = tuple((e["step"], e["loss"], headline(e)[1]) for e in results["evaluations"])
    return Outcome(
        loss=results["loss"],
        **{name: results.get(name) for name in _SCORES},
        bytes_up=up,
        bytes_down=down,
        forwards=sum(n * _FORWARDS[k](keys) for k, n in sent.items() if k in _FORWARDS) / steps,
        peak_bytes=max(n for phase, n in peaks.items() if phase != "exchange"),
        exchange_peak_bytes=max(peaks.values()),
        server_seconds=seconds["server"],
        client_seconds=seconds["client"],
        step_seconds=seconds["total"],
        wall_seconds=results["wall_seconds"],
        to_target=next((step for step, _, acc in curve if target and acc >= target), None),
        curve=curve,
    )
