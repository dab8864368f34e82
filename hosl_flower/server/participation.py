"""Participation of clients in a run: what the server counts about them from step to step."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from hosl_flower.protocol.messages.describe import Described

MOST_DROPS = 100  # of one client, whose reasons are kept, and written into every checkpoint


class Drop(NamedTuple):
    """A client that was left out of a step."""

    step: int
    partition: int
    reason: str


@dataclass
class Participation:
    """Counters of a run, by partition unless said otherwise.

    Attributes:
        clients: the descriptions of clients that have sent one since the process started.
        batches: mini-batches served so far.
        took_part: steps completed.
        train_examples: training examples of all clients ever described.
        retaken: mini-batches of steps that a resumed run has taken again, at most.
        evaluator: the client whose held-out part is scored.
        unchecked: clients that took part since the last fingerprints.
        checked_at: ledger position of the last fingerprints.
        dropped: clients left out of a step, with the reason: the first MOST_DROPS of each client.
        times_dropped: steps that clients were left out of.
        dropped_at: the reasons by partition, by step that is not reported yet.
        expelled: clients whose submodel differs from the run's, left out of the rest of the run.
        clipped: scalars beyond scalar-clip.
        clipped_at: the same, by step that is not reported yet.
    """

    clients: dict[int, Described] = field(default_factory=dict)
    batches: Counter[int] = field(default_factory=Counter)
    took_part: Counter[int] = field(default_factory=Counter)
    train_examples: dict[int, int] = field(default_factory=dict)
    retaken: int = 0
    evaluator: int | None = None
    unchecked: set[int] = field(default_factory=set)
    checked_at: int = 0
    dropped: list[Drop] = field(default_factory=list)
    times_dropped: Counter[int] = field(default_factory=Counter)
    dropped_at: dict[int, dict[int, str]] = field(default_factory=dict)
    expelled: set[int] = field(default_factory=set)
    clipped: Counter[int] = field(default_factory=Counter)
    clipped_at: dict[int, Counter[int]] = field(default_factory=dict)

    def next_batch(self, partition: int) -> int:
        """Number of the client's next mini-batch, which is then counted as served."""
        number = self.batches[partition]
        self.batches[partition] += 1
        self.unchecked.add(partition)
        return number

    def drop(self, step: int, partition: int, reason: str) -> None:
        """Count a client that is left out of a step, and keep the reason unless there are many."""
        self.times_dropped[partition] += 1
        self.dropped_at.setdefault(step, {})[partition] = reason
        if self.times_dropped[partition] <= MOST_DROPS:
            self.dropped.append(Drop(step, partition, reason))

    def clip(self, step: int, partition: int, count: int) -> None:
        """Count scalars of a client that were clipped."""
        self.clipped[partition] += count
        self.clipped_at.setdefault(step, Counter())[partition] += count

    def mark(self) -> "Participation":
        """Copy of what a step changes before it changes parameters, for `return_to`."""
        return replace(
            self,
            batches=Counter(self.batches),
            unchecked=set(self.unchecked),
            dropped=list(self.dropped),
            times_dropped=Counter(self.times_dropped),
            clipped=Counter(self.clipped),
            clipped_at={step: Counter(counts) for step, counts in self.clipped_at.items()},
        )

    def return_to(self, mark: "Participation") -> None:
        """Take back what an unfinished step has counted. Descriptions of clients stay."""
        self.batches, self.unchecked = mark.batches, mark.unchecked
        self.dropped, self.times_dropped, self.dropped_at = mark.dropped, mark.times_dropped, {}
        self.clipped, self.clipped_at = mark.clipped, mark.clipped_at

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint holds: a resumed run asks clients anew for the rest."""
        return {
            "batches": sorted(self.batches.items()),
            "took_part": sorted(self.took_part.items()),
            "evaluator": self.evaluator,
            "unchecked": sorted(self.unchecked),
            "checked_at": self.checked_at,
            "dropped": self.dropped,
            "drop_counts": sorted(self.times_dropped.items()),
            "clipped": sorted(self.clipped.items()),
            "train_examples": sorted(self.train_examples.items()),
            "retaken": self.retaken,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`. Older checkpoints lack the last four keys.

        Raises:
            KeyError, TypeError, ValueError: values that `as_json` does not give.
        """
        dropped = [Drop(*drop) for drop in values["dropped"]]
        counted = values.get("drop_counts")
        return cls(
            batches=Counter(dict(values["batches"])),
            took_part=Counter(dict(values["took_part"])),
            evaluator=values["evaluator"],
            unchecked=set(values["unchecked"]),
            checked_at=values["checked_at"],
            dropped=dropped,
            times_dropped=Counter(
                (drop.partition for drop in dropped) if counted is None else dict(counted)
            ),
            clipped=Counter(dict(values.get("clipped", ()))),
            train_examples=dict(values.get("train_examples", ())),
            retaken=values.get("retaken", 0),
        )
