"""A base model: its configuration, its weights, where it can be cut."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from hosl_flower.errors import ModelError, first_line
from hosl_flower.models.architectures import RANDOM, architecture
from hosl_flower.models.before_loading import check_cut_in
from hosl_flower.models.checkpoints import hub
from hosl_flower.models.checkpoints.adapters import AdaptedWeights, base_of, find_adapters
from hosl_flower.models.checkpoints.model_kind import (
    check_head,
    check_plain,
    not_a_config,
    without_config,
)
from hosl_flower.models.checkpoints.source import PretrainedWeights, RandomWeights, WeightSource
from hosl_flower.models.families.base import HEAD, Family
from hosl_flower.models.families.decoders import FAMILIES
from hosl_flower.models.families.registry import family_of
from hosl_flower.models.lora import Lora, check_targets


@dataclass(frozen=True)
class Base:
    """The model before fine-tuning: its configuration and where its tensors come from."""

    model: str
    config: PretrainedConfig
    source: WeightSource
    pretrained: bool

    @property
    def blocks(self) -> int:
        """Number of blocks: the largest possible cut layer."""
        return self.family.count(self.config)

    @property
    def family(self) -> Family:
        """The adapter of the model's kind."""
        return family_of(self.config)


def open_base(model: str, seed: int = 0, partial: bool = False) -> Base:
    """Open a model: a directory, a hub id, of a model or of LoRA adapters, or
    `random:<architecture>`; reads headers only.

    seed: of the weights of `random:` models. partial: download no more of a hub model than the
    tensors that are then asked for. Raises ModelError or ConfigError.
    """
    config = model_config(model)
    family = family_of(config)
    if model.startswith(RANDOM):
        ones = family.starts_at_one
        # a language model's head is tied to its embedding
        source = RandomWeights(seed, family.init_std(config), ones, absent={HEAD})
        return Base(model, config, source, pretrained=False)
    whole, _, _ = model_skeleton(
        config, 0
    )  # an impossible configuration is refused here, not midway
    names = family.heads, family.renames(whole)
    checkpoint = PretrainedWeights(
        base_of(model), family.base_prefix, family.blocks, partial, *names
    )
    if checkpoint.blocks() > family.count(config):
        raise ModelError(
            f"{model}: config.json says {family.count(config)} blocks, the weights have "
            f"{checkpoint.blocks()}; they do not belong together"
        )
    adapters = find_adapters(model)
    if adapters is None:
        return Base(model, config, checkpoint, pretrained=True)
    weights = AdaptedWeights(checkpoint, adapters, family.transposed)
    return Base(model, config, weights, pretrained=True)


def model_config(model: str) -> PretrainedConfig:
    """The configuration of a model as `open_base` takes it."""
    if model.startswith(RANDOM):
        return architecture(model.removeprefix(RANDOM))
    return load_model_config(model)


def load_model_config(model: str) -> PretrainedConfig:
    """config.json of a directory or hub id, or of the base model of adapters; ModelError when
    there is none."""
    model = base_of(model)
    path = hub.locate(model, "config.json")
    if path is None:
        raise ModelError(f"{model} has no config.json: {without_config(model)}")
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a damaged configuration
        reason = not_a_config(path) or f"{path} cannot be used: {first_line(error)}"
        raise ModelError(reason) from error
    check_plain(config, model)
    if config.model_type in FAMILIES:
        check_head(config, model)
        _forget_padding(config)
    return config


def _forget_padding(config: PretrainedConfig) -> None:
    """Where the padding token has no row of the embedding, which torch would refuse, the model has
    none: what is padding, masks say."""
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and not 0 <= padding < config.vocab_size:
        config.pad_token_id = None


def check_cut(config: PretrainedConfig, cut: int) -> None:
    """ConfigError unless 0 <= cut <= number of blocks."""
    check_cut_in(family_of(config).count(config), cut)


def model_skeleton(
    config: PretrainedConfig, cut: int, lora: Lora | None = None
) -> tuple[nn.Module, nn.Module, Family]:
    """(whole model, its decoder, family) without memory: every tensor on the meta device."""
    check_cut(config, cut)
    family = family_of(config)
    try:
        with torch.device("meta"):
            model = family.auto.from_config(config, **family.attention)
    except (ValueError, RuntimeError, KeyError, TypeError, AssertionError) as error:
        raise ModelError(
            f"{config.name_or_path}: config.json describes no possible {config.model_type} "
            f"model: {first_line(error)}"
        ) from error
    decoder = model.get_submodule(family.decoder_prefix.rstrip("."))
    if lora is not None:
        check_targets(decoder, lora)
    return model, decoder, family
