"""A client is its base checkpoint and its ledger position: its process may be killed any time."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity
from grids import LocalGrid

from hosl_flower.config.app_config import read_app_config
from hosl_flower.flower.strategy import SplitStrategy
from hosl_flower.methods.load import load_method
from hosl_flower.run.start import run_in_process

APP = Path(__file__).parents[2] / "simulations" / "quickstart"
KEYS = [
    "strategy=strategies.ho_sfl:HoSfl", "num-clients=5", "clients-per-step=3", "steps=8",
    "eval-every=4", "eval-examples=60", "batch-size=8", "client-trainable=lora",
    "client-optimizer=adamw", "client-learning-rate=1e-3", "lora-rank=2", "save-model=false",
    "threads=1",
]  # fmt: skip


def identify():
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)


def serve(pipe):
    """A ClientApp process: answers messages until it is killed."""
    identify()
    grid = LocalGrid({})
    while True:
        pipe.send(grid.answer(*pipe.recv()))


class ProcessGrid(LocalGrid):
    """SuperNodes whose ClientApp runs in a process of its own, killed now and then in the middle
    of a message; the message then comes back as an error, as Flower reports it."""

    def __init__(self, nodes, kill_at):
        super().__init__(nodes)
        self.kill_at, self.count, self.workers = kill_at, 0, {}

    def answer(self, message, config):
        node = message.metadata.dst_node_id
        if node not in self.workers:
            spawn = multiprocessing.get_context("spawn")
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers[node] = (process, ours)
        process, pipe = self.workers[node]
        self.count += 1
        pipe.send((message, config))
        if self.count in self.kill_at:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            del self.workers[node]
            return Message(Error(code=2, reason="the ClientApp was killed"), reply_to=message)

    def stop(self):
        for process, _ in self.workers.values():
            process.kill()


def history(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("extra", [[], ["strategy=strategies.fedavg_zo:FedAvgZo"]])
def test_killed_clients_go_on_with_the_same_numbers(tmp_path, monkeypatch, extra):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def strategy(name):
        keys = [*KEYS, *extra, f"output-dir={tmp_path}", f"run-name={name}"]
        return load_method(read_app_config(APP, keys))

    plain = run_in_process(strategy("plain"))
    node = {"num-partitions": 2}
    grid = ProcessGrid(
        {7: {"partition-id": 0, **node}, 8: {"partition-id": 1, **node}}, {9, 16, 17}
    )
    try:
        SplitStrategy(strategy("killed")).start(grid, run="1")
    finally:
        grid.stop()
    killed = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert history(tmp_path / "killed") == history(tmp_path / "plain")
    assert killed["fingerprint"] == plain.fingerprint
    assert killed["clients"]["dropped"] == []
    assert killed["clients"]["fingerprint_checked"] == [0, 1, 2, 3, 4]
