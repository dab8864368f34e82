"""The end of a U-shaped split, on the client: from hidden states to losses and their gradient.

With labels = client the server submodel ends at the last hidden states (after the final norm) that
predict the answers' tokens, h [b, M, D]. The client has the labels y and the LM head W, frozen as
in the base model, and computes

    one token per answer    L = cross-entropy(W_a h, y),
                            dL/dh = (softmax(W_a h) - onehot(y)) W_a
    several tokens          s_c = sum over word c's tokens t of log softmax(W h_t)[t],
                            L = cross-entropy(s, y),
                            dL/dh_t = (softmax(s) - onehot(y))_c (W[t] - softmax(W h_t) W)

each over the number of examples: closed forms, no graph and no backward pass. W_a are the rows of
the answer words, all that is held where each is one token. (Vepakomma et al. 2018, arXiv
1812.00564, "U-shaped configuration", where client and server back-propagate.)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_flower.models.base_model import Base
from hosl_flower.models.families.base import HEAD
from hosl_flower.models.families.registry import embedding_name
from hosl_flower.models.submodels import ClientSubmodel
from hosl_flower.tasks.answer_words import AnswerWords

_SLOPE = torch.ops.aten._log_softmax_backward_data.default
_CHUNK_ELEMENTS = 1 << 22  # of the LM head at a time, in float32


class Judged(NamedTuple):
    """loss: mean cross-entropy. gradient: of it, with respect to the states [b, M, D]. correct: of
    the examples."""

    loss: float
    gradient: Tensor
    correct: int


class OutputHead:
    """The LM head [V, D], or float32 rows [C, D] of it where each answer word is one token."""

    def __init__(self, answers: AnswerWords, weight: Tensor):
        self.answers, self.weight = answers, weight

    @torch.no_grad()
    def judge(self, states: Tensor, labels: Tensor, gradient: bool = True) -> Judged:
        """states float32 [b, M, D] on the head's device, labels [b] int64. Without `gradient` that
        is empty."""
        scores, normalisers = self._scores(states)
        log_shares = scores.log_softmax(1)
        correct = int((scores.argmax(1) == labels).sum())
        loss = float(F.nll_loss(log_shares, labels))
        if not gradient:
            return Judged(loss, states.new_empty(0), correct)
        hits = torch.zeros_like(scores).scatter_(1, labels.unsqueeze(1), -1 / len(labels))
        # (softmax - onehot) / b, by the kernel a server's backward pass has: to the same bits
        slope = _SLOPE(hits, log_shares, 1, scores.dtype)  # dL / dscores [b, C]
        return Judged(loss, self._gradient(states, normalisers, slope), correct)

    def _scores(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [b, C]; log of the sum of exp over the vocabulary [b, M, 1] where it is needed."""
        if self.answers.sequences == 1:
            return F.linear(states[:, 0], self.weight), states.new_empty(0)
        parts = [F.linear(states, rows).logsumexp(2, keepdim=True) for rows in self._rows()]
        normalisers = torch.stack(parts).logsumexp(0)
        words = self.weight[self.answers.flat].float()  # [M, D]
        found = (states * words).sum(2) - normalisers.squeeze(2)
        return self.answers.summed(found), normalisers

    def _gradient(self, states: Tensor, normalisers: Tensor, slope: Tensor) -> Tensor:
        """slope: dL / dscores [b, C]."""
        if self.answers.sequences == 1:
            return (slope @ self.weight).unsqueeze(1)
        gradient = self.weight[self.answers.flat].float().expand_as(states).clone()
        for rows in self._rows():
            gradient -= (F.linear(states, rows) - normalisers).exp() @ rows
        return gradient.mul_(slope[:, self.answers.words].unsqueeze(2))

    def _rows(self) -> Iterator[Tensor]:
        """The head in pieces, in float32."""
        for rows in self.weight.split(max(1, _CHUNK_ELEMENTS // self.weight.shape[1])):
            yield rows.float()


def load_output_head(
    client: ClientSubmodel, base: Base, answers: AnswerWords, device: str, trainable: str
) -> OutputHead:
    """The head of the base model, as the server has it, float32.

    Of one-token answers only their rows are read. Else it is all V D values of it, unless it is
    tied to a token embedding that the client holds in floating point and, by client-trainable =
    `trainable`, does not train: then it is that, in its dtype, and takes nothing.
    """
    config = base.config
    tied = HEAD not in base.source and config.tie_word_embeddings
    name = embedding_name(config) if tied else HEAD
    shape = (config.vocab_size, getattr(config, "word_embed_proj_dim", config.hidden_size))
    if answers.sequences == 1:
        return OutputHead(answers, base.source.rows(name, shape, answers.ids).to(device))
    if tied and trainable != "full":
        embedding = client.canonical_parameters()[name].data
        if type(embedding) is Tensor and embedding.is_floating_point():
            return OutputHead(answers, embedding)
    whole = torch.empty(shape, device=device)
    base.source.fill(name, whole)
    return OutputHead(answers, whole)
