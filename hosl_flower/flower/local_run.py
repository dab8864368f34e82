"""`flwr run` in a private local SuperLink.

Left alone, `flwr run` reuses any SuperLink on its port, of whatever environment, leaves it
running, and exits 0 even when the run failed. Here every run has its own FLWR_HOME, free
ports and SuperLink, which is stopped with everything it started; success is judged by the
results file.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from hosl_flower.errors import ConfigError
from hosl_flower.flower.processes import (
    MARK,
    RunFailedError,
    free_port,
    script,
    stop,
    wait_until_healthy,
)
from hosl_flower.run.run_log import say_stopped
from hosl_flower.system.directories import claimed
from hosl_flower.system.proxies import without_loopback
from hosl_flower.system.signals import Told, exiting_when_told

_FAILED = re.compile(r"run failed: (\w+: .*)")  # the line of the ServerApp, with the kind of error


def run_flower_app(
    app: Path, overrides: Mapping[str, Any], federation: str, output_directory: Path
) -> Path:
    """Run a Flower app in simulation, its log on this process's output; path of results.json.

    federation: for --federation-config, e.g. "num-supernodes=4". Raises RunFailedError.
    """
    output = output_directory.expanduser().absolute()
    made = not output.exists()
    given = {**overrides, "output-dir": str(output)}
    if overrides.get("resume"):
        directory = Path(str(overrides["resume"])).expanduser().absolute()
        given["resume"] = str(directory)
    elif overrides.get("run-name"):
        directory = output / str(overrides["run-name"])
    else:
        directory = _named_after(app, output)
        given["run-name"] = directory.name
    results = directory / "results.json"
    before = results.stat().st_mtime_ns if results.is_file() else None
    try:
        code, reason = _submitted(app, given, federation)
    except (KeyboardInterrupt, Told) as stopped:
        say_stopped(directory, stopped.number if isinstance(stopped, Told) else signal.SIGINT)
        raise
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()  # it is empty if the run was refused
            if made:
                output.rmdir()
    written = results.is_file() and results.stat().st_mtime_ns != before
    if code != 0 or not written or reason:  # results may be there when other files are not
        why = reason or f"flwr exit code {code}, no {results}; the log above says why"
        raise RunFailedError(f"the run did not finish: {why}")
    return results


def _named_after(app: Path, output: Path) -> Path:
    """A new directory, named after the time and the app."""
    name = re.sub(r"[^\w.-]+", "-", app.resolve().name)[:60]  # as run-name wants it
    path = output / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    try:
        return claimed(path)
    except OSError as error:
        raise ConfigError(f"output-dir: cannot make {path}: {error}") from error


def _submitted(app: Path, keys: Mapping[str, Any], federation: str) -> tuple[int, str]:
    """`flwr run` with a SuperLink of its own, see `_echoed`."""
    with private_superlink() as environment:
        overrides_file = Path(environment["FLWR_HOME"]) / "overrides.toml"
        # As a file: on the command line, Flower's own parser stumbles over quotes and spaces.
        overrides_file.write_text(tomli_w.dumps(keys), encoding="utf-8")
        options = ["--stream", "--run-config", str(overrides_file)]
        command = [script("flwr"), "run", str(app), *options]
        if federation:
            command += ["--federation-config", federation]
        return _echoed(command, environment)


def _echoed(command: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run it, its output on this process's as it comes; its exit code, and the reason among what
    it says for which a run failed, which Flower follows with pages of its own."""
    process = subprocess.Popen(
        command,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    reason = ""
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if failed := _FAILED.match(line):
                reason = failed[1].strip()
        return process.wait(), reason
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def private_superlink() -> Iterator[dict[str, str]]:
    """A local SuperLink in simulation mode; yields the environment in which `flwr run` uses it.

    It leads a process group of its own, so stopping the group stops SuperExec, the apps and
    Ray with it, also when this process is interrupted.
    """
    home = Path(tempfile.mkdtemp(prefix="hosl-flwr-"))
    http, control = free_port(), free_port()
    environment = {
        # marks every descendant, those in sessions of their own too, for stop; first, where a
        # process title that grows into the environment is least likely to cut it off
        MARK: secrets.token_hex(8),
        **without_loopback(os.environ),
        "PYTHONIOENCODING": "utf-8",  # as this process reads what they print
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
    with exiting_when_told():
        try:
            with (home / "superlink.log").open("wb") as log:
                process = subprocess.Popen(
                    [
                        script("flower-superlink"),
                        *("--insecure", "--simulation", "--isolation", "subprocess"),
                        *("--host", "127.0.0.1", "--port", str(http)),
                        *("--control-api-address", f"127.0.0.1:{control}"),
                    ],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            wait_until_healthy(http, process, home / "superlink.log")
            yield environment
        finally:
            if process is not None:
                stop(process, environment[MARK])
            shutil.rmtree(home, ignore_errors=True)
