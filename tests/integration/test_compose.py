"""deploy/compose.yaml: a SuperLink and three SuperNodes in containers, a run, its results."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from hosl_flower.flower.processes import free_port, script

ROOT = Path(__file__).parents[2]
OWNER = (12345, 12345) if os.getuid() == 0 else (os.getuid(), os.getgid())
RUN = {
    "model": "random:opt-tiny", "cut-layer": 1, "task": "sms-spam", "max-length": 32,
    "strategy": "strategies.ho_sfl:HoSfl", "num-clients": 3, "min-clients": 3, "steps": 6,
    "batch-size": 4, "eval-every": 6, "eval-examples": 20, "save-model": False, "threads": 1,
    "trackers": "", "run-name": "contained", "nodes-deadline": 300.0,
    "stream-endpoint": "superlink:8443", "stream-certificate": "/run/secrets/server.crt",
    "stream-key": "/run/secrets/server.key", "stream-authority": "/run/secrets/ca.crt",
}  # fmt: skip


def works(*command: str) -> bool:
    """Whether it is there and ends well."""
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Containers:
    """The file's services, as a project of its own in a directory of its own."""

    def __init__(self, home: Path):
        self.home, self.port = home, free_port()
        new = works("docker", "compose", "version")  # else the older command
        self.compose = ["docker", "compose"] if new else ["docker-compose"]
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": f"hosl{os.getpid()}",
            "OWNER": "{}:{}".format(*OWNER),
            "PORT": str(self.port),
            "STREAM_PORT": str(free_port()),
            "FLWR_HOME": str(home / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        (home / "deploy").mkdir()
        shutil.copy(ROOT / "deploy" / "compose.yaml", home / "deploy")
        certificates, keys = home / "certificates", home / "keys"
        self.do(ROOT / "deploy" / "certificates.sh", certificates, "superlink")
        for number in range(3):
            self.do(ROOT / "deploy" / "node_key.sh", keys, f"device{number}")
        for path in [*certificates.iterdir(), *keys.iterdir()]:
            os.chown(path, *OWNER)
        (home / "flwr").mkdir()
        (home / "flwr" / "config.toml").write_text(
            f'[superlink.mine]\naddress = "localhost:{self.port}"\n'
            f'root-certificates = "{certificates / "ca.crt"}"\n'
        )

    def do(self, *command: str | Path, check: bool = True) -> str:
        """What it says."""
        done = subprocess.run(
            [str(part) for part in command], env=self.environment, cwd=self.home / "deploy",
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def register(self, number: int) -> None:
        """Let a SuperNode in, as soon as the SuperLink answers."""
        key = self.home / "keys" / f"device{number}.pub"
        give_up = time.monotonic() + 120
        while "registered successfully" not in (
            said := self.do(script("flwr"), "supernode", "register", key, "mine", check=False)
        ):
            assert time.monotonic() < give_up, said + self.do(*self.compose, "logs")
            time.sleep(1)


@pytest.mark.skipif(
    not works("docker", "image", "inspect", "hosl-flower"),
    reason="needs Docker and the image: docker build -f deploy/Dockerfile -t hosl-flower .",
)
def test_a_superlink_and_three_supernodes_in_containers_train(tmp_path):
    containers = Containers(tmp_path)
    try:
        containers.do(*containers.compose, "up", "-d")
        for number in range(3):
            containers.register(number)
        config = tmp_path / "run.toml"
        config.write_text("".join(f"{key} = {json.dumps(v)}\n" for key, v in RUN.items()))
        log = containers.do(
            script("flwr"), "run", ROOT / "simulations" / "quickstart", "mine", "--stream",
            "--run-config", config,
        )  # fmt: skip
        kept = "superlink:/var/lib/hosl-flower/runs/contained/results.json"
        name = containers.do(*containers.compose, "ps", "-q", "superlink").strip()
        containers.do("docker", "cp", kept.replace("superlink", name, 1), tmp_path)
        clients = json.loads((tmp_path / "results.json").read_text())["clients"]
        assert clients["fingerprint_checked"] == [0, 1, 2], log
        assert set(clients["steps_taken_part"].values()) == {6}
        assert not clients["dropped"]
    finally:
        containers.do(*containers.compose, "down", "--volumes", "--timeout", "5", check=False)
