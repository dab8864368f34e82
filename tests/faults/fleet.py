"""A fleet on this machine: SuperLink, SuperNodes, ServerApp and ClientApps in real processes, each
of which can be killed on its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runs import metrics

from hosl_flower.config.app_config import read_app_config
from hosl_flower.flower.processes import MARK, free_port, script, stop, wait_until_healthy
from hosl_flower.methods.load import load_method
from hosl_flower.run.start import run_in_process

APP = Path(__file__).parents[2] / "simulations" / "quickstart"
KEYS = {
    "strategy": "strategies.ho_sfl:HoSfl", "model": "random:opt-tiny", "task": "sms-spam",
    "cut-layer": 1, "steps": 60, "eval-every": 30, "eval-examples": 40, "num-clients": 3,
    "batch-size": 4, "max-length": 32, "server-optimizer": "adamw", "threads": 1,
    "save-model": False, "client-learning-rate": 1e-4, "client-trainable": "blocks",
    "min-clients": 3, "checkpoint-every": 5, "nodes-deadline": 300.0, "reply-deadline": 300.0,
    "trackers": "",
}  # fmt: skip


def wait_for(what: str, condition: Callable[[], object], seconds: float = 300.0):
    """The condition's first true value; TimeoutError, which is a hang, when there is none."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if value := condition():
            return value
        time.sleep(0.02)
    raise TimeoutError(f"in {seconds:g} s there was not: {what}")


class Run:
    """A run, as its directory shows it; number: Flower's, once it is submitted. What the log of a
    run that is resumed says already is of the past."""

    def __init__(self, directory: Path):
        self.directory, self.number = directory, ""
        self.alive: Callable[[], object] = lambda: True
        self.said: Callable[[], str] = str  # what Flower has kept of its output
        self._past = ""
        self._past = self.log

    @property
    def log(self) -> str:
        """What it has said."""
        with contextlib.suppress(OSError):
            return (self.directory / "log.txt").read_text(errors="replace").removeprefix(self._past)
        return ""

    @property
    def step(self) -> int:
        """The last step it has completed."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return json.loads((self.directory / "metrics.jsonl").read_text().splitlines()[-1])[
                "step"
            ]
        return -1

    @property
    def ended(self) -> str:
        """The line that says how it ended; "" while it goes on."""
        if (self.directory / "results.json").is_file():
            return "finished"
        if not self.log and not self.alive():
            return f"the ServerApp has ended before it had a run directory\n{self.said()}"
        lines = [line.split(" ", 2)[2] for line in self.log.splitlines() if line.count(" ") > 1]
        ends = [line for line in lines if line.startswith(("run failed: ", "run stopped: "))]
        return ends[-1] if ends else ""

    def reach(self, step: int) -> None:
        """Wait until a step is completed."""
        wait_for(
            f"step {step} of {self.directory.name}", lambda: self.step >= step or self.ended, 600
        )
        assert self.step >= step, self.log or self.ended

    def end(self, seconds: float = 600.0) -> str:
        """Wait for its end; how it ended."""
        try:
            return wait_for(f"an end of {self.directory.name}", lambda: self.ended, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log}") from error

    def results(self, seconds: float = 600.0) -> dict:
        """Of a run that finishes."""
        assert self.end(seconds) == "finished", self.log
        return json.loads((self.directory / "results.json").read_text())

    @property
    def curve(self) -> list[dict]:
        """What it measured."""
        return metrics(self.directory)


def plain(output: Path, name: str, **keys) -> list[dict]:
    """The curve of the same run without Flower and faults."""
    only_real = {"step-deadline", "stream-endpoint", "stream-bind"}
    wanted = {**KEYS, **keys, "checkpoint-every": 0, "output-dir": str(output), "run-name": name}
    pairs = [f"{key}={json.dumps(v)}" for key, v in wanted.items() if key not in only_real]
    run_in_process(load_method(read_app_config(APP, pairs)))
    return metrics(output / name)


class Fleet:
    """Everything is started in processes of their own groups and known by a mark."""

    def __init__(self, home: Path):
        self.home = home
        self.port, self.control = free_port(), free_port()
        self.environment = {
            MARK: f"fleet{os.getpid()}-{self.port}",
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "fleet"\n\n[superlink.fleet]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.nodes: dict[int, subprocess.Popen] = {}  # by partition-id
        self.started: list[subprocess.Popen] = []
        self.superlink: subprocess.Popen | None = None

    def start(self, name: str, *arguments: str, **more: str) -> subprocess.Popen:
        """One of Flower's commands. more: for its environment."""
        with (self.home / f"{len(self.started)}-{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [script(name), "--insecure", *arguments],
                env={**self.environment, **more},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def start_superlink(self, **more: str) -> None:
        """Wait until it answers."""
        self.superlink = self.start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--control-api-address", f"127.0.0.1:{self.control}"),
            **more,
        )
        log = self.home / f"{len(self.started) - 1}-flower-superlink.log"
        wait_until_healthy(self.port, self.superlink, log)

    def start_node(self, number: int, of: int = 3, port: int = 0, **more: str) -> subprocess.Popen:
        """A SuperNode. port: of what it takes for SuperLink."""
        node = self.start(
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{port or self.port}"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--node-config", f"partition-id={number} num-partitions={of}"),
            **more,
        )
        self.nodes[number] = node
        return node

    def ensure(self, count: int = 3) -> None:
        """SuperLink and this many SuperNodes run, and no earlier run."""
        for pid in self.apps("serverapp"):  # of a test that failed
            kill(pid)
        if self.superlink is None or self.superlink.poll() is not None:
            self.start_superlink()
        for number in range(count):
            if number not in self.nodes or self.nodes[number].poll() is not None:
                self.start_node(number, count)

    def submit(self, output: Path, name: str, **keys) -> Run:
        """Submit a run over streams, whose ServerApp is there when this returns."""
        run = Run(Path(keys["resume"]) if "resume" in keys else output / name)
        port = free_port()
        endpoint = {"stream-endpoint": f"127.0.0.1:{port}"} if keys.get("link") != "grid" else {}
        wanted = {**KEYS, **endpoint, "output-dir": str(output), "run-name": name, **keys}
        config = self.home / f"{output.parent.name}-{name}.toml"
        config.write_text("".join(f"{key} = {json.dumps(v)}\n" for key, v in wanted.items()))
        done = subprocess.run(
            [
                script("flwr"), "run", str(APP), "fleet", "--run-config", str(config),
                "--format", "json",
            ],
            env=self.environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for("a ServerApp", lambda: self.apps("serverapp"))
        run.alive, run.said = lambda: self.apps("serverapp"), lambda: self.end(run)
        run.number = str(json.loads(done.stdout[done.stdout.index("{") :])["run-id"])
        return run

    def end(self, run: Run) -> str:
        """Wait for the end of the ServerApp; what Flower has kept of what it said."""
        wait_for("the end of the ServerApp", lambda: not self.apps("serverapp"), 600)
        done = subprocess.run(
            [script("flwr"), "log", run.number, "fleet", "--show"],
            env=self.environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def apps(self, kind: str, below: subprocess.Popen | None = None) -> list[int]:
        """Pids of the "serverapp" or "clientapp" processes, of one SuperNode or of all."""
        mark = f"{MARK}={self.environment[MARK]}".encode()
        found = []
        for pid in processes():  # asked often: the cheapest question first
            with contextlib.suppress(OSError):
                path = Path("/proc", str(pid))
                if f"flwr-{kind}".encode() not in (path / "cmdline").read_bytes().lower():
                    continue
                marked = mark in (path / "environ").read_bytes().split(b"\0")
                if marked and (below is None or below.pid in ancestors(pid)):
                    found.append(pid)
        return found

    def kill_clients(self, number: int) -> int:
        """Kill -9 of a node's ClientApps; how many there were."""
        pids = self.apps("clientapp", self.nodes[number])
        for pid in pids:
            kill(pid)
        return len(pids)

    def kill_node(self, number: int) -> None:
        """Kill -9 of a SuperNode, and of what it started, as when a device loses its power."""
        below = self.below(number)
        node = self.nodes.pop(number)
        for pid in (node.pid, *below):
            kill(pid)
        node.wait()

    def below(self, number: int) -> list[int]:
        """Pids of what a SuperNode has started: its SuperExec, and that one's ClientApps."""
        return [pid for pid in processes() if self.nodes[number].pid in ancestors(pid)]

    def stop(self) -> None:
        """End everything."""
        for process in reversed(self.started):
            stop(process, self.environment[MARK])
        self.nodes.clear()
        self.superlink = None


def processes() -> list[int]:
    """Pids of all there are."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def ancestors(pid: int) -> set[int]:
    """Pids of a process's parents, their parents and so on."""
    found: set[int] = set()
    with contextlib.suppress(OSError, ValueError):
        while pid > 1:
            pid = int(
                Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
            )
            found.add(pid)
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Of a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def slowed(pids: list[int], times: float, period: float = 0.2) -> Iterator[None]:
    """These processes get one part in `times` of the time, as on a slower device."""
    over = threading.Event()

    def brake() -> None:
        while not over.is_set():
            for pid in pids:
                kill(pid, signal.SIGSTOP)
            over.wait(period * (1 - 1 / times))
            for pid in pids:
                kill(pid, signal.SIGCONT)
            time.sleep(period / times)

    thread = threading.Thread(target=brake)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    """Stopped in the end, with its logs left behind only on request (KEEP)."""
    home = Path(tempfile.mkdtemp(prefix="hosl-fleet-"))
    own = Fleet(home)
    try:
        yield own
    finally:
        own.stop()
        if not os.environ.get("KEEP"):
            shutil.rmtree(home, ignore_errors=True)
