"""How a Ray simulation grows with clients (N), clients per step (K) and Ray workers.

    python tests/benchmarks/scale.py [--steps 20]

Runs HO-SFL with the model and data of simulations/quickstart through Flower, one setting after the
other, and prints a table and, as the last line, JSON. Memory is the resident set of the Ray
workers that run ClientApps, at most, sampled from outside; seconds per step leave out start-up,
where all N clients describe themselves, and evaluations.
"""

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from hosl_flower.flower.local_run import run_flower_app

APP = Path(__file__).parents[2] / "simulations" / "quickstart"
#          N     K  workers
SETTINGS = [(10, 5, 1), (100, 5, 1), (1000, 5, 1), (1000, 20, 1), (1000, 5, 2)]
KEYS = {
    "strategy": "strategies.ho_sfl:HoSfl",
    "client-trainable": "lora",
    "server-trainable": "full",
    "client-optimizer": "adamw",
    "partitioner": "dirichlet",
    "dirichlet-alpha": 10.0,
    "batch-size": 4,
    "eval-examples": 100,
    "threads": 1,
    "save-model": False,
}


class WorkerMemory(threading.Thread):
    """Samples VmRSS of all ClientApp workers; peaks by pid."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[int, int] = {}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.3):
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    if b"ClientAppActor" in (path / "cmdline").read_bytes():
                        status = (path / "status").read_text()
                        kib = int(status.split("VmRSS:")[1].split()[0])
                        self.peaks[int(path.name)] = max(kib, self.peaks.get(int(path.name), 0))
                except (OSError, IndexError):
                    continue


def measure(clients: int, sampled: int, workers: int, steps: int, out: Path) -> dict:
    name = f"{clients}-{sampled}-{workers}"
    keys = {
        **KEYS, "num-clients": clients, "clients-per-step": sampled, "steps": steps,
        "eval-every": steps, "run-name": name,
    }  # fmt: skip
    meter, started = WorkerMemory(), time.perf_counter()
    meter.start()
    federation = f"num-supernodes={workers} client-resources-num-cpus={2 // workers}"
    results = json.loads(run_flower_app(APP, keys, federation, out).read_text())
    meter.done.set()
    meter.join()
    peaks = sorted(meter.peaks.values())[-workers:]
    return {
        "clients": clients,
        "clients_per_step": sampled,
        "workers": workers,
        "steps": steps,
        "seconds_per_step": round(results["seconds_per_step"]["total"], 3),
        "seconds_in_all": round(time.perf_counter() - started, 1),
        "worker_peak_mib": [round(kib / 1024) for kib in peaks],
        "workers_total_mib": round(sum(peaks) / 1024),
        "all_fingerprints_equal": len(results["clients"]["fingerprint_checked"]) == clients,
    }


def main(steps: Annotated[int, typer.Option()] = 20) -> None:
    with tempfile.TemporaryDirectory() as out:
        rows = [measure(*setting, steps, Path(out)) for setting in SETTINGS]
    columns = [key for key in rows[0] if key != "worker_peak_mib"]
    print("| " + " | ".join(key.replace("_", " ") for key in columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[key]) for key in columns) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    typer.run(main)
