"""A whole deployment on this machine, with everything on that a real one has.

    make deploy-demo            (python deploy/demo.py [--keep])

A CA and certificates, a SuperLink with TLS that only lets registered SuperNodes in, three
SuperNodes with a key and data of their own, one run of HO-SFL over streams with TLS, its
results under runs/. Every command is printed as one would type it. All that was started is
stopped in the end. --keep leaves the directory with certificates, keys, data and logs.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from hosl_flower.flower.processes import (
    MARK,
    RunFailedError,
    free_port,
    script,
    stop,
    wait_until_healthy,
)
from hosl_flower.system.bundled import BUNDLED
from hosl_flower.system.proxies import without_loopback

HERE = Path(__file__).parent
NODES = 3
RUN = {
    "model": "random:opt-tiny", "cut-layer": 1, "task": "sms-spam", "max-length": 64,
    "num-clients": NODES, "clients-per-step": 2, "min-clients": 2, "directions": 2,
    "client-trainable": "full", "client-learning-rate": 1e-4, "server-optimizer": "adamw",
    "server-learning-rate": 5e-4, "steps": 30, "batch-size": 16, "eval-every": 10,
    "eval-batch-size": 100, "checkpoint-every": 10, "save-model": False, "threads": 1,
}  # fmt: skip


class Deployment:
    """One SuperLink and its SuperNodes; processes are known by a mark and stopped together."""

    def __init__(self, home: Path):
        self.home, self.port = home, free_port()
        self.authority = home / "certificates" / "ca.crt"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            MARK: f"demo{os.getpid()}-{self.port}",
            **without_loopback(os.environ),
            "PYTHONIOENCODING": "utf-8",  # as this process reads what they print
            "FLWR_HOME": str(home / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def do(self, *command: str) -> str:
        """Run a command to its end; what it says. RunFailedError when it fails."""
        say(command)
        done = subprocess.run(
            [script(command[0]), *command[1:]],
            env=self.environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            raise RunFailedError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a command that goes on; its output goes to a log."""
        say([*command, "&"])
        with (self.home / f"{log}.log").open("wb") as file:
            process = subprocess.Popen(
                [script(command[0]), *command[1:]],
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_superlink(self) -> None:
        """With TLS, for registered SuperNodes only."""
        certificates = self.home / "certificates"
        self.do(str(HERE / "certificates.sh"), str(certificates), "localhost")
        (self.home / "flwr").mkdir(exist_ok=True)
        (self.home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "demo"\n\n[superlink.demo]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.authority}"\n',
            encoding="utf-8",
        )
        superlink = self.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.authority)),
            *("--ssl-certfile", str(certificates / "server.crt")),
            *("--ssl-keyfile", str(certificates / "server.key")),
            "--enable-supernode-auth",
        )
        wait_until_healthy(self.port, superlink, self.home / "superlink.log", self.authority)

    def make_key(self, name: str) -> Path:
        """A node's private key; the public one is beside it."""
        self.do(str(HERE / "node_key.sh"), str(self.home / "keys"), name)
        return self.home / "keys" / name

    def register(self, key: Path) -> None:
        """Let the SuperNode with this key in."""
        self.do("flwr", "supernode", "register", f"{key}.pub", "demo")

    def start_supernode(self, number: int, key: Path, data: Path) -> subprocess.Popen[bytes]:
        """One device, with data of its own."""
        return self.start(
            f"supernode{number}",
            *("flower-supernode", "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.authority)),
            *("--auth-supernode-private-key", str(key)),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f'partition-id={number} data-path="{data}"'),
        )

    def run(self, keys: dict[str, object], output: Path, name: str, seconds: float) -> Path:
        """Submit a run over streams with TLS; path of its results."""
        certificates = self.home / "certificates"
        keys = {
            **keys,
            "output-dir": str(output), "run-name": name,
            "stream-endpoint": f"127.0.0.1:{free_port()}",
            "stream-certificate": str(certificates / "server.crt"),
            "stream-key": str(certificates / "server.key"),
            "stream-authority": str(self.authority),
        }  # fmt: skip
        config = self.home / f"{name}.toml"
        config.write_text(tomli_w.dumps(keys), encoding="utf-8")
        app = HERE.parent / "simulations" / "opt125m_ho_sfl"
        command = ["flwr", "run", str(app), "demo", "--stream", "--run-config", str(config)]
        say(command)
        subprocess.run(
            [script("flwr"), *command[1:]], env=self.environment, check=False, timeout=seconds
        )
        results = output / name / "results.json"
        give_up = time.monotonic() + 10  # the ServerApp may be a moment behind its log
        while not results.is_file() and time.monotonic() < give_up:
            time.sleep(0.1)
        if not results.is_file():
            raise RunFailedError(f"the run did not finish; the logs are in {self.home}")
        return results

    def stop(self) -> None:
        """End everything that was started."""
        for process in reversed(self.processes):
            stop(process, self.environment[MARK])


def say(command: list[str] | tuple[str, ...]) -> None:
    print("$", " ".join(part if part == "&" else shlex.quote(part) for part in command), flush=True)


@contextmanager
def deployment(home: Path) -> Iterator[Deployment]:
    """A SuperLink that is up, stopped with all its SuperNodes in the end."""
    own = Deployment(home)
    try:
        own.start_superlink()
        yield own
    finally:
        own.stop()


def write_data(directory: Path) -> list[Path]:
    """The bundled SMS collection, dealt to NODES files, one for each device."""
    directory.mkdir()
    header, *rows = (
        (BUNDLED / "sms_spam" / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    )
    paths = [directory / f"device{number}.tsv" for number in range(NODES)]
    for number, path in enumerate(paths):
        path.write_text("".join([header, *rows[number::NODES]]), encoding="utf-8")
    return paths


def demo(home: Path, output: Path) -> Path:
    """Everything, once; path of the results."""
    data = write_data(home / "data")
    with deployment(home) as own:
        for number, path in enumerate(data):
            key = own.make_key(f"device{number}")
            own.register(key)
            own.start_supernode(number, key, path)
        return own.run(RUN, output, time.strftime("%Y%m%d-%H%M%S-deploy-demo"), seconds=540)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave keys, data and logs")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs", help="for the results")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="hosl-demo-"))
    try:
        results = demo(home, arguments.out.absolute())
    except RunFailedError as error:
        sys.exit(f"error: {error}")
    except subprocess.TimeoutExpired:
        sys.exit(f"error: the run takes too long; the logs are in {home}")
    if not arguments.keep:
        shutil.rmtree(home, ignore_errors=True)
    clients = json.loads(results.read_text(encoding="utf-8"))["clients"]
    print(f"took part: {clients['steps_taken_part']}; results: {results}")


if __name__ == "__main__":
    main()
