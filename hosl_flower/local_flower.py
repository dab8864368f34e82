"""`flwr run` in a private local SuperLink.

Left alone, `flwr run` reuses any SuperLink on its port, of whatever environment, leaves it
running, and exits 0 even when the run failed. Here every run has its own FLWR_HOME, free
ports and SuperLink, which is stopped with everything it started; success is judged by the
results file.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from hosl_flower.errors import HoslError

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0


class RunFailedError(HoslError):
    """A Flower run ended without results."""


def run_flower_app(
    app: Path, overrides: Mapping[str, Any], federation: str, output_directory: Path
) -> Path:
    """Run a Flower app in simulation, its log on this process's output; path of results.json.

    federation: for --federation-config, e.g. "num-supernodes=4". Raises RunFailedError.
    """
    name = str(overrides.get("run-name") or f"{time.strftime('%Y%m%d-%H%M%S')}-{app.name}")
    directory = output_directory.expanduser().absolute()
    given = {**overrides, "run-name": name, "output-dir": str(directory)}
    results = directory / name / "results.json"
    if overrides.get("resume"):
        results = Path(str(overrides["resume"])).expanduser().absolute() / "results.json"
        given["resume"] = str(results.parent)
    before = results.stat().st_mtime_ns if results.is_file() else None
    # As a file: on the command line, Flower's own parser stumbles over quotes and spaces.
    run_config = "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items())
    with private_superlink() as environment:
        overrides_file = Path(environment["FLWR_HOME"]) / "overrides.toml"
        overrides_file.write_text(run_config)
        options = ["--stream", "--run-config", str(overrides_file)]
        command = [_script("flwr"), "run", str(app), *options]
        if federation:
            command += ["--federation-config", federation]
        code = subprocess.run(command, env=environment, check=False).returncode
    written = results.is_file() and results.stat().st_mtime_ns != before
    if code != 0 or not written:
        raise RunFailedError(
            f"the run did not finish (flwr exit code {code}, no {results}); the log above says why"
        )
    return results


@contextmanager
def private_superlink() -> Iterator[dict[str, str]]:
    """A local SuperLink in simulation mode; yields the environment in which `flwr run` uses it.

    It leads a process group of its own, so stopping the group stops SuperExec, the apps and
    Ray with it, also when this process is interrupted.
    """
    home = Path(tempfile.mkdtemp(prefix="hosl-flwr-"))
    http, control = _free_port(), _free_port()
    environment = {
        # marks every descendant, those in sessions of their own too, for _stop; first, where a
        # process title that grows into the environment is least likely to cut it off
        _MARK: secrets.token_hex(8),
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if len(str(home)) < 40:  # Ray puts sockets there, whose paths may have 107 characters
        environment["RAY_TMPDIR"] = str(home)
    process: subprocess.Popen[bytes] | None = None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    try:
        with (home / "superlink.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    _script("flower-superlink"),
                    *("--insecure", "--simulation", "--isolation", "subprocess"),
                    *("--host", "127.0.0.1", "--port", str(http)),
                    *("--control-api-address", f"127.0.0.1:{control}"),
                ],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _wait_until_healthy(http, process, home / "superlink.log")
        yield environment
    finally:
        if process is not None:
            _stop(process, environment[_MARK])
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(home, ignore_errors=True)


_MARK = "HOSL_FLWR_RUN"


def _wait_until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise RunFailedError(f"the local SuperLink did not start: {tail or 'no output'}")


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the SuperLink and all it started: politely first, then for good.

    A process is known by the mark in its environment or, since Ray's overwrite theirs with a
    process title, by its line of descent, taken before any parent is gone. A pid alone may be
    reused, so it is kept with its start time.
    """
    family = _descendants(process.pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
        for pid in _alive(family, mark):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        give_up = time.monotonic() + _STOP_SECONDS
        while time.monotonic() < give_up and (process.poll() is None or _alive(family, mark)):
            time.sleep(0.1)


def _processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, start time) of every process that is not a zombie (Linux)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(path.parent.name)] = (int(fields[1]), fields[19])
    return found


def _descendants(root: int) -> dict[int, str]:
    """pid -> start time of everything below `root`."""
    processes = _processes()
    family: dict[int, str] = {}
    generation = {root}
    while generation:
        generation = {pid for pid, (parent, _) in processes.items() if parent in generation}
        family |= {pid: processes[pid][1] for pid in generation}
    return family


def _alive(family: Mapping[int, str], mark: str) -> list[int]:
    """Pids of the family, or with the mark, that still run."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for pid, (_, started) in _processes().items():
        try:
            marked = wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            marked = False
        if marked or family.get(pid) == started:
            found.append(pid)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _script(name: str) -> str:
    """A console script of this very environment, not of whatever comes first on PATH."""
    own = Path(sys.executable).parent / name
    return str(own) if own.is_file() else name
