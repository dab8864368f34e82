"""A comparison's table and frontier with the client memory of other runs of the same cells.

    python tests/benchmarks/frontier_memory.py FILE.toml LEARNED MEASURED [-c key=value]

LEARNED: what `compare` wrote, in whole mini-batches on a GPU perhaps. MEASURED: where the same is
run with the file's first seed and ten steps, in the micro-batches a device would take, which
changes sums by their rounding only. Writes results.md and frontier-<variant>.png in LEARNED anew;
its results.csv stays as it is. -c: keys of [config], as for `compare`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from hosl_flower.cells import run_all
from hosl_flower.cli import key_value
from hosl_flower.comparison import Row, csv_text, markdown, rows
from hosl_flower.comparison_plot import draw_frontier
from hosl_flower.experiment import Experiment, Keys, cells, read_experiment
from hosl_flower.outcome import outcome

STEPS = 10
MICRO_BATCH = {"residual": 1, "recompute": 2}  # by client-gradient


def short(experiment: Experiment) -> Experiment:
    """The first seed and a few steps of it, in micro-batches."""

    def own(keys: Keys) -> Keys:
        given = {"local-steps": STEPS} if "local-steps" in keys else {}
        micro = MICRO_BATCH.get(str(keys.get("client-gradient")), 0)
        return {**keys, **given, **({"client-micro-batch": micro} if micro else {})}

    config = {"steps": STEPS, "eval-every": STEPS, "held-out-examples": 100}
    changes = {
        "seeds": experiment.seeds[:1],
        "config": {**experiment.config, **config},
        "methods": {name: own(keys) for name, keys in experiment.methods.items()},
    }
    return experiment.model_copy(update=changes)


def measured(experiment: Experiment, table: list[Row], folder: Path) -> list[Row]:
    """The rows with the peaks of the runs in `folder`."""
    seed = experiment.seeds[0]
    peaks = {
        (cell.variant, cell.method): outcome(folder / cell.name, 0.0).peak_bytes
        for cell in cells(experiment, {})
        if cell.seed == seed
    }
    found = []
    for row in table:
        peak, control = peaks[row.variant, row.method], peaks[row.variant, experiment.control]
        runs = [replace(run, peak_bytes=peak) for run in row.runs]
        found.append(replace(row, runs=runs, memory=peak / control))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("learned", type=Path)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    experiment = read_experiment(given.experiment, dict(map(key_value, given.keys)))
    folder = given.measured.absolute()
    few = cells(brief := short(experiment), {})
    run_all(few, folder, given.processes, "", "memory")
    (folder / "results.csv").write_text(csv_text(brief, few, folder))
    table = rows(experiment, cells(experiment, {}), given.learned)
    table = measured(experiment, table, folder)
    (given.learned / "results.md").write_text(markdown(experiment, table))
    for variant in experiment.variants:
        own = [row for row in table if row.variant == variant]
        title = f"{given.experiment.stem} {variant}".strip()
        suffix = f"-{variant}" if variant else ""
        draw_frontier(given.learned / f"frontier{suffix}.png", title, own)


if __name__ == "__main__":
    main()
