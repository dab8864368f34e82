"""Image processors of checkpoints. Imported late: it brings Pillow."""

from typing import Any

from transformers import PretrainedConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hosl_flower.errors import ConfigError, ModelError, first_line
from hosl_flower.models.checkpoints import hub
from hosl_flower.models.checkpoints.adapters import holder
from hosl_flower.models.families.images import IMAGE_FAMILIES

_LARGEST = 4096  # height and width


def load_image_processor(model: str, config: PretrainedConfig, size: int = 0) -> Any:
    """The image processor of a model; `random:` models, and those without one, get one that only
    resizes, and scales pixels to -1..1. size: to resize to, instead of what the processor does,
    with its mean and deviation. Raises ModelError, or ConfigError for a size that cannot be.
    """
    if size > _LARGEST:
        raise ConfigError(f"image-size = {size}: expected at most {_LARGEST}")
    half = [0.5] * config.num_channels
    own: dict[str, Any] = {"image_mean": half, "image_std": half}
    found = None if model.startswith("random:") else _saved_processor(model)
    if found is not None and not size:
        return found
    if found is not None:
        names = ("image_mean", "image_std", "resample", "rescale_factor", "do_normalize")
        own = {name: getattr(found, name) for name in names}
    size = size or IMAGE_FAMILIES[config.model_type].image_size(config) or 224
    return ViTImageProcessorPil(size={"height": size, "width": size}, **own)


def _saved_processor(model: str) -> Any:
    from transformers import AutoImageProcessor

    path = hub.locate(holder(model, "preprocessor_config.json"), "preprocessor_config.json")
    if path is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise ModelError(f"{path} cannot be used: {first_line(error)}") from error
