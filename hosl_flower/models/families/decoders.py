"""Model families: the few facts about a transformers decoder that splitting it needs.

The submodels run transformers' own decoder, with the other side's modules taken out: masks,
positions and attention are never re-implemented here. A new family is one small class like
`Gpt2` and an entry in FAMILIES; tests/test_families.py shows what it must satisfy. Classifiers have
a "decoder" that maps their inputs to what the rows of the head, one for each class, are multiplied
with: those of images are in image_families.py, those of text in text_families.py.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache as remembered
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from hosl_flower.errors import ConfigError

HEAD = "lm_head.weight"  # in every family of language models


class Absent(nn.Module):
    """Stands where a module of the other side was: passes its first argument through.

    Blocks keep their index, so parameter names stay those of the unsplit model.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class _NoPositions(nn.Module):
    """Server-side stand-in for a position embedding: the client has added it already."""

    def forward(self, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros((), device=positions.device)


class Parts(NamedTuple):
    """Names of the modules of a block that residual feedback goes by: the norm before the
    attention; the projections of queries, keys and values, or one of all three; the attention's
    output projection; the MLP's norm, first and second matrix and activation. gate: of an MLP that
    is down(activation(gate(x)) * up(x)), else down(activation(up(x))). head_norms: of queries and
    of keys, head by head. scaling: the attribute by which a projection's queries are multiplied."""

    entry: str
    projections: tuple[str, ...]
    attention: str
    norm: str
    up: str
    down: str
    activation: str
    gate: str = ""
    head_norms: tuple[str, ...] = ()
    scaling: str = ""


def projections(attention: str) -> tuple[str, ...]:
    """Their usual names."""
    return tuple(f"{attention}.{each}_proj" for each in "qkv")


Rename = Callable[[str], str]
# of all matrices, or by canonical name and shape
InitStd = float | Callable[[str, torch.Size], float]


class Family(Protocol):
    """What split.py asks of a model family. Names are attributes of the causal LM and of its
    decoder, the module that maps input ids or embeddings to the last hidden state."""

    auto: Any  # transformers' class that makes the whole model from a configuration
    attention: ClassVar[dict[str, str]]  # how the model is to compute attention, where it has any
    modality: str  # what the inputs are: "text" or "image"
    classes: bool  # the head's rows are classes of examples, not tokens
    head: str  # canonical name of the head's matrix, [V, D]
    heads: tuple[str, ...]  # what names start with that a checkpoint of the base model may lack
    base_prefix: str  # of the causal LM: the base model
    decoder_prefix: str  # canonical name prefix of the decoder's parameters
    embedding: str  # of the decoder: the token embedding
    blocks: str  # of the decoder: the list of blocks
    transposed: bool  # matrices are stored [in, out]

    def keep_client(self, decoder: Any, cut: int) -> None:
        """Take out everything after block `cut`."""

    def keep_server(self, decoder: Any, cut: int) -> None:
        """Take out the embeddings and the first `cut` blocks."""

    def renames(self, model: Any) -> Rename:
        """Name in a checkpoint -> in the model, where published checkpoints have other names."""

    def count(self, config: PretrainedConfig) -> int:
        """Number of blocks: the largest cut."""

    def width(self, config: PretrainedConfig, cut: int) -> int:
        """H, the width of the activations at a cut."""

    def enter(
        self, decoder: Any, inputs: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Run a client's decoder: inputs, mask [B, S] -> activations [B, S, H]."""

    def proceed(
        self, decoder: Any, activations: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Run a server's decoder: activations [B, S, H], mask [B, S] -> what the head gets
        [B, S, D]; of classifiers [B, 1, D]."""

    def run_block(self, block: Any, hidden: Tensor, positional: Any, named: Any) -> Tensor:
        """One block alone: [B, S, H] and the other arguments it is given -> [B, S', H']."""

    def init_std(self, config: PretrainedConfig) -> InitStd:
        """Standard deviation of freshly initialised matrices."""

    def starts_at_one(self, name: str) -> bool:
        """Whether a freshly initialised vector, by canonical name, is ones, not zeros."""

    def residual_parts(self, config: PretrainedConfig) -> Parts | None:
        """For residual feedback: None unless embeddings, attention and MLP are added to the
        residual stream as they are: no projection, and no norm after attention or MLP."""

    def embedded(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        """For residual feedback: rows [b, S] of each embedding that ids and mask [b, S] take, by
        parameter name within the decoder."""


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

    def residual_parts(self, config: PretrainedConfig) -> Parts | None:
        plain = config.word_embed_proj_dim == config.hidden_size and config.do_layer_norm_before
        if not plain:
            return None
        attention = (projections("self_attn"), "self_attn.out_proj")
        mlp = ("final_layer_norm", "fc1", "fc2", "activation_fn")
        return Parts("self_attn_layer_norm", *attention, *mlp, scaling="self_attn.scaling")

    def embedded(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        offset = 2  # of OPT's position embedding
        positions = self.positions(mask)["position_ids"]
        return {"embed_tokens.weight": ids, "embed_positions.weight": positions + offset}


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

    def residual_parts(self, config: PretrainedConfig) -> Parts | None:
        mlp = ("mlp.c_fc", "mlp.c_proj", "mlp.act")
        return Parts("ln_1", ("attn.c_attn",), "attn.c_proj", "ln_2", *mlp)

    def embedded(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        return {"wte.weight": ids, "wpe.weight": self.positions(mask)["position_ids"]}


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

    def residual_parts(self, config: PretrainedConfig) -> Parts | None:
        mlp = ("mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "mlp.gate_proj")
        attention = (projections("self_attn"), "self_attn.o_proj", "post_attention_layernorm")
        norms = ("self_attn.q_norm", "self_attn.k_norm") if config.model_type == "qwen3" else ()
        return Parts("input_layernorm", *attention, *mlp, head_norms=norms)

    def embedded(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        return {"embed_tokens.weight": ids}


class Gemma3(Llama):
    """Gemma 3's text models (Gemma Team 2025). The embedding scales its own rows; norms multiply
    by 1 + weight."""

    def starts_at_one(self, name: str) -> bool:
        return False

    def residual_parts(self, config: PretrainedConfig) -> Parts | None:
        return None  # there are norms after attention and MLP


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


def family_of(config: PretrainedConfig) -> Family:
    """The family of a configuration; ConfigError names the supported ones."""
    from hosl_flower.models.families.encoders import TEXT_FAMILIES
    from hosl_flower.models.families.images import IMAGE_FAMILIES  # they build on this module

    families = {**FAMILIES, **IMAGE_FAMILIES, **TEXT_FAMILIES}
    if config.model_type not in families:
        raise ConfigError(
            f"model type {config.model_type!r} is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}, classifiers of text "
            f"{', '.join(sorted(TEXT_FAMILIES))}, and of images "
            f"{', '.join(sorted(IMAGE_FAMILIES))}. "
            "A family is one adapter in hosl_flower/models/families/decoders.py: "
            "the names of its modules and how to take out those of the other side"
        )
    if getattr(config, "final_logit_softcapping", None):
        raise ConfigError("a model that caps its logits (final_logit_softcapping) is not supported")
    return families[config.model_type]


def embedding_name(config: PretrainedConfig) -> str:
    """Canonical name of the token embedding."""
    family = family_of(config)
    return f"{family.decoder_prefix}{family.embedding}.weight"
