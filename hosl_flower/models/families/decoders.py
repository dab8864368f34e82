"""Model families: the few facts about a transformers decoder that splitting it needs.

The submodels run transformers' own decoder, with the other side's modules taken out: masks,
positions and attention are never re-implemented here. A new family is one small class like
`Gpt2` and an entry in FAMILIES; tests/models/test_decoders.py shows what it must satisfy.
Classifiers have a "decoder" that maps their inputs to what the rows of the head, one for each
class, are multiplied with: those of images are in images.py, those of text in encoders.py.
"""

import inspect
from collections.abc import Mapping
from functools import cache as remembered
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from hosl_flower.models.families.base import (
    HEAD,
    Absent,
    Family,
    InitStd,
    Rename,
)


class _NoPositions(nn.Module):
    """Server-side stand-in for a position embedding: the client has added it already."""

    def forward(self, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros((), device=positions.device)


class _Decoder:
    """What all families of language models have in common, and most have of the rest. Most count
    positions from the first column unless told otherwise, padding or not."""

    auto: Any = AutoModelForCausalLM
    attention: ClassVar[dict[str, str]] = {"attn_implementation": "sdpa"}
    modality = "text"
    classes = False
    head = HEAD
    heads: tuple[str, ...] = ("lm_head.",)
    transposed = False

    def renames(self, model: Any) -> Rename:
        return str

    def count(self, config: PretrainedConfig) -> int:
        return config.num_hidden_layers

    def width(self, config: PretrainedConfig, cut: int) -> int:
        return config.hidden_size

    def enter(
        self, decoder: Any, inputs: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        return self._run(decoder, inputs.shape[1], mask, cache, input_ids=inputs)

    def proceed(
        self, decoder: Any, activations: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        return self._run(decoder, activations.shape[1], mask, cache, inputs_embeds=activations)

    def _run(
        self,
        decoder: Any,
        length: int,
        mask: Tensor,
        cache: DynamicCache | None,
        **inputs: Tensor,
    ) -> Tensor:
        """The last hidden state [B, S, D] of inputs of `length` S, which follow what is cached."""
        positions = self.positions(mask)
        return decoder(
            attention_mask=mask,
            use_cache=cache is not None,
            **{_cache_argument(decoder.__class__): cache},
            **{name: each[:, -length:] for name, each in positions.items()},
            **inputs,
        ).last_hidden_state

    def run_block(self, block: Any, hidden: Tensor, positional: Any, named: Any) -> Tensor:
        output = block(hidden, *positional, **named)
        return output[0] if isinstance(output, tuple) else output

    def positions(self, mask: Tensor) -> Mapping[str, Tensor]:
        """What the decoder is told beside the mask [B, S], so that padding shifts nothing."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def init_std(self, config: PretrainedConfig) -> InitStd:
        return config.initializer_range


class Opt(_Decoder):
    """OPT (Zhang et al. 2022), 125M to 175B, including 350M's projections and post-norm."""

    base_prefix = "model"
    decoder_prefix = "model.decoder."
    embedding = "embed_tokens"
    blocks = "layers"

    def keep_client(self, decoder: Any, cut: int) -> None:
        for index in range(cut, len(decoder.layers)):
            decoder.layers[index] = Absent()
        decoder.final_layer_norm = None
        decoder.project_out = None
        for module in decoder.modules():
            if isinstance(module, nn.ReLU):  # the widest tensor of a block, once and not twice
                module.inplace = True

    def keep_server(self, decoder: Any, cut: int) -> None:
        for index in range(cut):
            decoder.layers[index] = Absent()
        decoder.embed_tokens = None
        decoder.embed_positions = _NoPositions()
        decoder.project_in = None

    def positions(self, mask: Tensor) -> Mapping[str, Tensor]:
        return {"position_ids": (mask.cumsum(1) * mask - 1).long()}

    def init_std(self, config: PretrainedConfig) -> InitStd:
        return config.init_std

    def starts_at_one(self, name: str) -> bool:
        return name.endswith("norm.weight")


class Gpt2(_Decoder):
    """GPT-2 (Radford et al. 2019)."""

    base_prefix = "transformer"
    decoder_prefix = "transformer."
    embedding = "wte"
    blocks = "h"
    transposed = True

    def keep_client(self, decoder: Any, cut: int) -> None:
        for index in range(cut, len(decoder.h)):
            decoder.h[index] = Absent()
        decoder.ln_f = Absent()

    def keep_server(self, decoder: Any, cut: int) -> None:
        for index in range(cut):
            decoder.h[index] = Absent()
        decoder.wte = None
        decoder.wpe = _NoPositions()

    def starts_at_one(self, name: str) -> bool:
        return name.rpartition(".")[0].endswith(("ln_1", "ln_2", "ln_f"))


class Llama(_Decoder):
    """Llama (Touvron et al. 2023) and the families whose modules have its names: Llama 2 and 3,
    SmolLM, Mistral, Qwen2 and Qwen3. Rotary positions are made on both sides."""

    base_prefix = "model"
    decoder_prefix = "model."
    embedding = "embed_tokens"
    blocks = "layers"

    def keep_client(self, decoder: Any, cut: int) -> None:
        for index in range(cut, len(decoder.layers)):
            decoder.layers[index] = Absent()
        decoder.norm = Absent()

    def keep_server(self, decoder: Any, cut: int) -> None:
        for index in range(cut):
            decoder.layers[index] = Absent()
        decoder.embed_tokens = None

    def starts_at_one(self, name: str) -> bool:
        return name.endswith("norm.weight")


class Gemma3(Llama):
    """Gemma 3's text models (Gemma Team 2025). The embedding scales its own rows; norms multiply
    by 1 + weight."""

    def starts_at_one(self, name: str) -> bool:
        return False


FAMILIES: dict[str, Family] = {
    "gemma3_text": Gemma3(),
    "gpt2": Gpt2(),
    "llama": Llama(),
    "mistral": Llama(),
    "opt": Opt(),
    "qwen2": Llama(),
    "qwen3": Llama(),
}


@remembered
def _cache_argument(decoder: type) -> str:
    """Name of the argument by which a class of decoders takes its cache: transformers renamed
    `past_key_values`, and removes the old name in 5.40."""
    named = inspect.signature(decoder.forward).parameters  # type: ignore[attr-defined]
    return "cache" if "cache" in named else "past_key_values"
