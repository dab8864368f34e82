"""Who took part in which step.

A run records how many steps each client took part in, and who was left out of which step and why;
not who was asked. That follows from seed and step (Session.sample and Session.turn), unless nodes
were away. So it is drawn again here, and shown only where it adds up to what was recorded.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hosl_flower.report.runs import Run
from hosl_flower.run.run_files import Dropped
from hosl_flower.tensors.seeds import derive_seed, permutation

MOST_CLIENTS = 2000  # in a figure
_MOST_DRAWS = 1_000_000  # steps x clients; beyond it a page would take minutes


@dataclass(frozen=True)
class Participation:
    """totals: steps by client. drops: by step, those that are recorded; times: how many there were
    in all. drawn: the clients of each step from the first on, None where that cannot be told."""

    number: int
    steps: int
    totals: dict[int, int]
    drops: list[Dropped]
    times: int
    drawn: list[list[int]] | None


def participation(run: Run) -> Participation | None:
    """None of a run that does not say how many clients it has."""
    number = run.results.clients.number or run.settings.config.get("num-clients")
    if not isinstance(number, int) or number < 1:
        return None
    drops = _dropped(run)
    times = max(len(drops), sum(run.results.clients.times_dropped.values()))
    steps = run.results.steps or run.steps_done
    totals = {p: n for p, n in run.results.clients.steps_taken_part.items() if 0 <= p < number}
    drawn = _drawn(run, number, steps, totals, drops) if totals else None
    return Participation(number, steps, totals, drops, times, drawn)


def _dropped(run: Run) -> list[Dropped]:
    """Of the results, which have the first of each client, and of the steps, which have no client
    that was left out after one."""
    of_steps = [
        Dropped(step=row.step, partition=partition, reason=reason)
        for row in run.metrics
        for partition, reason in row.dropped.items()
    ]
    both = dict.fromkeys([*run.results.clients.dropped, *of_steps])
    return sorted(both, key=lambda drop: drop.step)


def _drawn(
    run: Run, number: int, steps: int, totals: dict[int, int], drops: list[Dropped]
) -> list[list[int]] | None:
    if steps * number > _MOST_DRAWS:
        return None
    left_out = {(drop.step, drop.partition) for drop in drops}
    wanted = Counter(totals)
    for draw in _ways(run, number):
        clients = [[p for p in draw(s) if (s, p) not in left_out] for s in range(1, steps + 1)]
        if Counter(p for step in clients for p in step) == wanted:
            return clients
    return None


def _ways(run: Run, number: int) -> Iterator[Callable[[int], list[int]]]:
    """How a strategy may settle the clients of a step: by draw, with the same ones until weights
    are averaged, or in turns."""
    keys = run.settings.config
    values = [keys.get(key) for key in ("seed", "clients-per-step", "local-steps", "turn-steps")]
    if not all(isinstance(value, int) for value in values):
        return
    seed, sampled, local, turn = (int(value or 0) for value in values)

    def sample(step: int) -> list[int]:
        return permutation(number, derive_seed(seed, "clients", step))[: sampled or number]

    yield sample
    if local > 1:
        yield lambda step: sample(step - (step - 1) % local)
    if turn > 0:
        yield lambda step: [(step - 1) // turn % number]
