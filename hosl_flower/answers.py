"""Answer words as tokens, and the score of each label.

Where every word is one token, a score is the word's logit at the position after the prompt: one
sequence per example, and nothing of the size of the vocabulary is computed.

Else each example becomes C sequences, prompt + word c without its last token, and the score of
label c is the log-probability of the word's tokens, log softmax over the whole vocabulary, summed
(MeZO, Malladi et al. 2023, scores candidates this way). Sequences are left-padded: the last n_c
positions of the c-th predict the n_c tokens of word c.

Either way the loss is the cross-entropy over the C scores.

What scores are made of, and what the labels are, is a task's way to be scored (Scoring): a choice
among answer words, here, or text that is generated (completion.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.split import ServerSubmodel


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

    def scores(
        self,
        submodel: ServerSubmodel,
        activations: Tensor,
        mask: Tensor,
        rows: Tensor,
        width: int = 1,
    ) -> Tensor:
        """Scores float32 that F.cross_entropy takes with the labels: [B, C], or [B, V, A] with
        A = `width`. activations [R, S, H], mask [R, S]; rows: of the LM head, those of `ids`."""


class Answers:
    """tokens: ids of the answer words, by label.

    sequences: per example, in the order of the labels. longest: tokens of the longest word.
    ids: the tokens whose rows of the LM head are trained, each once.
    """

    def __init__(self, tokens: Sequence[Sequence[int]]):
        self.tokens = [list(word) for word in tokens]
        self.longest = max(map(len, self.tokens))
        self.sequences = 1 if self.longest == 1 else len(self.tokens)
        self.ids = list(dict.fromkeys(token for word in self.tokens for token in word))

    def inputs(
        self, prompt: Sequence[int], example: Mapping[str, Any] | None = None
    ) -> list[list[int]]:
        """The sequences of an example, given its prompt's tokens."""
        if self.sequences == 1:
            return [list(prompt)]
        return [[*prompt, *word[:-1]] for word in self.tokens]

    def labels(self, examples: Sequence[Mapping[str, Any]]) -> Tensor:
        """[B], 0..C-1."""
        return torch.tensor([example["label"] for example in examples])

    def scores(
        self,
        submodel: ServerSubmodel,
        activations: Tensor,
        mask: Tensor,
        rows: Tensor,
        width: int = 1,
    ) -> Tensor:
        """Scores [B, C] of activations [R, S, H] and mask [R, S], R = B * sequences.

        rows: [len(ids), D], the trained rows of the head; the others are the submodel's.
        """
        if self.sequences == 1:
            return submodel.answer_logits(activations, mask, rows)
        hidden = submodel.hidden(activations, mask)
        hidden = hidden.unflatten(0, (-1, self.sequences))  # [B, C, S, D]
        device, length = hidden.device, hidden.shape[2]
        words = [c for c, word in enumerate(self.tokens) for _ in word]
        places = [length - n for word in self.tokens for n in range(len(word), 0, -1)]
        hidden = hidden[:, words, places]  # [B, M, D], one for each of M tokens of all words
        trained = torch.tensor(self.ids, device=device)
        logits = F.linear(hidden, submodel.lm_head.weight)
        logits = logits.index_copy(2, trained, F.linear(hidden, rows))  # [B, M, V]
        wanted = torch.tensor([t for word in self.tokens for t in word], device=device)
        wanted = wanted.expand(len(hidden), -1).unsqueeze(2)
        found = logits.log_softmax(2).gather(2, wanted).squeeze(2)  # [B, M]
        sums = found.new_zeros(len(hidden), self.sequences)
        return sums.index_add(1, torch.tensor(words, device=device), found)
