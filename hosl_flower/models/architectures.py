"""Architectures that can be built without a checkpoint, as `model = "random:<name>"`.

Sizes are those of the models' config.json (OPT: Table 1 of arXiv 2205.01068); a name ending in
-tiny or -mini is no published model. Random models use the bundled tokenizer of OPT, so the
published ones whose vocabulary is smaller than that (GPT-2, SmolLM, Mistral, BERT) are not here.
"""

from typing import TYPE_CHECKING, Any

from hosl_flower.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RANDOM = "random:"


def _opt(hidden: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **other,
    }


def _grouped(
    kind: str, hidden: int, inner: int, layers: int, heads: int, groups: int, **other: Any
) -> dict[str, Any]:
    """A decoder with rotary positions and groups of query heads that share keys and values."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": True,
        **other,
    }


def _theta(base: float, **other: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base, **other}


def _gemma3(hidden: int, inner: int, layers: int) -> dict[str, Any]:
    """Five blocks of 512 tokens' attention to each of all tokens'."""
    rope = {"sliding_attention": _theta(1e4), "full_attention": _theta(1e6)}
    return _grouped(
        "gemma3_text", hidden, inner, layers, 4, 1, head_dim=256, vocab_size=262144,
        sliding_window=512, max_position_embeddings=32768, rope_parameters=rope,
    )  # fmt: skip


# of every family, small enough for a test; the vocabulary is the bundled tokenizer's, padded
_TINY: dict[str, Any] = {
    "vocab_size": 50272, "max_position_embeddings": 256, "initializer_range": 0.06,
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip

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
    "gpt2-tiny": {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, **_TINY},
    "llama-tiny": _grouped("llama", 64, 128, 4, 4, 2, **_TINY),
    "mistral-tiny": _grouped("mistral", 64, 128, 4, 4, 2, sliding_window=16, **_TINY),
    "qwen2-tiny": _grouped("qwen2", 64, 128, 4, 4, 2, **_TINY),
    "qwen3-tiny": _grouped("qwen3", 64, 128, 4, 4, 2, head_dim=16, **_TINY),
    "gemma3-tiny": _grouped(
        "gemma3_text", 64, 128, 4, 4, 2, head_dim=16, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, **_TINY,
    ),
    "llama-3.2-1b": _grouped(
        "llama", 2048, 8192, 16, 32, 8, head_dim=64, vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    ),
    "qwen2.5-0.5b": _grouped(
        "qwen2", 896, 4864, 24, 14, 2, vocab_size=151936, max_position_embeddings=32768,
        rope_parameters=_theta(1e6),
    ),
    "qwen3-0.6b": _grouped(
        "qwen3", 1024, 3072, 28, 16, 8, head_dim=128, vocab_size=151936,
        max_position_embeddings=40960, rope_parameters=_theta(1e6),
    ),
    "gemma-3-270m": _gemma3(640, 2048, 18),
    "gemma-3-1b-pt": _gemma3(1152, 6912, 26),
}  # fmt: skip


def _vit(hidden: int, layers: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
        "num_labels": 1000,
    }


def _resnet(layer: str, sizes: list[int], depths: list[int], stem: int = 64) -> dict[str, Any]:
    return {
        "model_type": "resnet",
        "layer_type": layer,
        "hidden_sizes": sizes,
        "depths": depths,
        "embedding_size": stem,
        "num_labels": 1000,
    }


_WIDTHS = [64, 128, 256, 512]

# image classifiers; the number of classes is that of ImageNet until the task's is known
IMAGE_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet-tiny": _resnet("basic", [8, 16, 24], [1, 2, 1], stem=8),
    "resnet-18": _resnet("basic", _WIDTHS, [2, 2, 2, 2]),
    "resnet-34": _resnet("basic", _WIDTHS, [3, 4, 6, 3]),
    "resnet-50": _resnet("bottleneck", [256, 512, 1024, 2048], [3, 4, 6, 3]),
    "vit-tiny": _vit(32, 3, 2, image=16, patch=4),
    "vit-base-patch16-224": _vit(768, 12, 12, image=224, patch=16),
    "vit-large-patch16-224": _vit(1024, 24, 16, image=224, patch=16),
}


def _encoder(kind: str, hidden: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **other,
    }


# text classifiers
TEXT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert-tiny": _encoder("bert", 64, 4, 4, **_TINY),
    "distilbert-tiny": {
        "model_type": "distilbert", "dim": 64, "hidden_dim": 256, "n_layers": 4, "n_heads": 4,
        **_TINY,
    },
    "roberta-tiny": _encoder("roberta", 64, 4, 4, type_vocab_size=1, **_TINY),
    "roberta-base": _encoder(
        "roberta", 768, 12, 12, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
        layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    ),
}  # fmt: skip


def known_architectures() -> dict[str, dict[str, Any]]:
    """All of them, by name."""
    return {**ARCHITECTURES, **IMAGE_ARCHITECTURES, **TEXT_ARCHITECTURES}


def settings_of(name: str) -> dict[str, Any]:
    """What config.json of a named architecture would say; ConfigError lists the names."""
    known = known_architectures()
    if name not in known:
        raise ConfigError(f"no architecture {name!r}; there are {', '.join(known)}")
    return known[name]


def architecture(name: str) -> "PretrainedConfig":
    """The configuration of a named architecture; ConfigError lists the names."""
    from transformers import AutoConfig  # seconds, which a wrong name need not wait for

    return AutoConfig.for_model(**settings_of(name))
