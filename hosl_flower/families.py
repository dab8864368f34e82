"""Model families: the few facts about a transformers decoder that splitting it needs.

The submodels run transformers' own decoder, with the other side's modules taken out: masks,
positions and attention are never re-implemented here. A new family is one small class like
`Gpt2` and an entry in FAMILIES; tests/test_families.py shows what it must satisfy.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hosl_flower.errors import ConfigError

HEAD = "lm_head.weight"  # in every family


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
    """Names of the modules of a block that residual feedback goes by: the attention's output
    projection, the MLP's norm, first and second matrix and activation; gate: of an MLP that is
    down(activation(gate(x)) * up(x)), else down(activation(up(x)))."""

    attention: str
    norm: str
    up: str
    down: str
    activation: str
    gate: str = ""


class Family(Protocol):
    """What split.py asks of a model family. Names are attributes of the causal LM and of its
    decoder, the module that maps input ids or embeddings to the last hidden state."""

    base_prefix: str  # of the causal LM: the base model
    decoder_prefix: str  # canonical name prefix of the decoder's parameters
    embedding: str  # of the decoder: the token embedding
    blocks: str  # of the decoder: the list of blocks
    transposed: bool  # matrices are stored [in, out]

    def keep_client(self, decoder: Any, cut: int) -> None:
        """Take out everything after block `cut`."""

    def keep_server(self, decoder: Any, cut: int) -> None:
        """Take out the embeddings and the first `cut` blocks."""

    def positions(self, mask: Tensor) -> Mapping[str, Tensor]:
        """What the decoder is told beside the mask [B, S], so that padding shifts nothing."""

    def init_std(self, config: PretrainedConfig) -> float:
        """Standard deviation of freshly initialised matrices."""

    def starts_at_one(self, name: str) -> bool:
        """Whether a freshly initialised vector, by canonical name, is ones, not zeros."""

    def residual_parts(self, config: PretrainedConfig) -> Parts | None:
        """For residual feedback: None unless embeddings, attention and MLP are added to the
        residual stream as they are: no projection, and no norm after attention or MLP."""

    def embedded(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        """For residual feedback: rows [b, S] of each embedding that ids and mask [b, S] take, by
        parameter name within the decoder."""


class Opt:
    """OPT (Zhang et al. 2022), 125M to 175B, including 350M's projections and post-norm."""

    base_prefix = "model"
    decoder_prefix = "model.decoder."
    embedding = "embed_tokens"
    blocks = "layers"
    transposed = False

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

    def init_std(self, config: PretrainedConfig) -> float:
        return config.init_std

    def starts_at_one(self, name: str) -> bool:
        return name.endswith("norm.weight")

    def residual_parts(self, config: PretrainedConfig) -> Parts | None:
        plain = config.word_embed_proj_dim == config.hidden_size and config.do_layer_norm_before
        if not plain:
            return None
        return Parts("self_attn.out_proj", "final_layer_norm", "fc1", "fc2", "activation_fn")

    def embedded(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        offset = 2  # of OPT's position embedding
        positions = self.positions(mask)["position_ids"]
        return {"embed_tokens.weight": ids, "embed_positions.weight": positions + offset}


class _Decoder:
    """What the families below have in common. They count positions from the first column unless
    told otherwise, padding or not."""

    transposed = False

    def positions(self, mask: Tensor) -> Mapping[str, Tensor]:
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def init_std(self, config: PretrainedConfig) -> float:
        return config.initializer_range


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
        return Parts("attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj", "mlp.act")

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
        return Parts("self_attn.o_proj", "post_attention_layernorm", *mlp)

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


def family_of(config: PretrainedConfig) -> Family:
    """The family of a configuration; ConfigError names the supported ones."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model type {config.model_type!r} is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}. A family is one adapter in hosl_flower/families.py: "
            "the names of its modules and how to take out those of the other side"
        )
    if getattr(config, "final_logit_softcapping", None):
        raise ConfigError("a model that caps its logits (final_logit_softcapping) is not supported")
    return FAMILIES[config.model_type]


def embedding_name(config: PretrainedConfig) -> str:
    """Canonical name of the token embedding."""
    family = family_of(config)
    return f"{family.decoder_prefix}{family.embedding}.weight"
