"""A long run whose clients come and go: is anything lost, does anything grow?

    python tests/benchmarks/soak.py --minutes 30 [--seed 0] [--write docs/results/soak.json]

HO-SFL trains a tiny model over real streams: the server is this process, every client a process of
its own that loads its submodel and data and computes. Two of six clients join late; after that,
every few steps, one is killed (-9) and called again at once, or is away for a while, or stands
still, or its connection breaks, as the seed says. The first client is only ever held up. A new
client process is a fork of one that has loaded model and data, which spares the seconds of that.

In the end every step must be in metrics and ledger, the ledger replayed from the base checkpoint
must give the server's submodel, and so must every client's fingerprint. Resident memory of the
server and of the first client, open files and threads are sampled all along; a slope is that of
least squares against steps, after a fifth of the time.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from hosl_flower.run.start import open_run

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

CLIENTS, LATE = 6, (4, 5)
DEADLINE, PATIENCE = 5.0, 120.0  # seconds a client may take in a step; before and after all
SAMPLE_SECONDS = 2.0
MIB = 2.0**20
KEYS = {
    "strategy": "strategies.ho_sfl:HoSfl", "model": "random:opt-tiny", "cut-layer": 1,
    "task": "reviews", "prompt": "{text} It was", "verbalizers": "terrible,great",
    "num-clients": CLIENTS, "clients-per-step": 3, "min-clients": 1, "steps": 10**6,
    "eval-every": 100, "checkpoint-every": 250, "batch-size": 4, "max-length": 32,
    "eval-examples": 16, "directions": 2, "client-trainable": "blocks", "aggregation": "mean",
    "client-learning-rate": 1e-4, "server-learning-rate": 1e-3, "scalar-clip": 10.0,
    "threads": 1, "device": "cpu", "trackers": "", "run-name": "soak",
}  # fmt: skip


class TimeIsUpError(Exception):
    """The end of a soak."""


class Trouble(threading.Thread):
    """What befalls clients."""

    def __init__(self, grid, link, strategy, seed: int):
        super().__init__(daemon=True)
        self.grid, self.link, self.strategy = grid, link, strategy
        self.random = random.Random(seed)
        self.done, self.events = threading.Event(), Counter()

    def run(self) -> None:
        for partition in LATE:
            if not self._pass(self.random.randint(5, 20)):
                return
            self.grid.joined.add(partition + 1)
            self.events["joined late"] += 1
        while self._pass(self.random.randint(5, 40)):
            what = self.random.choice(["killed", "killed", "away", "stopped", "cut off"])
            first = 1 if what in ("stopped", "cut off") else 2
            node, pause = self.random.randint(first, CLIENTS), self.random.uniform(0.5, 10.0)
            try:
                self._happen(what, node, pause)
            except (KeyError, OSError):
                continue  # it was gone already
            self.events[what] += 1

    def _pass(self, steps: int) -> bool:
        """Let so many steps be made; False when the run is over."""
        until = self.strategy.step + steps
        while self.strategy.step < until:
            if self.done.wait(0.1):
                return False
        return True

    def _happen(self, what: str, node: int, pause: float) -> None:
        process = self.grid.processes[node]
        if Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0] == "Z":
            raise ProcessLookupError
        if what == "cut off":
            session = self.link._lines[node].session
            session.lost(session._connection)
        elif what == "stopped":
            os.kill(process, signal.SIGSTOP)
            self.done.wait(pause / 2)  # beyond the deadline now and then
            os.kill(process, signal.SIGCONT)
        else:
            if what == "away":
                self.grid.away[node] = time.monotonic() + pause
            os.kill(process, signal.SIGKILL)


class Samples(threading.Thread):
    """Memory, files and threads of the server, and memory of the first client, over steps."""

    def __init__(self, grid, strategy):
        super().__init__(daemon=True)
        self.grid, self.strategy, self.done = grid, strategy, threading.Event()
        self.rows: list[tuple[float, ...]] = []

    def run(self) -> None:
        started = time.monotonic()
        while not self.done.wait(SAMPLE_SECONDS):
            try:
                client = resident(self.grid.processes[1])
            except (KeyError, OSError):  # it is being called again
                continue
            files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
            row = (time.monotonic() - started, self.strategy.step, resident(os.getpid()), client)
            self.rows.append((*row, files, threads))

    def summary(self) -> dict:
        """Slopes after warming up; files and threads then and in the end."""
        rows = np.array(self.rows)
        rows = rows[rows[:, 0] > rows[-1, 0] / 5]
        third = len(rows) // 3

        def slope(column: int) -> float:
            return round(float(np.polyfit(rows[:, 1], rows[:, column] / MIB, 1)[0]) * 1000, 3)

        found = {
            "server_mib": [round(float(rows[i, 2]) / MIB, 1) for i in (0, -1)],
            "server_mib_per_1000_steps": slope(2),
            "first_client_mib": [round(float(rows[i, 3]) / MIB, 1) for i in (0, -1)],
            "first_client_mib_per_1000_steps": slope(3),
        }
        for column, name in ((4, "open_files"), (5, "threads")):
            early, late = rows[:third, column], rows[-third:, column]
            found[f"server_{name}"] = {
                "median_first_third": float(np.median(early)),
                "median_last_third": float(np.median(late)),
                "most": int(rows[:, column].max()),
            }
        return found


def make_strategy(config, seconds: float):
    """HO-SFL that stops when its time is up."""
    from strategies.ho_sfl import HoSfl

    class Timed(HoSfl):
        step, give_up = 0, 0.0

        def steps(self, session, link, steps):
            self.give_up = self.give_up or time.monotonic() + seconds
            if time.monotonic() > self.give_up:
                raise TimeIsUpError
            losses = super().steps(session, link, steps)
            self.step, link.deadline = steps[-1], DEADLINE  # everybody has loaded what it needs
            return losses

    return Timed(config)


def soak(arguments: argparse.Namespace, folder: Path) -> dict:
    """The run, and what is left to see of it afterwards."""
    from flwr.supercore.task_identity import TaskIdentity
    from forked import ForkedGrid, Nursery
    from runs import write_reviews

    from hosl_flower.config.parse import parse_config
    from hosl_flower.flower.nodes import Nodes
    from hosl_flower.flower.stream.link import StreamLink
    from hosl_flower.run.loop import check_clients, train
    from hosl_flower.run.recorder import Recorder
    from hosl_flower.run.run_log import RunLog

    for name in ("_run_id", "_node_id", "_task_id"):  # as in a ServerApp's process
        setattr(TaskIdentity, name, 1)
    data = write_reviews(folder / "reviews", 120, 24)
    own = {"data-path": str(data), "output-dir": str(folder), "seed": arguments.seed}
    config = parse_config({**KEYS, **own})
    strategy = make_strategy(config, 60 * arguments.minutes)
    session = open_run(strategy, "soak")[0]
    nursery = Nursery(session.spec)
    grid = ForkedGrid(nursery, CLIENTS, LATE)
    nodes = Nodes(grid, CLIENTS, 0, DEADLINE)
    nodes.wait(1.0, 1)
    link = StreamLink(grid, session.spec, session.history, session.limits, PATIENCE, nodes)
    trouble, samples = Trouble(grid, link, strategy, arguments.seed), Samples(grid, strategy)
    started = time.monotonic()
    trouble.start()
    samples.start()
    with contextlib.suppress(TimeIsUpError), RunLog() as kept, Recorder(config, kept) as report:
        train(strategy, session, link, report)
    seconds = time.monotonic() - started
    for thread in (trouble, samples):
        thread.done.set()
        thread.join()
    grid.away.clear()
    link.deadline = PATIENCE  # whoever has been called comes back
    compared = check_clients(session, link, range(CLIENTS), strategy.step)
    link.close()
    nursery.close()
    return {
        "minutes": round(seconds / 60, 1),
        "seed": arguments.seed,
        "steps": strategy.step,
        "events": dict(trouble.events),
        "client_processes": grid.calls,
        "times_a_step_went_on_without_a_client": len(session.participation.dropped),
        "steps_taken_part": {str(p): n for p, n in sorted(session.participation.took_part.items())},
        **nothing_lost(folder / "soak", session, strategy.step),
        "fingerprints_equal": compared,
        **samples.summary(),
    }


def nothing_lost(directory: Path, session, steps: int) -> dict:
    """Whether every step is in the files, and the ledger gives the server's submodel."""
    from hosl_flower.ledger.ledger import Ledger
    from hosl_flower.ledger.new_state import new_state
    from hosl_flower.server.session import _load_client

    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    session.history.ledger.seal()
    ledger = Ledger.read(directory / "ledger.jsonl")
    state = new_state(_load_client(session.base, session.spec, session.encoder), session.spec)
    state.apply(ledger.entries)
    return {
        "every_step_in_metrics": [r["step"] for r in rows if "train_loss" in r]
        == list(range(1, steps + 1)),
        "every_step_in_ledger": [entry.step for entry in ledger.entries]
        == list(range(1, steps + 1)),
        "replay_gives_the_submodel": state.mark().fingerprint
        == session.history.state.mark().fingerprint,
    }


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(arguments, Path(folder))
    text = json.dumps(found, indent=1)
    if arguments.write:
        arguments.write.write_text(text + "\n")
    print(text, flush=True)
    os._exit(0)  # threads of gRPC may linger


if __name__ == "__main__":
    main()
