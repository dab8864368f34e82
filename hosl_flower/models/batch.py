"""A mini-batch as a model is fed it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs of R = B * Scoring.sequences sequences: token ids [R, S] int64, left-padded, or with
    their types [B, 2, S], or pixels [B, C, height, width]; attention_mask [R, S] int64, S as of the
    activations; labels [B], or [B, A] (tasks/answer_words.py), int64, or [0] where there are none.
    """

    inputs: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def input_ids(self) -> Tensor:
        """Inputs that are token ids."""
        return self.inputs

    @property
    def tokens(self) -> int:
        """Positions of all activations, padding included."""
        return self.attention_mask.numel()

    def slices(self, micro_batch: int) -> list[slice]:
        """Rows of consecutive micro-batches of so many sequences; 0 is one of all."""
        count = len(self.inputs)
        size = micro_batch or count
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]
