"""Answers that are text: their tokens, the loss over them, what was generated as text again.

An example is the prompt, its answer and a newline, which ends it, as in MeZO (Malladi et al. 2023).
The sequence is all of that but the last token; its last positions predict the answer's tokens and
the newline. Labels are these tokens, left-padded with IGNORED: int64 [B, A], A those of the batch's
longest answer. The loss is the cross-entropy over the whole vocabulary, a mean over all answers'
tokens of a batch; tokens of prompts have none.

Where there are several right answers, the first is the one that is trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label that cross_entropy leaves out


def targets(labels: Tensor) -> int:
    """How many labels a loss is the mean over: [B] classes, or [B, A] tokens with IGNORED."""
    return int((labels != IGNORED).sum())


def _first(example: Mapping[str, Any]) -> str:
    """The right answer that is trained on; nothing where there is none."""
    return example["answers"][0] if example["answers"] else ""


class Completion:
    """Of answers.Scoring: one sequence per example, all rows of the LM head.

    follow: the tokens of a text as it follows the prompt. newline: the token of one. ends: all
    tokens that end an answer. longest: tokens of an answer, at most.
    """

    sequences = 1
    ids = slice(None)

    def __init__(
        self,
        follow: Callable[[str], list[int]],
        newline: int,
        ends: frozenset[int],
        longest: int,
    ):
        self._follow, self._newline = follow, newline
        self.ends, self.longest = ends, longest

    def tokens(self, answer: str) -> list[int]:
        """Tokens of an answer, white space as single spaces, and its end; cut to the longest."""
        text = " ".join(answer.split())
        own = self._follow(text) if text else []
        return [*own, self._newline][: self.longest]

    def inputs(self, prompt: Sequence[int], example: Mapping[str, Any]) -> list[list[int]]:
        """The sequence of an example, given its prompt's tokens."""
        return [[*prompt, *self.tokens(_first(example))[:-1]]]

    def labels(self, examples: Sequence[Mapping[str, Any]]) -> Tensor:
        """[B, A]: tokens of the answers, left-padded."""
        own = [self.tokens(_first(example)) for example in examples]
        labels = torch.full((len(own), max(map(len, own))), IGNORED, dtype=torch.int64)
        for row, tokens in zip(labels, own, strict=True):
            row[len(row) - len(tokens) :] = torch.tensor(tokens)
        return labels

    def states(self, hidden: Tensor, width: int = 1) -> Tensor:
        """The last A = `width` of last hidden states [B, S, D]."""
        return hidden[:, -width:]

    def scores_of(
        self, states: Tensor, head: Tensor, rows: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Logits [B, V, A] of states [B, A, D]. rows: the LM head's [V, D], all of them."""
        return F.linear(states, rows).transpose(1, 2)

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """Generated tokens up to the first that ends the answer."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return list(tokens[:end])
