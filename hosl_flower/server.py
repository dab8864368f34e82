"""What the server does with activations: losses on a frozen submodel, first-order steps,
scores. No Flower here. The server always computes in float32: optimizer steps are too small
for 16-bit weights, and it is not the side that is short of memory.

The loss is the cross-entropy over the answer words' logits at the last position (tasks.py).
Of the LM head only those words' rows ever get a gradient, so only they are trained; the rest
of the head stays as it is. With SGD, or AdamW without weight decay, that is the same update
as training the whole head, without a vocabulary-sized gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosl_flower.errors import DivergedError
from hosl_flower.messages import Activations
from hosl_flower.split import HEAD, ServerSubmodel


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


class Server:
    """The server submodel and its optimizer.

    verbalizer_ids: token ids of the answer words, by label. optimizer: "sgd" or "adamw".
    """

    def __init__(
        self,
        submodel: ServerSubmodel,
        verbalizer_ids: Sequence[int],
        optimizer: str,
        learning_rate: float,
    ):
        self.submodel = submodel
        self.verbalizer_ids = torch.tensor(verbalizer_ids)
        submodel.lm_head.requires_grad_(False)
        head = submodel.lm_head.weight
        self.device = head.device
        self.answer_rows = nn.Parameter(head.detach()[self.verbalizer_ids.to(self.device)].clone())
        trained = [p for p in submodel.parameters() if p.requires_grad] + [self.answer_rows]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(trained, lr=learning_rate)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)

    def _logits(self, batch: Activations) -> Tensor:
        """Answer logits [B, C], float32. Raises DivergedError when they are not finite."""
        activations = batch.activations.to(self.device, torch.float32)
        mask = batch.attention_mask.to(self.device, torch.int64)
        logits = self.submodel.answer_logits(activations, mask, self.answer_rows)
        if not torch.isfinite(logits).all():
            raise DivergedError(
                "the server's logits are not finite, training has diverged; lower "
                "server-learning-rate or client-learning-rate"
            )
        return logits

    @torch.no_grad()
    def loss(self, batch: Activations) -> float:
        """Mean loss of a batch; the submodel stays as it is (HOSL Alg. 2, L11)."""
        return float(F.cross_entropy(self._logits(batch), batch.labels.to(self.device)))

    def train_step(self, batch: Activations) -> float:
        """One first-order step on a batch (HOSL Alg. 1, L27-30); the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self._logits(batch), batch.labels.to(self.device))
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def score(self, batch: Activations, score: Score) -> None:
        """Add a held-out batch to a score."""
        score.add(self._logits(batch), batch.labels.to(self.device))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """All server tensors by canonical name, the trained answer rows put back into the head."""
        tensors: dict[str, Tensor] = dict(self.submodel.canonical_parameters())
        head = tensors[HEAD].clone()
        head[self.verbalizer_ids.to(self.device)] = self.answer_rows
        return {**tensors, HEAD: head}

    def trained_count(self) -> int:
        """Number of trained elements."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
