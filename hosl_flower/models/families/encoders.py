"""Families of text classifiers, encoders: what splitting one needs to know (see decoders.py).

The "decoder" is the whole classifier but for its last layer, the head: what transformers puts
between encoder and head, such as BERT's pooler, comes with it and is the server's.

Mini-batches are left-padded here, as the protocol has them, and transformers takes what stands
first for the class token. So the client counts positions from a sequence's first token, and the
server, whose blocks know no order, moves the padding behind. Token types, where there are such,
come beside the ids, [B, 2, S].
"""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DynamicCache, PretrainedConfig

from hosl_flower.models.families.base import Absent, Family, InitStd, Rename
from hosl_flower.models.families.renames import published_renames


class TextFamily(Family, Protocol):
    """What data/encoders/classifier_text.py asks besides."""

    def first_position(self, config: PretrainedConfig) -> int:
        """The row of the position embedding that is the first token's."""


class _Entered(nn.Module):
    """Server-side stand-in for the embeddings: what follows them is here already."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, *_: Any, **__: Any) -> Any:
        return inputs_embeds


class Bert:
    """BERT (Devlin et al. 2019)."""

    auto: Any = AutoModelForSequenceClassification
    attention: ClassVar[dict[str, str]] = {"attn_implementation": "sdpa"}
    modality = "text"
    classes = True
    head = "classifier.weight"
    heads: tuple[str, ...] = ("bert.pooler.", "classifier.")
    base_prefix = "bert"
    decoder_prefix = ""
    embedding = "bert.embeddings.word_embeddings"
    blocks = "bert.encoder.layer"
    transposed = False

    def renames(self, model: Any) -> Rename:
        return published_renames(model)

    def count(self, config: PretrainedConfig) -> int:
        return config.num_hidden_layers

    def width(self, config: PretrainedConfig, cut: int) -> int:
        return config.hidden_size

    def first_position(self, config: PretrainedConfig) -> int:
        return 0

    def keep_client(self, decoder: Any, cut: int) -> None:
        blocks = decoder.get_submodule(self.blocks)
        for index in range(cut, len(blocks)):
            blocks[index] = Absent()
        for name in self.heads:
            decoder.set_submodule(name.rstrip("."), Absent())

    def keep_server(self, decoder: Any, cut: int) -> None:
        blocks = decoder.get_submodule(self.blocks)
        for index in range(cut):
            blocks[index] = Absent()
        decoder.base_model.embeddings = _Entered()
        decoder.set_submodule(self.head.rpartition(".")[0], Absent())

    def enter(
        self, decoder: Any, inputs: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        ids, types = inputs.unbind(1) if inputs.dim() == 3 else (inputs, None)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0) + self.first_position(decoder.config)
        named = {} if types is None else {"token_type_ids": types}
        return decoder.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, **named
        ).last_hidden_state

    def proceed(
        self, decoder: Any, activations: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        length = mask.shape[1]
        padding = length - mask.long().sum(1, keepdim=True)
        places = (torch.arange(length, device=mask.device) + padding) % length  # [B, S]
        ordered = activations.gather(1, places.unsqueeze(2).expand_as(activations))
        features = decoder(inputs_embeds=ordered, attention_mask=mask.gather(1, places)).logits
        return features.unsqueeze(1)

    def run_block(self, block: Any, hidden: Tensor, positional: Any, named: Any) -> Tensor:
        return block(hidden, *positional, **named)

    def init_std(self, config: PretrainedConfig) -> InitStd:
        return config.initializer_range

    def starts_at_one(self, name: str) -> bool:
        return name.endswith(("LayerNorm.weight", "layer_norm.weight"))


class Roberta(Bert):
    """RoBERTa (Liu et al. 2019). The head is the second of two layers."""

    head = "classifier.out_proj.weight"
    heads: tuple[str, ...] = ("classifier.",)
    base_prefix = "roberta"
    embedding = "roberta.embeddings.word_embeddings"
    blocks = "roberta.encoder.layer"

    def first_position(self, config: PretrainedConfig) -> int:
        return config.pad_token_id + 1


class DistilBert(Bert):
    """DistilBERT (Sanh et al. 2019)."""

    heads: tuple[str, ...] = ("pre_classifier.", "classifier.")
    base_prefix = "distilbert"
    embedding = "distilbert.embeddings.word_embeddings"
    blocks = "distilbert.transformer.layer"


TEXT_FAMILIES: dict[str, TextFamily] = {
    "bert": Bert(),
    "distilbert": DistilBert(),
    "roberta": Roberta(),
}
