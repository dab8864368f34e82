"""What a server can read off the gradients of clients that keep their labels; what hiding costs.

    python tests/benchmarks/label_leakage.py -c model=<a small OPT> -c data-path=<...> --out x.json

With labels = client a client sends (softmax(W h) - onehot(y)) W / B for each of B examples, and the
batch's mean loss. The server knows h and, from the base checkpoint, W. Attacks, two labels:

    gradient    of the two gradients there can be, the nearer one to what came
    noise s     the same, where the client has added s * xi * (W_1 - W_0) / B, xi normal: noise
                along the one direction that tells (in any other it would hide nothing)
    secret W    the client's rows are random and its own. All gradients lie along W_1 - W_0,
                whatever that is: the side of the first singular vector; which side is which label
                is chosen in the attacker's favour, as a few known labels would tell it
    loss        of the 2^B ways to label a batch, the one whose mean loss is nearest to that
                reported

and, with --steps, what the noise, or a secret head, costs: held-out accuracy of a server trained
so, its clients frozen.
"""

import argparse
import itertools
import json
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.client.client import Client
from hosl_flower.config.app_config import key_value
from hosl_flower.config.parse import parse_config
from hosl_flower.models.label_head import Judged, OutputHead, load_output_head
from hosl_flower.protocol.messages.activations import Activations, Forward
from hosl_flower.run.start import run_in_process
from hosl_flower.server.open_session import open_session
from hosl_flower.tasks.answer_words import AnswerWords
from strategies.frozen_client import FrozenClient

NOISES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
TRAINED = (0.0, 1.0, 4.0)  # of these, the cost too


class HidingHead(OutputHead):
    """Adds noise along the direction that tells a label."""

    def __init__(self, answers: AnswerWords, rows: Tensor, noise: float, seed: int):
        super().__init__(answers, rows)
        self.noise, self.generator = noise, torch.Generator().manual_seed(seed)

    def judge(self, states: Tensor, labels: Tensor, gradient: bool = True) -> Judged:
        found = super().judge(states, labels, gradient)
        if not gradient:
            return found
        draw = torch.randn(len(states), 1, 1, generator=self.generator)
        direction = (self.weight[1] - self.weight[0]) / len(states)
        return found._replace(gradient=found.gradient + self.noise * draw * direction)


def secret_rows(rows: Tensor, seed: int) -> Tensor:
    """Random ones of the same size."""
    return rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))


def nearest(gradient: Tensor, states: Tensor, rows: Tensor) -> Tensor:
    """Labels [B] whose gradients are nearest to these [B, 1, D]."""
    shares = F.linear(states[:, 0], rows).softmax(1)
    candidates = (shares.unsqueeze(1) - torch.eye(len(rows))) @ rows / len(states)  # [B, C, D]
    return (candidates - gradient).norm(dim=2).argmin(1)


def by_side(gradients: Tensor, labels: Tensor) -> float:
    """Share of labels told by the side of [N, D] along their first singular vector."""
    direction = torch.linalg.svd(gradients, full_matrices=False).Vh[0]
    right = float(((gradients @ direction > 0).long() == labels).float().mean())
    return max(right, 1 - right)


def by_loss(loss: float, states: Tensor, rows: Tensor) -> Tensor:
    """Labels [B] of the batch whose mean loss is nearest."""
    each = -F.linear(states[:, 0], rows).double().log_softmax(1)
    ways = torch.tensor(list(itertools.product(range(len(rows)), repeat=len(states))))
    means = each[torch.arange(len(states)), ways].mean(1)
    return ways[(means - loss).abs().argmin()]


def attack(keys: dict[str, object], batches: int) -> dict[str, object]:
    """Shares of labels recovered from so many mini-batches of the base model."""
    session = open_session(parse_config(keys), "labels", 1)
    server, client = session.server, Client(session.spec)
    rows, answers = server.answer_rows.detach(), session.encoder.answers
    heads = {noise: HidingHead(answers, rows, noise, 1) for noise in NOISES}
    hidden = OutputHead(answers, secret_rows(rows, 2))
    right: dict[str, float] = {}
    every: list[Tensor] = []
    gradients: list[Tensor] = []
    for number in range(batches):
        (reply,) = client.answer([Forward(**session.at(1, 0), batch=number)])
        assert isinstance(reply, Activations)
        states = server.states(reply)
        labels = client.pool.client(0).train_labels(number, session.spec.batch_size)
        every.append(labels)
        for noise, head in heads.items():
            found = head.judge(states, labels)
            name = f"noise {noise:g}" if noise else "gradient"
            told = nearest(found.gradient, states, rows)
            right[name] = right.get(name, 0.0) + float((told == labels).sum())
        told = by_loss(heads[0.0].judge(states, labels, False).loss, states, rows)
        right["loss"] = right.get("loss", 0.0) + float((told == labels).sum())
        gradients.append(hidden.judge(states, labels).gradient[:, 0])
    labels = torch.cat(every)
    recovered = {name: count / len(labels) for name, count in right.items()}
    recovered["secret W"] = by_side(torch.cat(gradients), labels)
    commonest = float(labels.bincount().max()) / len(labels)
    return {"examples": len(labels), "commonest_label": commonest, "recovered": recovered}


def trained(keys: dict[str, object], noise: float, secret: bool) -> float:
    """Held-out accuracy of a run whose clients hide their labels so."""

    def load(*arguments: object) -> OutputHead:
        head = load_output_head(*arguments)  # type: ignore[arg-type]
        rows = secret_rows(head.weight, 2) if secret else head.weight
        return HidingHead(head.answers, rows, noise, 3)

    with mock.patch("hosl_flower.client.client.load_output_head", load):
        return run_in_process(FrozenClient(parse_config(keys))).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", dest="keys", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=100, help="attacked")
    parser.add_argument("--steps", type=int, default=0, help="of training runs; 0: none")
    parser.add_argument("--seeds", type=int, default=2, help="of training runs")
    parser.add_argument("--runs", default="runs/labels", help="where their directories are made")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    fixed = {
        "labels": "client",
        "device": "cpu",
        "strategy": "strategies.frozen_client:FrozenClient",
    }
    keys = {**fixed, **dict(map(key_value, arguments.keys))}
    result = attack(keys, arguments.batches)
    print(json.dumps(result), flush=True)
    ways = [(noise, False) for noise in TRAINED] + [(0.0, True)]
    accuracies: dict[str, list[float]] = {}
    for (noise, secret), seed in itertools.product(ways, range(arguments.seeds)):
        if not arguments.steps:
            break
        name = "secret W" if secret else f"noise {noise:g}" if noise else "gradient"
        run = {
            "steps": arguments.steps, "eval-every": arguments.steps, "seed": seed,
            "output-dir": arguments.runs, "run-name": f"{name.replace(' ', '-')}-seed{seed}",
            "save-model": False, "trackers": "",
        }  # fmt: skip
        accuracies.setdefault(name, []).append(trained({**keys, **run}, noise, secret))
        print(json.dumps({name: accuracies[name]}), flush=True)
    result["accuracy"] = accuracies
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
