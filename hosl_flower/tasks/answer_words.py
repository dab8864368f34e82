"""Answer words as tokens, and the score of each label.

Where every word is one token, a score is the word's logit at the position after the prompt: one
sequence per example, and nothing of the size of the vocabulary is computed.

Else each example becomes C sequences, prompt + word c without its last token, and the score of
label c is the log-probability of the word's tokens, log softmax over the whole vocabulary, summed
(MeZO, Malladi et al. 2023, scores candidates this way). Sequences are left-padded: the last n_c
positions of the c-th predict the n_c tokens of word c.

Either way the loss is the cross-entropy over the C scores.

What scores are made of, and what the labels are, is a task's way to be scored (Scoring): a choice
among answer words, here, or text that is generated (generated_answers.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class AnswerWords:
    """tokens: ids of the answer words, by label.

    M: hidden states per example that scores are made of, one for each token of all words, or the
    one at the last position where every word is one token.

    sequences: per example, in the order of the labels. longest: tokens of the longest word.
    ids: the tokens whose rows of the LM head are trained, each once.
    """

    def __init__(self, tokens: Sequence[Sequence[int]]):
        self.tokens = [list(word) for word in tokens]
        self.longest = max(map(len, self.tokens))
        self.sequences = 1 if self.longest == 1 else len(self.tokens)
        self.ids = list(dict.fromkeys(token for word in self.tokens for token in word))
        self.flat = [token for word in self.tokens for token in word]
        self.words = [c for c, word in enumerate(self.tokens) for _ in word]  # of each of `flat`

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

    @property
    def states_per_example(self) -> int:
        """M."""
        return 1 if self.sequences == 1 else len(self.flat)

    def states(self, hidden: Tensor, width: int = 1) -> Tensor:
        """Of last hidden states [R, S, D] those that predict the answers' tokens: [B, M, D]."""
        if self.sequences == 1:
            return hidden[:, -1:]
        hidden = hidden.unflatten(0, (-1, self.sequences))  # [B, C, S, D]
        length = hidden.shape[2]
        places = [length - n for word in self.tokens for n in range(len(word), 0, -1)]
        return hidden[:, self.words, places]

    def scores_of(
        self, states: Tensor, head: Tensor, rows: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Scores [B, C] of states [B, M, D]. rows [len(ids), D]: the trained rows of the head
        [V, D]. bias: of the labels [C], where every answer is one token."""
        if self.sequences == 1:
            return F.linear(states[:, 0], rows, bias)
        device = states.device
        trained = torch.tensor(self.ids, device=device)
        logits = F.linear(states, head)
        logits = logits.index_copy(2, trained, F.linear(states, rows))  # [B, M, V]
        wanted = torch.tensor(self.flat, device=device).expand(len(states), -1).unsqueeze(2)
        return self.summed(logits.log_softmax(2).gather(2, wanted).squeeze(2))

    def summed(self, found: Tensor) -> Tensor:
        """Log-probabilities [B, M] of the words' tokens -> of the words [B, C]."""
        sums = found.new_zeros(len(found), self.sequences)
        return sums.index_add(1, torch.tensor(self.words, device=found.device), found)
