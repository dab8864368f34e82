"""Models whose residual stream is a plain sum, which the rules of a block need.

By model type: the modules of a block, and the embedding rows that tokens take. A model type that is
not here has no rules, for instance because norms follow its attention and MLP (BERT, Gemma 3).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PretrainedConfig

from hosl_flower.errors import ConfigError
from hosl_flower.models.submodels import ClientSubmodel

_OPT_OFFSET = 2  # of its position embedding


class Parts(NamedTuple):
    """Names of the modules of a block that residual feedback goes by.

    Attributes:
        entry: the norm before the attention.
        projections: of queries, keys and values, or one of all three.
        attention: the attention's output projection.
        norm: the MLP's norm.
        up: its first matrix.
        down: its last matrix.
        activation: its activation.
        gate: of an MLP that is down(activation(gate(x)) * up(x)), else down(activation(up(x))).
        head_norms: of queries and of keys, head by head.
        scaling: the attribute by which a projection's queries are multiplied.
    """

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


def _projections(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{each}_proj" for each in "qkv")


def _opt(config: PretrainedConfig) -> Parts | None:
    if config.word_embed_proj_dim != config.hidden_size or not config.do_layer_norm_before:
        return None  # OPT-350M's projections and post-norm
    attention = (_projections("self_attn"), "self_attn.out_proj")
    mlp = ("final_layer_norm", "fc1", "fc2", "activation_fn")
    return Parts("self_attn_layer_norm", *attention, *mlp, scaling="self_attn.scaling")


def _gpt2(config: PretrainedConfig) -> Parts:
    mlp = ("mlp.c_fc", "mlp.c_proj", "mlp.act")
    return Parts("ln_1", ("attn.c_attn",), "attn.c_proj", "ln_2", *mlp)


def _llama(config: PretrainedConfig) -> Parts:
    mlp = ("mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "mlp.gate_proj")
    attention = (_projections("self_attn"), "self_attn.o_proj", "post_attention_layernorm")
    norms = ("self_attn.q_norm", "self_attn.k_norm") if config.model_type == "qwen3" else ()
    return Parts("input_layernorm", *attention, *mlp, head_norms=norms)


def _vit(config: PretrainedConfig) -> Parts:
    mlp = ("mlp.fc1", "mlp.fc2", "mlp.activation_fn")
    attention = (_projections("attention"), "attention.o_proj", "layernorm_after")
    return Parts("layernorm_before", *attention, *mlp)


_BLOCKS: dict[str, Callable[[PretrainedConfig], Parts | None]] = {
    "gpt2": _gpt2, "llama": _llama, "mistral": _llama, "opt": _opt, "qwen2": _llama,
    "qwen3": _llama, "vit": _vit,
}  # fmt: skip


def block_parts(submodel: ClientSubmodel) -> Parts:
    """The modules of a client submodel's blocks.

    Raises:
        ConfigError: for a model whose stream is no plain sum.
    """
    decoder: Any = submodel.decoder
    found = _BLOCKS.get(decoder.config.model_type)
    parts = None if found is None else found(decoder.config)
    if parts is None:
        raise ConfigError(
            "client-gradient = residual and exact need a pre-norm model that adds embeddings, "
            "attention and MLP to the stream as they are; use recompute"
        )
    return parts


def embedded_rows(submodel: ClientSubmodel, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
    """The rows [b, S] of each embedding that tokens take, by parameter name in the decoder.

    Args:
        submodel: a client submodel that `block_parts` knows.
        ids: token ids [b, S].
        mask: of the tokens that are used [b, S].
    """
    decoder: Any = submodel.decoder
    family: Any = submodel.family
    match decoder.config.model_type:
        case "opt":
            positions = family.positions(mask)["position_ids"] + _OPT_OFFSET
            return {"embed_tokens.weight": ids, "embed_positions.weight": positions}
        case "gpt2":
            return {"wte.weight": ids, "wpe.weight": family.positions(mask)["position_ids"]}
        case "vit":
            return {}  # patches are no rows of an embedding
    return {"embed_tokens.weight": ids}
