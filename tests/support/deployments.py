"""A real Flower deployment on loopback: SuperLink, SuperNodes and ClientApps in processes."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hosl_flower.flower.processes import MARK, free_port, script, stop, wait_until_healthy


@contextlib.contextmanager
def deployment(
    nodes: int, devices: Sequence[str] = (), node_config: str = ""
) -> Iterator[dict[str, str]]:
    """Environment in which `flwr run APP dep` reaches a SuperLink with `nodes` SuperNodes.

    devices: of the SuperNodes, instead of the run config's. node_config: of each, besides.
    """
    home = Path(tempfile.mkdtemp(prefix="hosl-dep-"))
    http, control = free_port(), free_port()
    environment = {
        MARK: f"deployment{os.getpid()}-{http}",
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "dep"\n\n[superlink.dep]\n'
        f'address = "127.0.0.1:{http}"\ninsecure = true\n'
    )
    processes = []

    def start(name: str, *arguments: str) -> subprocess.Popen:
        log = (home / f"{len(processes)}-{name}.log").open("wb")
        processes.append(
            subprocess.Popen(
                [script(name), "--insecure", *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        return processes[-1]

    try:
        superlink = start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(http)),
            *("--control-api-address", f"127.0.0.1:{control}"),
        )
        wait_until_healthy(http, superlink, home / "0-flower-superlink.log")
        for number in range(nodes):
            own = f' device="{devices[number]}"' if devices else ""
            own += f" {node_config}" if node_config else ""
            start(
                "flower-supernode",
                *("--superlink", f"127.0.0.1:{http}"),
                *("--host", "127.0.0.1", "--port", str(free_port())),
                *("--node-config", f"partition-id={number} num-partitions={nodes}" + own),
            )
        yield environment
    finally:
        for process in reversed(processes):
            stop(process, environment[MARK])


def run_deployed(
    environment: dict[str, str], app: Path, keys: dict, seconds: float, results: Path | None = None
) -> str:
    """Submit a run and wait for its results.json; the log. Raises TimeoutError without one."""
    config = Path(environment["FLWR_HOME"]) / f"{keys['run-name']}.toml"
    config.write_text(
        "".join(
            f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n"
            for key, value in keys.items()
        )
    )
    command = [script("flwr"), "run", str(app), "dep", "--stream", "--run-config", str(config)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    results = results or Path(keys["output-dir"]) / keys["run-name"] / "results.json"
    give_up = time.monotonic() + 10
    while not results.is_file() and time.monotonic() < give_up:
        time.sleep(0.2)
    if not results.is_file():
        raise TimeoutError(f"no {results}:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr
