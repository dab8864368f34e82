"""Flower's processes on this machine: starting them, waiting for them, ending all they started.

Every process of a run is known by a mark in its environment, so that only what was started here
is ever stopped: no port and no name is a safe sign of that.
"""

import contextlib
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from hosl_flower.errors import HoslError

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_PORTS = range(20_000, 32_768)  # Linux chooses beyond
_given: set[int] = set()


class RunFailedError(HoslError):
    """A Flower run ended without results."""


MARK = "HOSL_FLWR_RUN"


def wait_until_healthy(
    port: int, process: subprocess.Popen[bytes], log: Path, authority: Path | None = None
) -> None:
    """Return when the SuperLink on this machine's port answers. authority: its CA, where it has
    TLS. Raises RunFailedError when it does not come up."""
    verify = ssl.create_default_context(cafile=authority) if authority else True
    scheme = "https" if authority else "http"
    give_up = time.monotonic() + _START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        try:
            # trust_env: a proxy must not be asked for this machine
            if httpx.get(
                f"{scheme}://127.0.0.1:{port}/health", timeout=1.0, verify=verify, trust_env=False
            ).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
    raise RunFailedError(f"the local SuperLink did not start: {tail or 'no output'}")


def stop(process: subprocess.Popen[bytes], mark: str) -> None:
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
            # a process's name, in parentheses, may be any bytes
            fields = path.read_text(encoding="latin-1").rpartition(")")[2].split()
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
    wanted = f"{MARK}={mark}".encode()
    found = []
    for pid, (_, started) in _processes().items():
        try:
            marked = wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            marked = False
        if marked or family.get(pid) == started:
            found.append(pid)
    return found


def free_port() -> int:
    """A TCP port of this machine that nobody listens on, another one each time. OSError without.

    Not one the system would choose: until somebody listens on it, that may go to an outgoing
    connection or be chosen once more.
    """
    for _ in range(1000):
        port = _PORTS.start + secrets.randbelow(len(_PORTS))
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return port
    raise OSError(f"no port of {_PORTS.start} to {_PORTS.stop - 1} is free")


def script(name: str) -> str:
    """A console script of this very environment, not of whatever comes first on PATH."""
    own = Path(sys.executable).parent / name
    return str(own) if own.is_file() else name
