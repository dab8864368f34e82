"""Held-out results: loss, accuracy and confusion of labels; exact match and F1 of text."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.tasks.generated_answers import targets
from hosl_flower.tasks.task import Task


@dataclass
class Score:
    """Held-out results, summed over batches. confusion: [label, predicted] counts."""

    classes: int
    loss_sum: float = 0.0
    confusion: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.confusion = torch.zeros((self.classes, self.classes), dtype=torch.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits [B, C] float32, labels [B]."""
        self.loss_sum += float(F.cross_entropy(logits, labels, reduction="sum"))
        pairs = labels * self.classes + logits.argmax(1)
        counts = torch.bincount(pairs.cpu(), minlength=self.classes**2)
        self.confusion += counts.view_as(self.confusion)

    def metrics(self) -> dict[str, float | None]:
        """What is measured, by name."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "majority_accuracy": self.majority,
        }

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, accuracy {self.accuracy:.3f} (majority class "
            f"{self.majority:.3f}), balanced {self.balanced_accuracy:.3f}"
        )

    @property
    def examples(self) -> int:
        """Number of examples scored."""
        return int(self.confusion.sum())

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / self.examples

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.confusion.diag().sum()) / self.examples

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the labels that occur."""
        per_label = self.confusion.sum(1)
        present = per_label > 0
        return float((self.confusion.diag()[present] / per_label[present]).mean())

    @property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent label."""
        return float(self.confusion.sum(1).max()) / self.examples


class Addable(Protocol):
    """A score that held-out batches can be added to."""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """What answers.Scoring gives for a batch, and its labels."""


@dataclass
class ClientTally:
    """Held-out results of which only the totals are known."""

    examples: int = 0
    correct: int = 0
    loss_sum: float = 0.0

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / self.examples

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.examples

    def metrics(self) -> dict[str, float | None]:
        """What is measured, by name; None: nobody says which labels were right."""
        unknown = {"balanced_accuracy": None, "majority_accuracy": None}
        return {"loss": self.loss, "accuracy": self.accuracy, **unknown}

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.3f}"


@dataclass
class TextScore:
    """Results summed over batches. grades: of each example, exact match and F1 [n, 2]."""

    loss_sum: float = 0.0
    tokens: int = 0
    grades: Tensor = field(default_factory=lambda: torch.empty(0, 2))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits [B, V, A] float32, labels [B, A]."""
        self.loss_sum += float(F.cross_entropy(logits, labels, reduction="sum"))
        self.tokens += targets(labels)

    def add_grades(self, grades: Tensor) -> None:
        """Exact match and F1 [B, 2] of a batch's generated answers."""
        self.grades = torch.cat([self.grades, grades])

    @property
    def examples(self) -> int:
        """Number of examples scored."""
        return len(self.grades)

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the answers' tokens."""
        return self.loss_sum / self.tokens

    def _means(self) -> tuple[float, float]:
        exact, f1 = self.grades.double().mean(0).tolist()
        return exact, f1

    def metrics(self) -> dict[str, float | None]:
        """What is measured, by name."""
        exact, f1 = self._means()
        return {"loss": self.loss, "exact_match": exact, "f1": f1}

    def __str__(self) -> str:
        exact, f1 = self._means()
        return f"loss {self.loss:.4f}, exact match {exact:.3f}, F1 {f1:.3f}"


HeldOut = Score | TextScore | ClientTally  # what an evaluation gives


def new_score(task: Task) -> Score | TextScore:
    """Of a task, before the first batch."""
    return TextScore() if task.target else Score(len(task.verbalizers))
