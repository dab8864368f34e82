"""The real hub code path, against a small server that speaks the hub's download protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of <org>/<name>/resolve/<revision>/<file>, as huggingface.co answers them."""

    repositories: dict[str, Path]
    requested: list[str]

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        self.requested.append(self.path)
        org, name, verb, _, *file = [*self.path.split("?")[0].strip("/").split("/"), *[""] * 4][:5]
        path = self.repositories.get(f"{org}/{name}", Path("/none")) / (file[0] or "none")
        if self.path == "/":
            self._send(200, {}, b"", body)
        elif self.path.startswith("/api/models/"):
            self._answer_api(body)
        elif verb == "resolve" and path.is_file():
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(200, headers, data, body)
        else:
            known = f"{org}/{name}" in self.repositories
            code = "EntryNotFound" if known else "RepoNotFound"
            self._send(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b"", body)

    def _answer_api(self, body):
        """Repository information, which transformers asks for beside the files."""
        org, name = self.path.split("?")[0].split("/")[3:5]
        directory = self.repositories.get(f"{org}/{name}")
        if directory is None or "/tree/" in self.path:
            code = "RepoNotFound" if directory is None else "EntryNotFound"
            self._send(404, {"X-Error-Code": code}, b"", body)
            return
        files = [{"rfilename": path.name} for path in directory.iterdir()]
        model = {"id": f"{org}/{name}", "sha": COMMIT, "siblings": files, "tags": []}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(model).encode(), body)

    def _send(self, status, headers, data, body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


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
