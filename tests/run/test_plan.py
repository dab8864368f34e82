"""`plan`: what a run will need, against what runs have needed."""

import json
import math
from pathlib import Path

import pytest
from runs import PROMPT, write_reviews
from typer.testing import CliRunner

from hosl_flower.cli import cli
from hosl_flower.config.parse import parse_config
from hosl_flower.errors import ConfigError
from hosl_flower.methods.load import load_method
from hosl_flower.run.plan import PROCESS_BYTES, Plan, parse_bytes, parse_rate, plan
from hosl_flower.run.plan_table import plan_table
from hosl_flower.run.start import run_in_process


@pytest.fixture
def keys(tiny_opt, tmp_path, monkeypatch):
    monkeypatch.setattr("hosl_flower.run.plan._SECONDS", 0.0)  # two steps
    model, _ = tiny_opt(vocab_size=50272, max_position_embeddings=128)
    return {
        "model": str(model), "data-path": str(write_reviews(tmp_path / "reviews")),
        "task": "reviews", "prompt": PROMPT, "verbalizers": "terrible,great", "cut-layer": 2,
        "steps": 3, "eval-every": 2, "batch-size": 5, "eval-batch-size": 7, "max-length": 64,
        "threads": 1, "seed": 3, "device": "cpu", "output-dir": str(tmp_path / "runs"),
        "client-trainable": "blocks", "save-model": False,
    }  # fmt: skip


STRATEGIES = {
    "hosl": {"strategy": "strategies.hosl:Hosl"},
    "ho-sfl": {"strategy": "strategies.ho_sfl:HoSfl", "num-clients": 3, "clients-per-step": 2},
    "labels": {
        "strategy": "strategies.ho_sfl:HoSfl", "labels": "client",
        "verbalizers": "terrible,not great at all",
    },
    "heron": {"strategy": "strategies.heron:Heron", "upload-every": 3},
    "frozen": {"strategy": "strategies.frozen_client:FrozenClient", "client-trainable": "full"},
    "residual": {
        "strategy": "strategies.split_fo:SplitFo", "client-gradient": "residual",
        "client-optimizer": "adafactor", "local-steps": 4, "steps": 4, "eval-every": 4,
        "client-trainable": "full",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_plan_is_what_the_run_then_needs(keys, name):
    config = parse_config({**keys, **STRATEGIES[name]})
    planned = plan(config)
    assert not Path(config.run.output_dir).exists()
    results = run_in_process(load_method(config))
    assert planned.client_parameters == results.client_parameters["held"]
    assert planned.client_trained == results.client_parameters["trained"]
    others = {"describe", "fingerprint", "evaluate"}
    sent = sum(n["bytes"] for k, n in results.bytes_up.items() if k not in others)
    # batches differ in length, one step from the next
    assert planned.up_bytes == pytest.approx(sent / config.steps, rel=0.35)
    clients = sum(results.clients["steps_taken_part"].values()) / config.steps
    assert planned.clients == clients
    needed = results.client_peak_memory["tensor_bytes"]
    for phase, peak in needed.items():
        most = planned.peak_bytes.get(phase, 0)
        assert peak <= 1.01 * most, (phase, needed, planned.peak_bytes)


def numbers(**changes):
    values = {
        "method": "hosl", "model": "m", "pretrained": True, "steps": 10, "clients": 2.0,
        "client_parameters": 1, "client_trained": 1, "server_trained": 1,
        "client_weight_bytes": 4, "peak_bytes": {"load": 50, "forward": 100, "probe": 110},
        "up_bytes": 400.0, "down_bytes": 80.0, "client_seconds": 6.0, "server_seconds": 1.0,
        "evaluation_bytes": 1000.0, "evaluation_seconds": 5.0, "evaluations": 3,
    }  # fmt: skip
    return Plan(**{**values, **changes})


def test_times_are_sums_of_computing_and_sending():
    found = numbers()
    assert found.step_seconds(math.inf, math.inf) == 6 / 2 + 1
    assert found.step_seconds(100.0, math.inf) == 4 + 400 / 2 / 100
    assert found.step_seconds(100.0, 10.0) == 6 + 80 / 2 / 10
    assert found.run_seconds(100.0, math.inf) == 10 * 6 + 3 * (5 + 1000 / 100)


def test_a_device_that_is_just_large_enough_is_a_tight_fit():
    found = numbers()
    needed = 110 + PROCESS_BYTES
    assert found.client_bytes == needed < found.worker_bytes
    assert found.fit(needed - 1) == "DOES NOT FIT"
    assert found.fit(needed) == "tight, less than 1.25 times what is needed"
    assert found.fit(1.24 * needed) == found.fit(needed)
    assert found.fit(1.25 * needed) == "fits"


def test_few_parameters_are_not_no_millions():
    found = numbers(client_parameters=2_500_000, client_trained=6_144)
    text = plan_table(found, math.inf, math.inf, math.inf)
    assert "2.5 M parameters" in text
    assert "trains 6,144" in text


def test_sizes_and_rates():
    assert parse_bytes("--x", "2GB") == 2e9
    assert parse_bytes("--x", "512MiB") == 512 * 2**20
    assert parse_rate("--x", "10Mbps") == 10e6 / 8
    assert parse_bytes("--x", "") == parse_rate("--x", "") == math.inf


@pytest.mark.parametrize("text", ["much", "10", "10MB", "0Mbps"])
def test_a_rate_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=rf"--uplink = '{text}': expected "):
        parse_rate("--uplink", text)


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"--client-memory = 'big': expected a size such as"):
        parse_bytes("--client-memory", "big")
    with pytest.raises(ConfigError, match=r"--client-memory = '2': say of what, as in 2GB"):
        parse_bytes("--client-memory", "2")


def test_the_command_says_whether_a_device_is_large_enough(keys, tmp_path, monkeypatch):
    made = []

    def once(config):
        """The first call's plan: what is said of it differs, and its making takes seconds."""
        if not made:
            made.append((config, plan(config)))
        assert config == made[0][0]
        return made[0][1]

    monkeypatch.setattr("hosl_flower.run.plan.plan", once)
    app = tmp_path / "app"
    app.mkdir()
    rows = "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    (app / "pyproject.toml").write_text(f"[tool.flwr.app.config]\n{rows}\n")
    wanted = ["plan", str(app), "--uplink", "1Mbps"]
    fits = CliRunner().invoke(cli, [*wanted, "--client-memory", "2GB"])
    assert fits.exit_code == 0
    assert "1907 MiB: fits" in fits.output
    assert "with 1 Mbps up" in fits.output
    small = CliRunner().invoke(cli, [*wanted, "--client-memory", "100MB"])
    assert small.exit_code == 1
    assert "DOES NOT FIT" in small.output
    as_json = CliRunner().invoke(cli, ["plan", str(app), "--json"])
    assert json.loads(as_json.output.splitlines()[-1])["method"] == "hosl"
