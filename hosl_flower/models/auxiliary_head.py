"""An auxiliary head on the client: from activations at the cut to a loss, without the server.

Final norm and the answer words' rows of the LM head, as in the base model: HERON-SFL (arXiv
2601.09076) reports that a head of LayerNorm and unembedding suffices. At cut-layer = number of
blocks it makes the client submodel the whole model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosl_flower.errors import ConfigError
from hosl_flower.models.base_model import Base
from hosl_flower.models.families.base import HEAD
from hosl_flower.models.families.registry import embedding_name
from hosl_flower.models.split import fill_buffers, server_skeleton
from hosl_flower.models.submodels import AUXILIARY, ClientSubmodel
from hosl_flower.tasks.answer_words import AnswerWords
from hosl_flower.tasks.scoring import Scoring

ROWS = f"{AUXILIARY}rows"


class AnswerHead(nn.Module):
    """decoder: final norm, and projection where the family has one. rows: float32 [C, D]."""

    def __init__(self, decoder: nn.Module, rows: Tensor):
        super().__init__()
        self.decoder = decoder
        self.rows = nn.Parameter(rows)
        self.eval()

    def forward(self, activations: Tensor, attention_mask: Tensor) -> Tensor:
        """activations [B, S, H], mask [B, S], left-padded -> answer logits float32 [B, C]."""
        last = self.decoder(
            inputs_embeds=activations[:, -1:].to(self.rows.dtype),
            attention_mask=attention_mask[:, -1:],
            use_cache=False,
        ).last_hidden_state
        return F.linear(last[:, -1], self.rows)


def attach_head(client: ClientSubmodel, base: Base, answers: Scoring, device: str) -> None:
    """Give a client submodel a head of its own, float32, from the base checkpoint. Its parameters
    are named "head.*" among the client's and are trained whatever else is. ConfigError where answer
    words are of several tokens: those need the whole LM head."""
    if client.family.classes:
        raise ConfigError(
            "a client with a head of its own (HERON-SFL, full ZO) needs a language model; for "
            "classifiers use another strategy"
        )
    if not isinstance(answers, AnswerWords):
        raise ConfigError(
            "a client with a head of its own (HERON-SFL, full ZO) needs a task with answer words: "
            "text that is generated needs the whole LM head; choose another strategy"
        )
    if answers.sequences > 1:
        raise ConfigError(
            "verbalizers: a client with a head of its own (HERON-SFL, full ZO) needs answer words "
            "of one token each; choose others, or another strategy"
        )
    decoder = server_skeleton(base.config, base.blocks).decoder
    fill_buffers(decoder, device)
    for name, empty in list(decoder.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        value = torch.empty(empty.shape, device=device)
        base.source.fill(f"{client.family.decoder_prefix}{name}", value)
        setattr(decoder.get_submodule(owner), attribute, nn.Parameter(value))
    client.head = AnswerHead(decoder, _answer_rows(client, base, answers).to(device))


def _answer_rows(client: ClientSubmodel, base: Base, answers: AnswerWords) -> Tensor:
    """Rows [C, D] of the LM head, float32. A tied head is the embedding, which is here."""
    ids = torch.tensor(answers.ids)
    name = embedding_name(base.config)
    tied = HEAD not in base.source and base.config.tie_word_embeddings
    parameters = client.canonical_parameters()
    dtype = parameters[name].dtype
    if tied and parameters[name].is_floating_point() and type(parameters[name].data) is Tensor:
        embedding = parameters[name].detach()
        return embedding[ids.to(embedding.device)].float().clone()
    width = getattr(base.config, "word_embed_proj_dim", base.config.hidden_size)
    # a tied head is the embedding as a client in this dtype has it, whether it is kept in 8 bits
    whole = torch.empty(base.config.vocab_size, width, dtype=dtype if tied else torch.float32)
    base.source.fill(name if tied else HEAD, whole)
    return whole[ids].float()
