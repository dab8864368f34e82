"""Client submodel + server submodel -> a model directory that plain transformers loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hosl_flower.models.base_model import Base
from hosl_flower.models.families.registry import family_of
from hosl_flower.system.whole_files import made_whole, save_tensors


def save_merged(
    directory: Path,
    base: Base,
    client: Mapping[str, Tensor],
    server: Mapping[str, Tensor],
    processor: Any,
) -> None:
    """Write config, weights and processor (tokenizer or image processor) for `from_pretrained` of
    `AutoModelForCausalLM`, or of the family's own kind.

    client, server: canonical name -> tensor, together the whole model. The head is saved on
    its own and the configuration says untied, since client embedding and server head differ
    after training. A 16-bit client is saved in the server's float32, which holds it exactly.
    Raises OSError when it cannot be written; nothing is left of it then.
    """
    both = {**client, **server}
    floating = [t.dtype for t in both.values() if t.is_floating_point()]
    widest = max(floating, key=lambda dtype: dtype.itemsize)
    tensors = {
        name: t.detach().cpu().to(widest if t.is_floating_point() else t.dtype).contiguous()
        for name, t in both.items()
    }
    config = type(base.config).from_dict(base.config.to_dict())
    config.tie_word_embeddings = False
    config.dtype = widest
    config.architectures = [_architecture(config)]
    with made_whole(directory) as part:
        config.save_pretrained(part)
        processor.save_pretrained(part)
        save_tensors(tensors, part / "model.safetensors", metadata={"format": "pt"})


def _architecture(config: Any) -> str:
    """The class name of the whole model, for config.json."""
    return family_of(config).auto._model_mapping[type(config)].__name__
