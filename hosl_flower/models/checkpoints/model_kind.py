"""Models that cannot be trained here, by what is in their directory: which kind they are, and what
to use instead."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from hosl_flower.errors import ModelError
from hosl_flower.models.checkpoints import hub

# weights of other formats, by the end of the file's name
_FORMATS = {
    ".gguf": "GGUF, the format of llama.cpp",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".pth": "a plain PyTorch file",
    ".pt": "a plain PyTorch file",
    ".ckpt": "a plain PyTorch file",
}
# heads other than a language model's, by the end of the class name
_HEADS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a model that chooses among texts",
    "RewardModel": "a reward model",
}


def without_config(model: str) -> str:
    """Why a model has no config.json, as far as its directory tells; what to use instead."""
    expected = "expected a directory or hub id of a Hugging Face model"
    directory = hub.local_directory(model)
    if directory is None:
        return expected
    if not any(directory.iterdir()):
        return f"the directory is empty; {expected}"
    return f"{other_weights(model)}{expected}"


def other_weights(model: str) -> str:
    """Weights in a directory that are not read, why, and what to do; "" without any."""
    directory = hub.local_directory(model)
    files = [] if directory is None else sorted(directory.iterdir())
    parts = [file.name for file in files if re.search(r"-of-\d+\.(safetensors|bin)$", file.name)]
    if parts:
        return f"it has {parts[0]}, but not the index of such parts, which is to be copied too; "
    found = next((file for file in files if file.suffix in _FORMATS), None)
    if found is None:
        return ""
    return (
        f"{found.name} is {_FORMATS[found.suffix]}, which cannot be read here: use the model that "
        "it was made from, or convert it with transformers' save_pretrained; "
    )


def not_a_config(path: Path) -> str:
    """What else a config.json is that transformers cannot use; "" where that is not known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if isinstance(content, dict) and "config" in content and "model_type" not in content:
        return (
            f"{path.parent} is the directory of a run, not a model: its model is "
            f"{path.parent / 'model'}, where it was saved"
        )
    return ""


def check_plain(config: PretrainedConfig, model: str) -> None:
    """ModelError for a quantised model, by its configuration."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    found: Mapping[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(found.get("quant_method") or "unknown method")
    bits = found.get("bits")
    for number in (4, 8):
        bits = number if found.get(f"load_in_{number}bit") else bits
    raise quantised(model, f"{method}, {bits} bits" if bits else method)


def quantised(model: str, method: str) -> ModelError:
    """The error for a model whose weights are not floating point numbers."""
    return ModelError(
        f"{model} is a quantised model ({method}), whose weights cannot be trained or cut here: "
        "use the model that it was made from, in 16 or 32 bits; dtype = bfloat16 or "
        "client-quantization = int8 saves memory on clients"
    )


def check_head(config: PretrainedConfig, model: str) -> None:
    """ModelError for a decoder that was saved with another head than a language model's: where
    that is tied to the embedding, it would be there, untrained, and nothing would be missing."""
    for name in config.architectures or ():
        kind = next((own for end, own in _HEADS.items() if name.endswith(end)), None)
        if kind:
            raise ModelError(
                f"{model} is a {name}, {kind}; a {config.model_type} model answers with words here "
                "and needs the head of a language model: use the language model that it was made "
                "from, or, for classes without words, a classifier such as BERT"
            )
