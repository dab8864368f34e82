"""Names of tensors in published checkpoints, as transformers has them today."""

from collections.abc import Callable
from typing import Any


def published_renames(model: Any) -> Callable[[str], str]:
    """For `Family.renames`, from transformers' own table: published checkpoints have the names of
    older versions, some of which it still writes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    renamings = get_model_conversion_mapping(model)
    return lambda name: rename_source_key(name, renamings, [])[0]
