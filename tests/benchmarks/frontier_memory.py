"""Client memory of a comparison's methods, each in the same micro-batches.

    python tests/benchmarks/frontier_memory.py FILE.toml OUT [-c key=value] [--micro-batch 8 2 1]

Runs every method of the file, and back-propagation with adafactor too, at the file's first seed for
ten steps, once for each micro-batch, and writes OUT/memory.md and OUT/memory.csv: the peak of a
client's tensors in a step, in MB and over the frozen client's in the same micro-batch, and with the
exchange of weights. -c: keys of [config], as for `compare`.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from hosl_flower.compare.experiment import cells, read_experiment
from hosl_flower.compare.experiment_file import Cell, Experiment, Keys
from hosl_flower.compare.outcome import Outcome, outcome
from hosl_flower.compare.runner import run_all
from hosl_flower.config.app_config import key_value

STEPS = 10
HEAD = ("cut", "method", "optimizer", "micro_batch", "peak_bytes", "exchange_peak_bytes")


def short(experiment: Experiment, micro_batch: int) -> Experiment:
    """A few steps of the first seed in micro-batches of this size, not tuned."""

    def own(keys: Keys) -> Keys:
        kept = {key: value for key, value in keys.items() if key != "tune"}
        exchanges = {"local-steps": STEPS} if "local-steps" in keys else {}
        return {**kept, **exchanges, "client-micro-batch": micro_batch}

    methods = {name: own(keys) for name, keys in experiment.methods.items()}
    adamw = methods[experiment.reference]
    methods[f"{experiment.reference}-adafactor"] = {**adamw, "client-optimizer": "adafactor"}
    config = {"steps": STEPS, "eval-every": STEPS, "eval-examples": 100}
    changes = {
        "seeds": experiment.seeds[:1],
        "config": {**experiment.config, **config},
        "methods": methods,
        "tuning": None,
    }
    return experiment.model_copy(update=changes)


def measured(
    experiment: Experiment, micro_batches: Sequence[int], out: Path, processes: int
) -> list[tuple[int, Cell, Outcome]]:
    """(micro-batch, cell, what it took) of all runs."""
    found = []
    for micro_batch in micro_batches:
        folder = out / f"micro{micro_batch}"
        few = cells(short(experiment, micro_batch), {})
        run_all(few, folder, processes, "", f"micro-batches of {micro_batch}")
        found += [(micro_batch, cell, outcome(folder / cell.name, 0.0)) for cell in few]
    return found


def table(found: list[tuple[int, Cell, Outcome]], control: str) -> str:
    """One Markdown table per variant: a method a row, a micro-batch a column."""
    sizes = list(dict.fromkeys(size for size, *_ in found))
    lines = [
        "Peak of a client's tensors in a step in MB, in brackets over the frozen client's in the "
        "same micro-batch; last, with the exchange of weights, in the largest one.",
    ]
    for variant in dict.fromkeys(cell.variant for _, cell, _ in found):
        runs = {(s, c.method): (c, o) for s, c, o in found if c.variant == variant}
        head = [f"{variant}: client", "optimizer", *(f"micro-batch {size}" for size in sizes)]
        lines += ["", f"| {' | '.join([*head, 'with exchange'])} |", "|---" * (len(head) + 1) + "|"]
        for method in dict.fromkeys(method for _, method in runs):
            keys = runs[sizes[0], method][0].keys
            row = [method, str(keys.get("client-optimizer", ""))]
            for size in sizes:
                peak, zero = (runs[size, name][1].peak_bytes for name in (method, control))
                row.append(f"{peak / 1e6:.2f} ({peak / zero:.2f})")
            peak = runs[sizes[0], method][1].exchange_peak_bytes
            zero = runs[sizes[0], control][1].peak_bytes
            lines.append(f"| {' | '.join([*row, f'{peak / 1e6:.2f} ({peak / zero:.2f})'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8, 2, 1])
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    experiment = read_experiment(given.experiment, dict(map(key_value, given.keys)))
    out = given.out.absolute()
    found = measured(experiment, given.micro_batch, out, given.processes)
    with (out / "memory.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        for size, cell, run in found:
            optimizer = cell.keys.get("client-optimizer", "")
            peaks = (run.peak_bytes, run.exchange_peak_bytes)
            writer.writerow([cell.variant, cell.method, optimizer, size, *peaks])
    (out / "memory.md").write_text(text := table(found, experiment.control), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
