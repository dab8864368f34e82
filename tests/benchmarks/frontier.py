"""How much of back-propagation's benefit, in how much client memory.

    python tests/benchmarks/frontier.py --quick         frontier_quick.toml, one JSON line
    python tests/benchmarks/frontier.py --out runs/methods -c model=<a small OPT> -c data-path=...

The second is `python -m hosl_flower compare simulations/comparisons/methods.toml`, which draws
frontier-<variant>.png. Gaps are shares of the held-out loss between a frozen client (0) and one
that back-propagates with AdamW (1); memory is the client's peak over that of the frozen one, which
only infers.
"""

import argparse
import json
import tempfile
from pathlib import Path

from hosl_flower.compare.compare import compare
from hosl_flower.compare.experiment import cells, read_experiment
from hosl_flower.compare.outcome import outcome
from hosl_flower.config.app_config import key_value

QUICK = Path(__file__).with_name("frontier_quick.toml")
FULL = Path(__file__).parents[2] / "simulations" / "comparisons" / "methods.toml"


def quick(processes: int) -> dict[str, float]:
    """The figures of the quick experiment."""
    with tempfile.TemporaryDirectory() as folder:
        compare(QUICK, Path(folder), processes, {})
        own = cells(read_experiment(QUICK), {})
        runs = {cell.method: outcome(Path(folder) / cell.name, 0.0) for cell in own}
    zero, one = runs["frozen"], runs["split-fo"]
    figures: dict[str, float] = {"headroom_loss": zero.loss - one.loss}
    for name, method in (("zo", "ho-sfl"), ("residual", "residual"), ("recompute", "recompute")):
        run = runs[method]
        figures[f"{name}_gap"] = (zero.loss - run.loss) / (zero.loss - one.loss)
        figures[f"{name}_memory"] = run.peak_bytes / zero.peak_bytes
        figures[f"{name}_seconds_over_frozen"] = run.step_seconds / zero.step_seconds
    figures["fo_memory"] = one.peak_bytes / zero.peak_bytes
    figures |= {f"{name}_accuracy": run.accuracy for name, run in runs.items()}
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.quick:
        print(json.dumps(quick(arguments.processes)))
    else:
        keys = dict(map(key_value, arguments.keys))
        print(compare(FULL, arguments.out, arguments.processes, keys))


if __name__ == "__main__":
    main()
