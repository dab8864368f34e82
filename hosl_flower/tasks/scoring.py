"""How the answers of a task are scored."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class Scoring(Protocol):
    """What encoder and server ask of a task's way to be scored.

    sequences: per example. longest: tokens of the longest answer.
    """

    sequences: int
    longest: int

    @property
    def ids(self) -> list[int] | slice:
        """The tokens whose rows of the LM head are trained; slice(None) is all."""

    def inputs(self, prompt: Sequence[int], example: Mapping[str, Any]) -> list[list[int]]:
        """The sequences of an example, given its prompt's tokens."""

    def labels(self, examples: Sequence[Mapping[str, Any]]) -> Tensor:
        """What is right, int64: [B], or [B, A] where the last A positions each have a label."""

    def states(self, hidden: Tensor, width: int = 1) -> Tensor:
        """Of last hidden states [R, S, D] those that scores are made of: [B, M, D]. width: A, the
        positions that have a label."""

    def scores_of(
        self, states: Tensor, head: Tensor, rows: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Scores float32 that F.cross_entropy takes with the labels: [B, C], or [B, V, A]. head:
        the LM head [V, D]; rows: its rows of `ids`, as they are trained; bias: of an image model's
        classes [C]."""
