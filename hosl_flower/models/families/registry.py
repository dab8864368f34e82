"""The family of a model: the only file that knows all of them."""

from transformers import PretrainedConfig

from hosl_flower.errors import ConfigError
from hosl_flower.models.families.base import Family
from hosl_flower.models.families.decoders import FAMILIES


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
