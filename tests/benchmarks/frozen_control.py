"""Does the zeroth-order client help? HOSL against the same run with a frozen client.

    python tests/benchmarks/frozen_control.py simulations/quickstart --seeds 0 --seeds 1 --seeds 2

Same data order, same seeds, same server; the control has client-learning-rate 0. Cells that
are finished are not run again. Prints a Markdown table: final held-out figures of every seed.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from hosl_flower.cli import read_app_config
from hosl_flower.server_app import load_strategy, log_to_stderr

METHODS = {"hosl": [], "frozen": ["client-learning-rate=0.0"]}


def cell(app: Path, method: str, seed: int, out: Path) -> dict:
    """results.json of one run, made unless it is there."""
    name = f"{app.name}-{method}-seed{seed}"
    results = out / name / "results.json"
    if not results.is_file():
        keys = [f"seed={seed}", f"run-name={name}", f"output-dir={out}", "save-model=false"]
        load_strategy(read_app_config(app, [*keys, *METHODS[method]])).run_in_process()
    return json.loads(results.read_text())


def main(
    app: Path,
    seeds: Annotated[list[int], typer.Option()] = [0, 1, 2],  # noqa: B006
    out: Path = Path("runs/control"),
) -> None:
    log_to_stderr()
    rows = {m: [cell(app, m, seed, out.absolute()) for seed in seeds] for m in METHODS}
    print(f"| {app.name} | accuracy | balanced accuracy | loss |")
    print("|---|---|---|---|")
    for method, results in rows.items():
        columns = (
            ", ".join(f"{r[key]:.3f}" for r in results)
            for key in ("accuracy", "balanced_accuracy", "loss")
        )
        print(f"| {method} | {' | '.join(columns)} |")
    majority = ", ".join(f"{r['majority_accuracy']:.3f}" for r in rows["hosl"])
    before = ", ".join(f"{r['evaluations'][0]['loss']:.3f}" for r in rows["hosl"])
    print(f"| majority class; loss before training | {majority} | | {before} |")


if __name__ == "__main__":
    typer.run(main)
