"""The real hub code path, against a small server that speaks the hub's download protocol."""

import json
import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hub_server import Hub

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub():
    handler = type("TestHub", (Hub,), {"repositories": {}, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def train(tmp_path, endpoint, name, *extra):
    arguments = [
        "-c", "model=facebook/opt-test", "-c", "steps=2", "-c", "eval-every=2", "-c", "threads=1",
        "-c", "eval-examples=20", "-c", f"output-dir={tmp_path}", "-c", f"run-name={name}",
        "-c", "save-model=false", *extra,
    ]  # fmt: skip
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"),
        "HOSL_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-m", "hosl_flower", "run", "simulations/quickstart", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_hub_model_is_downloaded_once_and_then_works_offline(hub, tiny_opt, tmp_path):
    handler, endpoint = hub
    directory, model = tiny_opt(vocab_size=50272, max_position_embeddings=128)
    (directory / "model.safetensors").unlink()  # facebook/opt-* publish only the legacy file
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    handler.repositories["facebook/opt-test"] = directory

    online = train(tmp_path, endpoint, "online")
    assert online.returncode == 0, online.stderr
    assert any(path.endswith("/pytorch_model.bin") for path in handler.requested)

    offline = train(tmp_path, "http://127.0.0.1:9", "offline")  # nobody listens there
    assert offline.returncode == 0, offline.stderr
    first, second = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("online", "offline")
    )
    assert first["pretrained"] is second["pretrained"] is True
    assert first["fingerprint"] == second["fingerprint"]
    assert first["loss"] == second["loss"]


def test_a_name_the_hub_does_not_know_is_one_clear_line(hub, tmp_path):
    _, endpoint = hub
    done = train(tmp_path, endpoint, "unknown")
    assert done.returncode == 1
    assert "facebook/opt-test" in done.stderr
    assert "check the name" in done.stderr
    assert "Traceback" not in done.stderr
