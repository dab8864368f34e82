"""What a run says of itself in the log: its plan before it starts, its results in the end."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hosl_flower.run.figures import clients_with
from hosl_flower.server.session import Session
from hosl_flower.server.traffic import Traffic
from hosl_flower.tasks.answer_words import AnswerWords

if TYPE_CHECKING:
    from hosl_flower.run.results import Results


def announcement(method: Any, session: Session) -> Iterable[str]:
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
            f"{spec.dtype} client: probes at distance {config.zo.epsilon:g}; updates are rounded "
            "at random, so that steps smaller than a weight's spacing count on average, with noise"
        )
    examples = [client.train_examples for client in session.participation.clients.values()]
    yield (
        f"{clients_with(examples)} training examples; "
        f"{next(iter(session.participation.clients.values())).held_out_examples} held out"
    )
    answers = session.encoder.answers
    if isinstance(answers, AnswerWords) and answers.sequences > 1:
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
    if cost := session.privacy(config.steps * config.pace.local_steps):
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
        "client peak memory": f"{results.client_peak_memory['bytes'] / 2**20:.0f} MiB, tensors: "
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


def _number(count: int) -> str:
    """Millions where there are any."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _rendered(grid: Table) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(grid)
    return console.export_text()
