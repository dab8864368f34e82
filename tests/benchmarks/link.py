"""What the way messages travel costs: step time of each link against the in-process loop.

    python tests/benchmarks/link.py --quick          OPT-125M, HOSL Q = 1, under five minutes
    python tests/benchmarks/link.py [--keep FOLDER]  the table; runs found there are not run again

Same machine, one after the other: HOSL and HO-SFL on random weights, 8 x 64 tokens, in process,
over a stream and over Flower messages in simulation, and over both on real SuperNodes on
loopback (few steps of one cell over Flower messages there: each takes tens of seconds). Bytes are
those of the training messages over the closed form: (2Q + 1) A up for HOSL, A up and A down per
client for HO-SFL, A = B S H 4 bytes of every mini-batch as padded. The last line is JSON: ratios to
in-process, and medians in milliseconds of a small request and of a 12 MiB tensor there and
back, over a stream between two processes. Clients by the hundred are scale.py's business.
"""

import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from deployments import deployment, run_deployed

from hosl_flower.client.client import Client
from hosl_flower.config.parse import parse_config
from hosl_flower.config.resolve import resolve
from hosl_flower.flower.local_run import run_flower_app
from hosl_flower.flower.processes import free_port
from hosl_flower.flower.stream.client_end import Invitation, serve
from hosl_flower.flower.stream.frames import Key
from hosl_flower.flower.stream.server_end import StreamServer
from hosl_flower.methods.load import load_method
from hosl_flower.protocol.messages.describe import Describe
from hosl_flower.protocol.messages.gradients import Change
from hosl_flower.protocol.messages.ledger import Applied
from hosl_flower.protocol.messages.scalars import LocalTrain
from hosl_flower.run.run_log import log_to_stderr
from hosl_flower.run.start import run_in_process

TRAINING = ("forward", "probe", "losses", "cut-gradient", "catch-up", "move", "restore")
APP = Path(__file__).parents[2] / "simulations" / "opt125m_hosl"
COMMON = {
    "task": "sms-spam", "batch-size": 8, "max-length": 64, "eval-examples": 8,
    "train-examples": 400, "server-optimizer": "adamw", "server-learning-rate": 5e-5,
    "save-model": False, "num-clients": 1,
}  # fmt: skip
METHODS = {
    "hosl-q1": {"strategy": "strategies.hosl:Hosl", "directions": 1},
    "hosl-q5": {"strategy": "strategies.hosl:Hosl", "directions": 5},
    "ho-sfl-p2": {
        "strategy": "strategies.ho_sfl:HoSfl", "directions": 2, "num-clients": 4,
        "clients-per-step": 2, "client-trainable": "lora", "server-trainable": "lora",
    },
}  # fmt: skip
MODELS = {
    "opt-mini": {"model": "random:opt-mini", "cut-layer": 3},
    "opt-125m": {"model": "random:opt-125m", "cut-layer": 5},
}
LINKS = ("in_process", "stream_sim", "grid_sim", "stream_deploy")
MAILBOX = ("grid_deploy", "grid_deploy_4")  # 1 and 4 steps per message
MAILBOX_STEPS = 5  # the first is not counted, then one message of 4


def run(name: str, link: str, keys: dict, out: Path) -> dict:
    """Seconds per step by part, of one run over one link, and its bytes over the closed form."""
    keys = {**keys, "run-name": name, "output-dir": str(out)}
    if link.startswith("grid_deploy"):
        keys |= {"link": "grid", "steps": MAILBOX_STEPS, "eval-every": MAILBOX_STEPS}
        keys["steps-per-message"] = 4 if link == "grid_deploy_4" else 1
    if (out / name / "results.json").is_file():
        pass
    elif link == "in_process":
        run_in_process(load_method(parse_config(keys)))
    elif link.endswith("_sim"):
        keys["link"] = "grid" if link == "grid_sim" else "stream"
        run_flower_app(APP, keys, "num-supernodes=1", out)
    else:
        if link == "stream_deploy":
            keys["stream-endpoint"] = f"127.0.0.1:{free_port()}"
        with deployment(1) as environment:
            run_deployed(environment, APP, keys, 580.0)
    results = json.loads((out / name / "results.json").read_text())
    # the median step: the first one includes loading and warming up
    rows = [json.loads(x) for x in (out / name / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "seconds" in row][1:]
    middle = statistics.mean if link.startswith("grid_deploy") else statistics.median
    parts = {
        part: round(middle(row[part] for row in seconds), 4)
        for part in ("client", "server", "transport", "total")
    }
    return {**parts, **bytes_over_closed_form(keys, results), "fingerprint": results["fingerprint"]}


def bytes_over_closed_form(keys: dict, results: dict) -> dict[str, float]:
    """Bytes of the training messages, up and down, over what the papers' formulas give."""
    config = parse_config(keys)
    client = Client(resolve(config, "bytes").spec)
    hidden = client.submodel.decoder.config.hidden_size
    activations = 0  # bytes of one activation of every mini-batch that was used
    for partition, steps in results["clients"]["steps_taken_part"].items():
        data = client.pool.client(int(partition))
        batches = (data.train_batch(n, config.batch_size) for n in range(steps))
        activations += sum(batch.input_ids.numel() * hidden * 4 for batch in batches)
    up, down = (
        sum(results[way].get(kind, {"bytes": 0})["bytes"] for kind in TRAINING)
        for way in ("bytes_up", "bytes_down")
    )
    if "hosl:" in config.strategy:
        uploads = (2 * config.zo.directions + 1) * activations
        return {"up_ratio": round(up / uploads, 4), "down_bytes_per_step": down / config.steps}
    return {
        "up_ratio": round(up / activations, 4),
        "down_ratio": round(down / activations, 4),
    }


NOTHING = torch.empty(0)


def echo(invitation: str, elements: int) -> None:
    """A client process that only answers: Describe with a receipt, LocalTrain with its tensor."""

    def answer(requests):
        for request in requests:
            done = {"step": request.step, "seconds": 0.0, "peak_bytes": 0}
            if isinstance(request, LocalTrain):
                yield Change(**done, present=NOTHING, values=request.gradient, scales=NOTHING)
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
    keep = Path(sys.argv[sys.argv.index("--keep") + 1]) if "--keep" in sys.argv else None
    cells = [("opt-125m", "hosl-q1")] if quick else list(itertools.product(MODELS, METHODS))
    found: dict = {**transport(60 if quick else 300), "cells": {}}
    with tempfile.TemporaryDirectory() as own:
        out = keep or Path(own)
        for model, method in cells:
            first = (model, method) == ("opt-125m", "hosl-q1")
            steps = 5 if quick or method == "hosl-q5" else 12
            keys = {**COMMON, **MODELS[model], **METHODS[method], "steps": steps}
            keys["eval-every"] = steps
            rows = {link: run(f"{model}-{method}-{link}", link, keys, out) for link in LINKS}
            prints = {row.pop("fingerprint") for row in rows.values()}
            assert len(prints) == 1, f"not the same bits over every link: {prints}"
            if first and not quick:
                rows |= {x: run(f"{model}-{method}-{x}", x, keys, out) for x in MAILBOX}
            found["cells"][f"{model} {method}"] = {"steps": steps, **rows}
    columns = ("client", "server", "transport", "total", "ratio", "up_ratio")
    print("| model, method, link | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for cell, rows in found["cells"].items():
        for link, row in ((k, v) for k, v in rows.items() if k != "steps"):
            row.pop("fingerprint", None)
            row["ratio"] = round(row["total"] / rows["in_process"]["total"], 3)
            print(f"| {cell}, {link} | {' | '.join(str(row[c]) for c in columns)} |")
    first = found["cells"]["opt-125m hosl-q1"]
    found |= {link: first[link]["ratio"] for link in LINKS[1:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
