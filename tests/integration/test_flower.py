"""Real `flwr run`: SuperLink, Ray, ServerApp and ClientApps in their own processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference_ho_sfl import ho_sfl
from runs import PROMPT, write_reviews

from hosl_flower.config.app_config import read_app_config
from hosl_flower.methods.load import load_method
from hosl_flower.run.start import run_in_process

ROOT = Path(__file__).parents[2]
QUICK = ROOT / "simulations" / "quickstart"
MARK = f"{os.getpid()}"  # tests run in several processes


def start(app, *arguments):
    """`python -m hosl_flower simulate`, its output on a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "hosl_flower", "simulate", str(app), *arguments],
        cwd=ROOT,
        env={**os.environ, "TEST_FLOWER_RUN": MARK},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that runs the tests in the background has them ignore SIGINT, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def simulate(app, *arguments):
    process = start(app, *arguments)
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


def descendants():
    """Processes the tests of this process have started and left: they carry its environment."""
    left = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST_FLOWER_RUN={MARK}".encode() in (path / "environ").read_bytes().split(b"\0"):
                left.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return left


def keys(**values):
    return [
        part for key, value in values.items() for part in ("-c", f"{key.replace('_', '-')}={value}")
    ]


def history(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_flower_and_in_process_give_the_same_bits(tmp_path):
    common = {
        "steps": 6, "eval_every": 3, "eval_examples": 60, "num_clients": 2, "turn_steps": 2,
        "batch_size": 8, "output_dir": tmp_path,
    }  # fmt: skip
    # two workers: whichever process answers, the ledger brings it to the same bits
    federation = ["--federation", "num-supernodes=2 client-resources-num-cpus=1"]
    code, output = simulate(QUICK, *keys(**common, run_name="flower"), *federation)
    assert code == 0, output
    arguments = keys(**common, run_name="plain")[1::2]
    run_in_process(load_method(read_app_config(QUICK, arguments)))
    assert history(tmp_path / "flower") == history(tmp_path / "plain")
    over_flower, plain = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("flower", "plain")
    )
    for same in ("accuracy", "loss", "fingerprint", "ledger_digest", "majority_accuracy"):
        assert over_flower[same] == plain[same]
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("flower", "plain")]
    assert ledgers[0] == ledgers[1]
    assert "cut after block 1 of 4" in output
    assert f"run directory: {tmp_path / 'flower'}" in output
    assert f"results: {tmp_path / 'flower' / 'results.json'}" in output
    assert descendants() == []


def test_ten_clients_a_hundred_steps_over_flower_in_process_and_in_the_reference(
    tmp_path, tiny_opt
):
    model, _ = tiny_opt(vocab_size=50272, max_position_embeddings=128)
    data = write_reviews(tmp_path / "reviews", train=120)
    common = {
        "strategy": "strategies.ho_sfl:HoSfl", "model": model, "data_path": data, "task": "reviews",
        "prompt": PROMPT, "verbalizers": "terrible,great", "cut_layer": 2, "steps": 100,
        "eval_every": 50, "eval_examples": 0, "num_clients": 10, "clients_per_step": 3,
        "batch_size": 5, "directions": 2, "client_trainable": "lora", "server_trainable": "lora",
        "lora_rank": 2, "client_learning_rate": 1e-2, "server_learning_rate": 1e-2,
        "server_optimizer": "sgd", "max_length": 100, "threads": 1, "seed": 3,
        "output_dir": tmp_path,
    }  # fmt: skip
    code, output = simulate(QUICK, *keys(**common, run_name="flower"))  # 2 SuperNodes, as typed
    assert code == 0, output
    arguments = keys(**common, run_name="plain")[1::2]
    run_in_process(load_method(read_app_config(QUICK, arguments)))

    assert history(tmp_path / "flower") == history(tmp_path / "plain")
    over_flower, plain = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("flower", "plain")
    )
    for same in ("loss", "fingerprint", "ledger_digest", "bytes_down", "clients"):
        assert over_flower[same] == plain[same], same
    assert over_flower["clients"]["fingerprint_checked"] == list(range(10))
    assert "10 client(s) on 2 SuperNode(s), up to 5 clients on each" in output
    assert (tmp_path / "flower" / "partition.png").is_file()

    losses, _, accuracy, _, _ = ho_sfl(
        model, data, 2, PROMPT, ["terrible", "great"],
        {
            "steps": 100, "batch": 5, "clients": 10, "sampled": 3, "directions": 2,
            "epsilon": 1e-3, "lr": 1e-2, "optimizer": "sgd", "lora": True, "rank": 2,
            "alpha": 16.0, "seed": 3, "kind": "rank1",
        },
    )  # fmt: skip
    ours = [row["train_loss"] for row in history(tmp_path / "flower") if "train_loss" in row]
    assert ours == pytest.approx(losses, rel=2e-3)
    assert over_flower["accuracy"] == accuracy


OTHERS = {
    # weights that live on the clients between two averagings
    "residual-10-clients": ("quickstart", {
        "strategy": "strategies.split_fo:SplitFo", "local_steps": 2, "num_clients": 10,
        "client_gradient": "residual", "client_optimizer": "adafactor",
    }),
    "recompute-1-client": ("quickstart", {
        "model": "random:qwen3-tiny",
        "strategy": "strategies.split_fo:SplitFo", "local_steps": 2, "num_clients": 1,
        "clients_per_step": 1, "client_gradient": "recompute",
        "client_optimizer": "adafactor-momentum",
    }),
    # gradients up and changes of weights down, both in 8 bits
    "recompute-10-clients-int8": ("quickstart", {
        "strategy": "strategies.split_fo:SplitFo", "num_clients": 10, "update_codec": "int8",
        "client_gradient": "recompute", "client_optimizer": "adafactor",
    }),
    # heads on the clients, over an 8-bit base
    "heron-int8": ("quickstart", {
        "strategy": "strategies.heron:Heron", "local_steps": 2, "directions": 2,
        "client_trainable": "lora", "client_quantization": "int8",
    }),
    # images
    "resnet-app": ("resnet18_ho_sfl", {
        "model": "random:resnet-tiny", "task": "digits",
        "image_size": 16, "max_length": 128, "cut_layer": 2, "partitioner": "dirichlet",
    }),
    # bfloat16, and LoRA on both sides
    "qwen-app": ("qwen3_ho_sfl", {
        "model": "random:qwen3-tiny", "task": "sms-spam", "cut_layer": 2,
    }),
}  # fmt: skip


@pytest.mark.parametrize(("app", "own"), OTHERS.values(), ids=OTHERS)
def test_other_clients_and_apps_give_the_same_bits_over_flower(tmp_path, app, own):
    app = ROOT / "simulations" / app
    common = {
        "directions": 1, "num_clients": 3, "clients_per_step": 2, "client_learning_rate": 1e-2,
        **own, "steps": 4, "eval_every": 2, "eval_examples": 40, "batch_size": 8, "threads": 1,
        "output_dir": tmp_path,
    }  # fmt: skip
    federation = ["--federation", "num-supernodes=2 client-resources-num-cpus=1"]
    code, output = simulate(app, *keys(**common, run_name="flower"), *federation)
    assert code == 0, output
    run_in_process(load_method(read_app_config(app, keys(**common, run_name="plain")[1::2])))
    assert history(tmp_path / "flower") == history(tmp_path / "plain")
    over_flower, plain = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("flower", "plain")
    )
    assert over_flower["fingerprint"] == plain["fingerprint"]
    assert over_flower["clients"]["dropped"] == []
    assert descendants() == []


def test_the_main_simulation_falls_back_loudly_without_a_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # nothing cached
    quick = keys(steps=2, eval_examples=8, batch_size=2, output_dir=tmp_path, run_name="main")
    code, output = simulate(ROOT / "simulations" / "opt125m_hosl", *quick)
    assert code == 0, output
    results = json.loads((tmp_path / "main" / "results.json").read_text())
    assert results["pretrained"] is False
    assert results["model"] == "random:opt-125m"
    assert "RANDOM weights" in results["notice"]
    log = output[output.index("Starting Flower Simulation") :]
    assert 0 < log.index("NOT A RESULT") < log.index("hosl with")
    assert (tmp_path / "main" / "model" / "model.safetensors").stat().st_size > 600e6


def test_a_failed_run_fails_with_the_reason_and_leaves_nothing(tmp_path):
    arguments = keys(num_clients=3, clients_per_node=1, nodes_deadline=1.0)
    arguments += keys(output_dir=tmp_path / "out")
    code, output = simulate(QUICK, *arguments)
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert "num-clients = 3 needs 3 SuperNodes, 2 are connected" in last
    assert '--federation-config "num-supernodes=3"' in last
    assert not (tmp_path / "out").exists()
    assert descendants() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_no_process_behind(tmp_path, number):
    process = start(QUICK, *keys(steps=100000, output_dir=tmp_path))
    for line in process.stdout:
        if "run directory" in line:
            break
    process.send_signal(number)
    process.communicate(timeout=90)
    assert process.returncode != 0
    give_up = time.monotonic() + 10
    while descendants() and time.monotonic() < give_up:
        time.sleep(0.2)
    assert descendants() == []
