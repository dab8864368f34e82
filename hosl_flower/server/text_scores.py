"""Held-out results where answers are generated: the loss over their tokens, exact match and F1."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.server.kept_labels import Tally
from hosl_flower.server.scores import Score
from hosl_flower.tasks.generated_answers import targets
from hosl_flower.tasks.task import Task


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


HeldOut = Score | TextScore | Tally  # what an evaluation gives


def new_score(task: Task) -> Score | TextScore:
    """Of a task, before the first batch."""
    return TextScore() if task.target else Score(len(task.verbalizers))
