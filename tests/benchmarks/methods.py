"""Methods and their frozen-client control, or codecs, on one simulation, over seeds.

    python tests/benchmarks/methods.py simulations/quickstart --set hosl
    python tests/benchmarks/methods.py simulations/quickstart --set ho-sfl
    python tests/benchmarks/methods.py simulations/quickstart --set codec -c model=<directory> ...

Same data order, same seeds, same server; the control has client-learning-rate 0. Cells that
are finished are not run again. Prints a Markdown table: final held-out figures of every seed,
and bytes per step.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from hosl_flower.config.app_config import read_app_config
from hosl_flower.methods.load import load_method
from hosl_flower.run.run_log import log_to_stderr
from hosl_flower.run.start import run_in_process

FROZEN = ["client-learning-rate=0.0"]
TEN_CLIENTS = [
    "strategy=strategies.ho_sfl:HoSfl", "num-clients=10", "clients-per-step=3", "steps=150",
    "eval-every=50", "client-trainable=blocks", "partitioner=dirichlet",
]  # fmt: skip
FEDAVG = [*TEN_CLIENTS[1:], "strategy=strategies.fedavg_zo:FedAvgZo"]
CODECS = {
    f"{method}-{codec}": [f"strategy=strategies.{module}", f"codec={codec}"]
    for method, module in (("hosl", "hosl:Hosl"), ("ho-sfl", "ho_sfl:HoSfl"))
    for codec in ("exact", "bf16", "fp16", "int8")
}
SETS = {
    "codec": CODECS,
    "hosl": {"hosl": [], "frozen": FROZEN},
    "ho-sfl": {
        "ho-sfl": TEN_CLIENTS,
        "ho-sfl-per-client": [*TEN_CLIENTS, "client-seeds=per-client"],
        "ho-sfl-adamw": [*TEN_CLIENTS, "client-optimizer=adamw"],
        "fedavg-zo": FEDAVG,
        "fedavg-zo-5": [*FEDAVG, "local-steps=5"],
        "ho-sfl-frozen": [*TEN_CLIENTS, *FROZEN],
    },
}


def cell(app: Path, method: str, keys: list[str], seed: int, out: Path) -> dict:
    """results.json of one run, made unless it is there."""
    name = f"{app.name}-{method}-seed{seed}"
    results = out / name / "results.json"
    if not results.is_file():
        own = [f"seed={seed}", f"run-name={name}", f"output-dir={out}", "save-model=false"]
        run_in_process(load_method(read_app_config(app, [*own, *keys])))
    return json.loads(results.read_text())


def _bytes_per_step(result: dict) -> str:
    """kB up / down per step, evaluations and set-up left out."""
    training = (
        "forward", "probe", "losses", "cut-gradient", "local-train", "catch-up", "move", "restore"
    )  # fmt: skip
    ways = []
    for way in ("bytes_up", "bytes_down"):
        kinds = result[way]
        ways.append(sum(kinds[k]["bytes"] for k in training if k in kinds) / result["steps"])
    return " / ".join(f"{value / 1e3:.0f}" for value in ways)


def main(
    app: Path,
    methods: Annotated[str, typer.Option("--set", help=", ".join(SETS))] = "hosl",
    seeds: Annotated[list[int], typer.Option()] = [0, 1, 2],  # noqa: B006
    config: Annotated[list[str], typer.Option("-c", help="key=value, for all")] = [],  # noqa: B006
    out: Path = Path("runs/control"),
) -> None:
    log_to_stderr()
    rows = {
        method: [cell(app, method, [*config, *keys], seed, out.absolute()) for seed in seeds]
        for method, keys in SETS[methods].items()
    }
    print(f"| {app.name} | accuracy | balanced accuracy | loss | kB up / down per step |")
    print("|---|---|---|---|---|")
    for method, results in rows.items():
        columns = (
            ", ".join(f"{r[key]:.3f}" for r in results)
            for key in ("accuracy", "balanced_accuracy", "loss")
        )
        print(f"| {method} | {' | '.join(columns)} | {_bytes_per_step(results[0])} |")
    first = next(iter(rows.values()))
    majority = ", ".join(f"{r['majority_accuracy']:.3f}" for r in first)
    before = ", ".join(f"{r['evaluations'][0]['loss']:.3f}" for r in first)
    print(f"| majority class; loss before training | {majority} | | {before} | |")


if __name__ == "__main__":
    typer.run(main)
