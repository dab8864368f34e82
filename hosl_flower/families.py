"""Model families: the few facts about a transformers decoder that splitting it needs.

The submodels run transformers' own decoder, with the other side's modules taken out: masks,
positions and attention are never re-implemented here. A new family is one small class like
`Opt` and an entry in FAMILIES; tests/test_split.py shows what it must satisfy.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import OPTConfig, PretrainedConfig

from hosl_flower.errors import ConfigError


class Absent(nn.Module):
    """Stands where a module of the other side was: passes its first argument through.

    Blocks keep their index, so parameter names stay those of the unsplit model.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class _NoPositions(nn.Module):
    """Server-side stand-in for OPT's position embedding: the client has added it already."""

    def forward(self, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros((), device=attention_mask.device)


class Parts(NamedTuple):
    """Names of the modules of a block that residual feedback goes by: the attention's output
    projection, and the MLP's norm, first and second matrix."""

    attention: str
    norm: str
    up: str
    down: str


class Family(Protocol):
    """What split.py asks of a model family."""

    base_prefix: str  # attribute of the causal LM that holds the base model
    decoder_prefix: str  # canonical name prefix of the decoder's parameters
    parts: "Parts"

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module that maps input ids or embeddings to the last hidden state."""

    def keep_client(self, decoder: Any, cut: int) -> None:
        """Take out everything after block `cut`."""

    def keep_server(self, decoder: Any, cut: int) -> None:
        """Take out the embeddings and the first `cut` blocks."""

    def init_std(self, config: PretrainedConfig) -> float:
        """Standard deviation of freshly initialised matrices."""

    def has_plain_stream(self, config: PretrainedConfig) -> bool:
        """Whether embeddings, attention and MLP are added to the residual stream with nothing on
        it, no projection and no norm between the sums, and the MLP is down(relu(up(norm(h))))."""

    def embedded(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        """Rows [b, S] of each embedding that ids and mask [b, S] take, by parameter name within
        the decoder."""


class Opt:
    """OPT (Zhang et al. 2022), 125M to 175B, including 350M's projections and post-norm."""

    base_prefix = "model"
    decoder_prefix = "model.decoder."
    parts = Parts("self_attn.out_proj", "final_layer_norm", "fc1", "fc2")

    def decoder(self, model: Any) -> nn.Module:
        return model.model.decoder

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

    def init_std(self, config: PretrainedConfig) -> float:
        return config.init_std

    def has_plain_stream(self, config: PretrainedConfig) -> bool:
        plain = config.word_embed_proj_dim == config.hidden_size
        return config.do_layer_norm_before and plain and config.activation_function == "relu"

    def embedded(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        positions = (mask.cumsum(1) * mask - 1).long()
        offset = 2  # of OPT's position embedding
        return {"embed_tokens.weight": ids, "embed_positions.weight": positions + offset}


FAMILIES: dict[str, Family] = {"opt": Opt()}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a configuration; ConfigError names the supported ones."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model type {config.model_type!r} is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}. A family is one adapter in hosl_flower/families.py"
        )
    return FAMILIES[config.model_type]


def _opt(hidden: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **other,
    }


# Architectures that can be built without a checkpoint, as `model = "random:<name>"`.
# The published sizes are from Table 1 of arXiv 2205.01068 and the models' config.json.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt-tiny": _opt(64, 4, 4, max_position_embeddings=256, init_std=0.06),
    "opt-mini": _opt(192, 6, 6, max_position_embeddings=512),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
}


def architecture(name: str) -> OPTConfig:
    """The configuration of a named architecture; ConfigError lists the names."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"no architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    return OPTConfig(**ARCHITECTURES[name])
