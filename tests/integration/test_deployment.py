"""Real SuperLink, SuperNodes and ClientApp processes on loopback."""

import json
from pathlib import Path

import pytest
from deployments import deployment, run_deployed
from runs import metrics

from hosl_flower.cli import read_app_config
from hosl_flower.local_flower import _free_port
from hosl_flower.server_app import load_strategy

QUICK = Path(__file__).parents[2] / "simulations" / "quickstart"


@pytest.mark.parametrize("strategy", ["strategies.hosl:Hosl", "strategies.ho_sfl:HoSfl"])
def test_a_deployment_over_streams_gives_the_same_bits(tmp_path, strategy):
    keys = {
        "strategy": strategy, "model": "random:opt-tiny", "task": "sms-spam", "cut-layer": 1,
        "steps": 12, "eval-every": 6, "eval-examples": 40, "num-clients": 3, "batch-size": 4,
        "max-length": 32, "server-optimizer": "adamw", "threads": 1, "save-model": False,
        "client-learning-rate": 1e-4, "client-trainable": "blocks",
        "output-dir": str(tmp_path),
    }  # fmt: skip
    with deployment(nodes=2) as environment:
        over = {**keys, "run-name": "stream", "stream-endpoint": f"127.0.0.1:{_free_port()}"}
        log = run_deployed(environment, QUICK, over, 200.0)
    plain = [f"{key}={json.dumps(value)}" for key, value in {**keys, "run-name": "plain"}.items()]
    load_strategy(read_app_config(QUICK, plain)).run_in_process()
    assert metrics(tmp_path / "stream") == metrics(tmp_path / "plain")
    results = json.loads((tmp_path / "stream" / "results.json").read_text())
    assert results["clients"]["fingerprint_checked"] == [0, 1, 2]
    assert "streams: 2 of 2 node(s) have come" in log
