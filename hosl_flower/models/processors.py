"""Tokenizers and image processors, as they are saved beside weights."""

from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from hosl_flower.errors import ModelError, first_line
from hosl_flower.models.checkpoints import hub
from hosl_flower.models.checkpoints.adapters import holder
from hosl_flower.models.families.registry import family_of
from hosl_flower.models.special_tokens import (
    check_has_vocabulary,
    check_sentencepiece,
    tokenizer_files,
)
from hosl_flower.system.bundled import BUNDLED


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; `random:` models use the bundled OPT tokenizer."""
    try:
        if model.startswith("random:"):
            return AutoTokenizer.from_pretrained(BUNDLED / "opt_tokenizer")
        model = holder(model, "tokenizer_config.json", "tokenizer.json")
        directory = hub.local_directory(model)
        for path in [] if directory is None else tokenizer_files(directory):
            hub.check_readable(path)
        tokenizer = AutoTokenizer.from_pretrained(
            model if directory is None else directory,
            local_files_only=directory is None and not hub.is_reachable(),
            trust_remote_code=False,
        )
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        check_sentencepiece(model)
        raise ModelError(f"{model} has no usable tokenizer: {first_line(error)}") from error
    check_has_vocabulary(tokenizer, model)
    return tokenizer


def load_processor(model: str, config: PretrainedConfig) -> Any:
    """What is saved with a model besides its weights: tokenizer or image processor. model: a
    directory that has it, which may be one of adapters. config: the model's."""
    if family_of(config).modality == "text":
        return load_tokenizer(model)
    from hosl_flower.models.image_processors import load_image_processor

    return load_image_processor(model, config)
