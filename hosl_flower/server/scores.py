"""Held-out results where an answer is one of a task's labels: loss, accuracy, confusion."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


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
