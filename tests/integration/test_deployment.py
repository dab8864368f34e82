"""Real SuperLink, SuperNodes and ClientApp processes on loopback."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from deployments import deployment, run_deployed
from runs import metrics, write_questions

from hosl_flower.config.app_config import read_app_config
from hosl_flower.flower.processes import free_port
from hosl_flower.methods.load import load_method
from hosl_flower.privacy.noise_secret import simulated_secret
from hosl_flower.run.start import run_in_process

QUICK = Path(__file__).parents[2] / "simulations" / "quickstart"


KEYS = {
    "model": "random:opt-tiny", "task": "sms-spam", "cut-layer": 1, "steps": 12, "eval-every": 6,
    "eval-examples": 40, "num-clients": 3, "batch-size": 4, "max-length": 32,
    "server-optimizer": "adamw", "threads": 1, "save-model": False, "client-learning-rate": 1e-4,
    "client-trainable": "blocks",
}  # fmt: skip


def run_plain(keys):
    plain = [f"{key}={json.dumps(value)}" for key, value in {**keys, "run-name": "plain"}.items()]
    run_in_process(load_method(read_app_config(QUICK, plain)))


# tokens go back and forth, each side with its own cache
GENERATION = {
    "task": "squad", "prompt": "", "verbalizers": "", "max-new-tokens": 4, "max-length": 64,
    "steps": 26, "eval-every": 13, "eval-batch-size": 3, "batch-size": 2,
    "server-learning-rate": 0.03,
}  # fmt: skip


# the whole model on the clients, which add noise
PRIVATE = {
    "cut-layer": 4, "dp-noise": 1.0, "dp-clip": 5.0, "evaluation": "central",
    "server-optimizer": "sgd", "server-learning-rate": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "own"),
    [
        ("strategies.hosl:Hosl", {"labels": "client"}),
        ("strategies.ho_sfl:HoSfl", GENERATION),
        ("strategies.full_zo:FullZo", PRIVATE),
    ],
    ids=["hosl-with-labels-on-clients", "ho-sfl-that-writes-answers", "private-full-zo"],
)
def test_a_deployment_over_streams_gives_the_same_bits(tmp_path, monkeypatch, strategy, own):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if own is PRIVATE:  # devices have secrets of their own; of the same one come the same bits
        secret = tmp_path / "data" / "hosl-flower" / "noise-secret"
        secret.parent.mkdir(parents=True)
        secret.write_text(simulated_secret(0).hex())
        secret.chmod(0o600)
    keys = {**KEYS, **own, "strategy": strategy, "output-dir": str(tmp_path)}
    allowed = ""
    if own is GENERATION:
        keys["data-path"] = str(write_questions(tmp_path / "squad"))
        allowed = f'allow-data="{keys["data-path"]}"'  # each node has all of it, as a run names it
    with deployment(nodes=2, node_config=allowed) as environment:
        over = {**keys, "run-name": "stream", "stream-endpoint": f"127.0.0.1:{free_port()}"}
        log = run_deployed(environment, QUICK, over, 200.0)
    run_plain(keys)
    curve = metrics(tmp_path / "stream")
    assert curve == metrics(tmp_path / "plain")
    if own is GENERATION:  # one answer of two is right, the other is in part
        assert curve[-1]["held_out"]["exact_match"] < curve[-1]["held_out"]["f1"] < 1
    results = json.loads((tmp_path / "stream" / "results.json").read_text())
    assert results["clients"]["fingerprint_checked"] == [0, 1, 2]
    assert (results["privacy"] is not None) == (own is PRIVATE)
    assert "of 2 node(s) have come to 127.0.0.1" in log  # the second may join a moment later


def test_a_run_that_names_a_file_of_the_nodes_ends_with_a_reason_and_without_its_content(tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("hunter2,hunter3\n")
    keys = {
        **KEYS, "strategy": "strategies.ho_sfl:HoSfl", "data-path": str(secret),
        "output-dir": str(tmp_path), "run-name": "stopped", "num-clients": 1,
    }  # fmt: skip
    with deployment(nodes=1) as environment, pytest.raises(TimeoutError) as error:
        run_deployed(environment, QUICK, keys, 200.0)
    assert "this SuperNode opens no path that a run names" in str(error.value)
    assert "hunter" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clients_on_a_cpu_and_on_cuda_share_one_ledger(tmp_path):
    keys = {
        **KEYS, "strategy": "strategies.ho_sfl:HoSfl", "client-optimizer": "adamw",
        "output-dir": str(tmp_path), "run-name": "mixed",
        "stream-endpoint": f"127.0.0.1:{free_port()}",
    }  # fmt: skip
    with deployment(nodes=3, devices=["cpu", "cuda", "cpu"]) as environment:
        run_deployed(environment, QUICK, keys, 200.0)
    clients = json.loads((tmp_path / "mixed" / "results.json").read_text())["clients"]
    # each client hashed its weights, and the server's replay has the same hash
    assert clients["fingerprint_checked"] == [0, 1, 2]


def processes(environment):
    """Pids of a deployment."""
    own = f"FLWR_HOME={environment['FLWR_HOME']}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if own in (path / "environ").read_bytes().split(b"\0"):
                yield int(path.name)


def command_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def client_apps(environment):
    """Pids of the ClientApp processes of a deployment."""
    return [pid for pid in processes(environment) if b"clientapp" in command_of(pid).lower()]


def test_a_clientapp_killed_in_the_middle_comes_back_with_the_same_numbers(tmp_path):
    keys = {
        **KEYS, "strategy": "strategies.ho_sfl:HoSfl", "steps": 150, "eval-every": 150,
        "output-dir": str(tmp_path),
    }  # fmt: skip
    killed = []

    def kill(environment):
        log = tmp_path / "stream" / "metrics.jsonl"
        give_up = time.monotonic() + 150
        while time.monotonic() < give_up and not killed:
            if log.is_file() and len(log.read_text().splitlines()) > 20:
                killed.extend(client_apps(environment))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    with deployment(nodes=1) as environment:
        over = {**keys, "run-name": "stream", "stream-endpoint": f"127.0.0.1:{free_port()}"}
        killer = threading.Thread(target=kill, args=(environment,))
        killer.start()
        log = run_deployed(environment, QUICK, over, 300.0)
        killer.join()
    assert killed
    assert "is called again" in log
    run_plain(keys)
    assert metrics(tmp_path / "stream") == metrics(tmp_path / "plain")


def server_app(environment):
    """Pid of the ServerApp process of a deployment."""
    return next(pid for pid in processes(environment) if b"serverapp" in command_of(pid).lower())


def test_a_run_whose_server_app_is_killed_is_resumed_with_the_same_bits(tmp_path):
    keys = {
        **KEYS, "strategy": "strategies.ho_sfl:HoSfl", "steps": 80, "eval-every": 40,
        "checkpoint-every": 10, "output-dir": str(tmp_path),
    }  # fmt: skip
    directory = tmp_path / "stream"

    def kill(environment):
        give_up = time.monotonic() + 150
        while time.monotonic() < give_up and not list(directory.glob("checkpoint-[2-9]0")):
            time.sleep(0.02)
        os.kill(server_app(environment), signal.SIGKILL)
        for pid in processes(environment):  # `flwr run` would wait for the SuperLink to notice
            if b"--stream" in command_of(pid):
                os.kill(pid, signal.SIGKILL)

    with deployment(nodes=2) as environment:
        over = {**keys, "stream-endpoint": f"127.0.0.1:{free_port()}"}
        killer = threading.Thread(target=kill, args=(environment,))
        killer.start()
        with pytest.raises(TimeoutError):
            run_deployed(environment, QUICK, {**over, "run-name": "stream"}, 200.0)
        killer.join()
        assert metrics(directory)[-1]["step"] < 80
        over["stream-endpoint"] = f"127.0.0.1:{free_port()}"
        again = {**over, "run-name": "again", "resume": str(directory)}
        log = run_deployed(environment, QUICK, again, 300.0, directory / "results.json")
    assert "resumed after step" in log
    run_plain(keys)
    assert metrics(directory) == metrics(tmp_path / "plain")


def test_flower_messages_of_several_steps_and_sessions_that_are_renewed(tmp_path):
    keys = {
        **KEYS, "strategy": "strategies.ho_sfl:HoSfl", "steps": 4, "eval-every": 4,
        "steps-per-message": 4, "evaluation": "central", "output-dir": str(tmp_path),
    }  # fmt: skip
    with deployment(nodes=1) as environment:
        run_deployed(environment, QUICK, {**keys, "run-name": "grid", "link": "grid"}, 400.0)
        log = run_deployed(
            environment,
            QUICK,
            {
                **keys, "run-name": "stream", "max-session-seconds": 1.0,
                "stream-endpoint": f"127.0.0.1:{free_port()}",
            },
            300.0,
        )  # fmt: skip
    run_plain(keys)
    assert metrics(tmp_path / "grid") == metrics(tmp_path / "plain")
    assert metrics(tmp_path / "stream") == metrics(tmp_path / "plain")
    assert "1 session(s) have lasted 1 s and are opened anew" in log
