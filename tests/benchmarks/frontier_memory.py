"""A comparison's table and frontier with the client memory of other runs of the same cells.

    python tests/benchmarks/frontier_memory.py FILE.toml LEARNED MEASURED

LEARNED: what `compare` wrote, in whole mini-batches on a GPU perhaps. MEASURED: the same with the
file's first seed and a few steps, in the micro-batches a device would take, which changes sums by
their rounding only. Writes results.md and frontier-<variant>.png in LEARNED anew; its results.csv
stays as it is.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from hosl_flower.comparison import Row, markdown, rows
from hosl_flower.comparison_plot import draw_frontier
from hosl_flower.experiment import Experiment, cells, read_experiment
from hosl_flower.outcome import outcome


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
    given = parser.parse_args()
    experiment = read_experiment(given.experiment)
    table = rows(experiment, cells(experiment, {}), given.learned)
    table = measured(experiment, table, given.measured)
    (given.learned / "results.md").write_text(markdown(experiment, table))
    for variant in experiment.variants:
        own = [row for row in table if row.variant == variant]
        title = f"{given.experiment.stem} {variant}".strip()
        suffix = f"-{variant}" if variant else ""
        draw_frontier(given.learned / f"frontier{suffix}.png", title, own)


if __name__ == "__main__":
    main()
