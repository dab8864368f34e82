"""A plan as text."""

import math
from typing import TYPE_CHECKING

from rich.table import Table

from hosl_flower.run.summary import _number, _rendered

if TYPE_CHECKING:
    from hosl_flower.run.plan import Plan


def plan_table(found: "Plan", memory: float, uplink: float, downlink: float) -> str:
    """A plan as text. memory: bytes a client has; uplink, downlink: bytes per second; infinite
    where nothing was said of them."""
    grid = Table(title=f"a run of {found.method}, before it is started", show_header=False)
    peaks = found.peak_bytes
    worst = max(peaks.values())
    training = max(peak for phase, peak in peaks.items() if phase not in ("load", "evaluate"))
    over = f"; {training / peaks['forward']:.2f} of inference" if "forward" in peaks else ""
    rows = {
        "model": f"{found.model} ({'pretrained' if found.pretrained else 'RANDOM WEIGHTS'})",
        "client": f"{_number(found.client_parameters)} parameters, "
        f"{_mebibytes(found.client_weight_bytes)} MiB; trains {_number(found.client_trained)}",
        "server": f"trains {_number(found.server_trained)} parameters",
        "client memory": f"{_mebibytes(worst)} MiB of tensors, for the longest batch ("
        + ", ".join(f"{phase} {_mebibytes(peak)}" for phase, peak in peaks.items())
        + f"){over}; the process about {_mebibytes(found.client_bytes)} MiB on a SuperNode, "
        f"{_mebibytes(found.worker_bytes)} MiB in a simulation, as a Ray worker",
        "per step": f"{found.clients:g} client(s): {found.up_bytes / 1e6:.2f} MB up, "
        f"{found.down_bytes / 1e6:.2f} MB down; on this machine client "
        f"{found.client_seconds / found.clients:.2f} s each, server {found.server_seconds:.2f} s",
        "an evaluation": f"{found.evaluation_bytes / 1e6:.1f} MB up, "
        f"{found.evaluation_seconds:.1f} s, {found.evaluations} times",
        "run": f"{found.steps} steps, about "
        f"{_duration(found.run_seconds(uplink, downlink))}{_assumed(uplink, downlink)}",
    }
    if memory < math.inf:
        rows["device"] = f"{_mebibytes(memory)} MiB: {found.fit(memory)}"
    for name, value in rows.items():
        grid.add_row(name, value)
    return _rendered(grid)


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.0f}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _assumed(uplink: float, downlink: float) -> str:
    known = {"up": uplink, "down": downlink}
    rates = [f"{8 * rate / 1e6:g} Mbps {way}" for way, rate in known.items() if rate < math.inf]
    return f" with {' and '.join(rates)}" if rates else ", not counting the network"
