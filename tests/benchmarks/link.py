"""What the way messages travel costs: step time of each link against the in-process loop.

    python tests/benchmarks/link.py [--quick]

Same machine, one after the other: HOSL and HO-SFL on OPT-125M (random weights, 8 x 64 tokens)
in process, over a stream and over Flower messages in simulation, and over a stream on real
SuperNodes on loopback. The last line is JSON: ratios to in-process, and medians in milliseconds of
a small request and of a 12 MiB tensor there and back, over a stream between two processes.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from deployments import deployment, run_deployed

from hosl_flower.config import parse_config
from hosl_flower.link.dial import Invitation, serve
from hosl_flower.link.frames import Key
from hosl_flower.link.sessions import StreamServer
from hosl_flower.local_flower import _free_port, run_flower_app
from hosl_flower.messages import Applied, Change, Describe, LocalTrain
from hosl_flower.server_app import load_strategy, log_to_stderr

APP = Path(__file__).parents[2] / "simulations" / "opt125m_hosl"
COMMON = {
    "model": "random:opt-125m", "task": "sms-spam", "batch-size": 8, "max-length": 64,
    "eval-examples": 8, "train-examples": 400, "server-optimizer": "adamw",
    "server-learning-rate": 5e-5, "save-model": False, "num-clients": 1,
}  # fmt: skip
METHODS = {
    "hosl-q1": {"strategy": "strategies.hosl:Hosl", "directions": 1, "cut-layer": 5},
    "hosl-q5": {"strategy": "strategies.hosl:Hosl", "directions": 5, "cut-layer": 5},
    "ho-sfl-p2": {
        "strategy": "strategies.ho_sfl:HoSfl", "directions": 2, "cut-layer": 3, "num-clients": 4,
        "clients-per-step": 2, "client-trainable": "lora", "server-trainable": "lora",
    },
}  # fmt: skip


def run(link: str, keys: dict, out: Path) -> dict:
    """Seconds per step by part, of one run over one link."""
    name = f"{link}-{time.monotonic_ns()}"
    keys = {**keys, "run-name": name, "output-dir": str(out)}
    if link == "in_process":
        load_strategy(parse_config(keys)).run_in_process()
    elif link == "stream_deploy":
        keys["stream-endpoint"] = f"127.0.0.1:{_free_port()}"
        with deployment(1) as environment:
            run_deployed(environment, APP, keys, 580.0)
    else:
        keys["link"] = "grid" if link == "grid_sim" else "stream"
        run_flower_app(APP, keys, "num-supernodes=1", out)
    results = json.loads((out / name / "results.json").read_text())
    # the median step: the first one includes loading and warming up
    rows = [json.loads(x) for x in (out / name / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "seconds" in row][1:]
    medians = {
        part: statistics.median(row[part] for row in seconds)
        for part in ("client", "server", "transport", "total")
    }
    return {**medians, "fingerprint": results["fingerprint"]}


def echo(invitation: str, elements: int) -> None:
    """A client process that only answers: Describe with a receipt, LocalTrain with its tensor."""

    def answer(requests):
        for request in requests:
            done = {"step": request.step, "seconds": 0.0, "peak_bytes": 0}
            if isinstance(request, LocalTrain):
                yield Change(**done, change=request.gradient)
            else:
                yield Applied(**done, position=0, digest="0" * 16)

    serve(Invitation.from_json(invitation), answer)


def transport(repeats: int) -> dict[str, float]:
    """Milliseconds of a small request and of 12 MiB there and back, medians."""
    server = StreamServer("127.0.0.1:0", 16 << 20, 8)
    session = server.session("echo")
    tensor = torch.randn(12 << 18)
    invitation = Invitation(f"127.0.0.1:{server.port}", session.token, "", 16 << 20, 30.0)
    spawn = multiprocessing.get_context("spawn")
    client = spawn.Process(target=echo, args=(invitation.to_json(), tensor.numel()), daemon=True)
    client.start()
    session.ever_connected.wait(60.0)
    at = {"step": 1, "partition": 0, "position": 0, "digest": "0" * 16}
    cut = {"batch": 0, "directions": 1, "seeds": (1,), "epsilon": 1e-3, "learning_rate": 0.0}
    cut |= {"scales": torch.empty(0), "scale": 1.0}
    kinds = {
        "latency_ms": Describe(**at),
        "roundtrip_12mib_ms": LocalTrain(**at, **cut, gradient=tensor),
    }
    found = {}
    for number, (name, request) in enumerate(kinds.items()):
        times = []
        for index in range(repeats):
            key = Key(number, 0, index)
            started = time.perf_counter()
            session.ask({key: request})
            assert session.reply(key, 30.0) is not None
            times.append(1000 * (time.perf_counter() - started))
        found[name] = round(statistics.median(times[3:]), 2)
    session.close()
    client.join(10.0)
    server.stop()
    return found


def main() -> None:
    quick = "--quick" in sys.argv
    log_to_stderr()
    methods = ["hosl-q1"] if quick else list(METHODS)
    steps = 12 if quick else 20
    found: dict = {**transport(60 if quick else 300), "steps": steps, "methods": {}}
    links = ("in_process", "stream_sim", "grid_sim", "stream_deploy")
    with tempfile.TemporaryDirectory() as out:
        for method in methods:
            keys = {**COMMON, **METHODS[method], "steps": steps, "eval-every": steps}
            rows = {link: run(link, keys, Path(out)) for link in links}
            assert len({row.pop("fingerprint") for row in rows.values()}) == 1, "not the same bits"
            found["methods"][method] = rows
    print("| method, link | client s | server s | transport s | step s | ratio |")
    print("|---|---|---|---|---|---|")
    for method, rows in found["methods"].items():
        for link, row in rows.items():
            row["ratio"] = round(row["total"] / rows["in_process"]["total"], 3)
            parts = " | ".join(f"{row[p]:.3f}" for p in ("client", "server", "transport", "total"))
            print(f"| {method}, {link} | {parts} | {row['ratio']} |")
    first = found["methods"][methods[0]]
    found |= {link: first[link]["ratio"] for link in links[1:]}
    print(json.dumps(found))


if __name__ == "__main__":
    assert threading.current_thread() is threading.main_thread()
    main()
