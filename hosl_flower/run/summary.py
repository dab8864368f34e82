"""What a run says of itself in the log: its plan before it starts, its results in the end."""

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hosl_flower.run.figures import clients_with
from hosl_flower.server.session import Session
from hosl_flower.server.traffic import Traffic
from hosl_flower.tasks.answer_words import Answers

if TYPE_CHECKING:
    from hosl_flower.run.plan import Plan
    from hosl_flower.run.results import Results


def plan(method: Any, session: Session) -> Iterable[str]:
    """What is about to happen, line by line."""
    config, spec = session.config, session.spec
    held, trained = session.client_counts()
    origin = "pretrained" if session.base.pretrained else "random weights"
    yield f"{method.name}: {spec.model} ({origin}), task {spec.task.name}, seed {spec.seed}"
    yield (
        f"cut after block {spec.cut_layer} of {session.base.blocks}: client holds "
        f"{_number(held)} parameters and trains {_number(trained)}; server trains "
        f"{_number(session.server.trained_count())}"
    )
    if spec.dtype != "float32":
        yield (
            f"{spec.dtype} client: probes at distance {config.epsilon:g}; updates are rounded at "
            "random, so that steps smaller than a weight's spacing count on average, with noise"
        )
    examples = [client.train_examples for client in session.clients.values()]
    yield (
        f"{clients_with(examples)} training examples; "
        f"{next(iter(session.clients.values())).held_out_examples} held out"
    )
    answers = session.encoder.answers
    if isinstance(answers, Answers) and answers.sequences > 1:
        words = zip(spec.task.verbalizers, answers.tokens, strict=True)
        long = ", ".join(f"{word!r} has {len(t)} tokens" for word, t in words if len(t) > 1)
        yield f"{long}: each example is {answers.sequences} sequences, one for each answer"
    sequences = spec.batch_size * answers.sequences
    most = sequences * session.encoder.length * session.activation_bytes_per_token
    up, down = method.activations_per_step()
    yield (
        f"{config.steps} steps of {spec.batch_size} examples; per step {up} activations up, "
        f"{down} down, each at most {most / 1e6:.2f} MB"
    )
    if spec.labels == "client":
        yield (
            "labels stay on the clients: hidden states go down, their loss gradients up; the "
            "answer words' rows of the head are not trained"
        )
    if cost := session.privacy(config.steps * config.local_steps):
        yield (
            f"differential privacy of each training example: epsilon at most "
            f"{max(cost['epsilon'].values()):.3g} at delta {cost['delta']:g} for the clients that "
            f"are there, if they take part in every step, {max(cost['uses'].values())} uses each; "
            "training losses are not told"
        )
        if cost["simulated"]:
            yield "the noise is SIMULATED: it follows from the run's seed, and protects nobody"


def table(results: "Results", traffic: Traffic) -> str:
    """The results, as text."""
    grid = Table(title=f"{results.method} on {results.task}", show_header=False)
    seconds, peaks = results.seconds_per_step, results.client_peak_memory["tensor_bytes"]
    rows = {
        "model": f"{results.model} ({'pretrained' if results.pretrained else 'RANDOM WEIGHTS'})",
        **_measured(results),
        "loss": f"{results.loss:.4f} (before training {results.evaluations[0]['loss']:.4f})",
        "steps": f"{results.steps} in {results.wall_seconds:.1f} s",
        "seconds per step": ", ".join(f"{part} {value:.3f}" for part, value in seconds.items())
        + " (client and server overlap)" * (sum(seconds.values()) > 2.1 * seconds["total"]),
        "bytes": f"{traffic.total(traffic.up) / 1e6:.1f} MB up, "
        f"{traffic.total(traffic.down) / 1e6:.3f} MB down",
        "client peak memory": f"{_process(results)}, tensors: "
        + ", ".join(f"{p} {n / 2**20:.0f}" for p, n in peaks.items()),
    }
    if dropped := results.clients["times_dropped"]:
        rows["dropped"] = f"{sum(dropped.values())} times a step went on without a client"
    if clipped := results.clients["scalars_clipped"]:
        rows["clipped"] = f"{sum(clipped.values())} scalars of {len(clipped)} client(s)"
    if results.privacy:
        most = max(results.privacy["epsilon"].values())
        rows["privacy"] = (
            f"epsilon {most:.3g} at delta {results.privacy['delta']:g}, per example"
            + ", SIMULATED" * results.privacy["simulated"]
        )
    for name, value in rows.items():
        grid.add_row(name, value)
    return _rendered(grid)


def _process(results: "Results") -> str:
    """Peak memory of a client's process."""
    size = results.client_peak_memory["bytes"]
    return "not known" if size is None else f"{size / 2**20:.0f} MiB"


def _measured(results: "Results") -> dict[str, str]:
    """The final evaluation, less its loss."""
    if results.f1 is not None:
        return {"F1": f"{results.f1:.4f}", "exact match": f"{results.exact_match:.4f}"}
    if results.balanced_accuracy is None:
        return {
            "accuracy": f"{results.accuracy:.4f}",
            "balanced accuracy": "not known, labels are the clients'",
        }
    return {
        "accuracy": f"{results.accuracy:.4f} (majority class {results.majority_accuracy:.4f})",
        "balanced accuracy": f"{results.balanced_accuracy:.4f}",
    }


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


def _number(count: int) -> str:
    """Millions where there are any."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.0f}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _assumed(uplink: float, downlink: float) -> str:
    known = {"up": uplink, "down": downlink}
    rates = [f"{8 * rate / 1e6:g} Mbps {way}" for way, rate in known.items() if rate < math.inf]
    return f" with {' and '.join(rates)}" if rates else ", not counting the network"


def _rendered(grid: Table) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(grid)
    return console.export_text()
