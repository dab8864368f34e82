"""results.json: what a run came to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hosl_flower.server.scores import HeldOut
from hosl_flower.server.session import Session
from hosl_flower.server.traffic import Traffic
from hosl_flower.tensors.memory import PHASES


@dataclass(frozen=True)
class Results:
    """results.json. The fields up to wall_seconds are those of the final evaluation, as are
    exact_match and f1: of generated answers, which have none of the three kinds of accuracy.
    held_out_overlap: see data/overlap.py; None where the held-out part is the data's own."""

    method: str
    model: str
    task: str
    pretrained: bool
    seed: int
    steps: int
    accuracy: float | None
    balanced_accuracy: float | None
    loss: float
    wall_seconds: float
    notice: str
    majority_accuracy: float | None
    exact_match: float | None
    f1: float | None
    held_out_examples: int
    held_out_overlap: dict[str, int] | None
    evaluations: list[dict[str, float | None]]
    seconds_per_step: dict[str, float]
    bytes_up: dict[str, dict[str, int]]
    bytes_down: dict[str, dict[str, int]]
    client_peak_memory: dict[str, Any]
    client_parameters: dict[str, int]
    clients: dict[str, Any]
    privacy: dict[str, Any] | None
    fingerprint: str
    ledger_digest: str


class RunFigures(NamedTuple):
    """What was noted on the way. seconds: of all steps, by part."""

    final: HeldOut
    evaluations: list[dict[str, float | None]]
    seconds: Mapping[str, float]
    wall_seconds: float


def results_of(
    method: str, session: Session, traffic: Traffic, measured: RunFigures, checked: list[int]
) -> Results:
    """checked: clients whose fingerprint is the one in the results."""
    held, trained = session.client_counts()
    steps, final, participation = session.config.steps, measured.final, session.participation
    metrics = final.metrics()
    return Results(
        method=method,
        model=session.spec.model,
        task=session.spec.task.name,
        pretrained=session.base.pretrained,
        seed=session.config.seed,
        steps=steps,
        accuracy=metrics.get("accuracy"),
        balanced_accuracy=metrics.get("balanced_accuracy"),
        exact_match=metrics.get("exact_match"),
        f1=metrics.get("f1"),
        loss=final.loss,
        wall_seconds=measured.wall_seconds,
        notice=session.notice,
        majority_accuracy=metrics.get("majority_accuracy"),
        held_out_examples=final.examples,
        held_out_overlap=None
        if session.overlap is None
        else {"examples": session.overlap.examples, "shared": session.overlap.shared},
        evaluations=measured.evaluations,
        seconds_per_step={part: value / steps for part, value in measured.seconds.items()},
        bytes_up=_by_kind(traffic.up),
        bytes_down=_by_kind(traffic.down),
        client_peak_memory={
            "bytes": traffic.peak_bytes,
            "tensor_bytes": dict(zip(PHASES, traffic.tensor_peaks, strict=True)),
            "meter": "process_rss",
            "tensor_meter": next(iter(participation.clients.values())).memory_meter,
        },
        client_parameters={"held": held, "trained": trained},
        clients={
            "number": session.config.clients.count,
            "steps_taken_part": _by_partition(participation.took_part),
            "dropped": [drop._asdict() for drop in participation.dropped],
            "times_dropped": _by_partition(participation.times_dropped),
            "expelled": sorted(participation.expelled),
            "scalars_clipped": _by_partition(participation.clipped),
            "fingerprint_checked": checked,
        },
        privacy=session.privacy(),
        fingerprint=session.history.state.mark().fingerprint,
        ledger_digest=session.history.ledger.digest(),
    )


def _by_partition(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(p): n for p, n in sorted(counts.items())}


def _by_kind(way: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    return {kind: {"messages": n, "bytes": size} for kind, (n, size) in sorted(way.items())}
