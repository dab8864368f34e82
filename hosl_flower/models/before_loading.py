"""What a model's name and config.json tell before torch, which takes seconds, is loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hosl_flower.errors import CheckpointError, ConfigError
from hosl_flower.models.architectures import RANDOM, settings_of
from hosl_flower.models.checkpoints import hub
from hosl_flower.system.untrusted_files import parse_json, read_regular

_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers")  # keys of families of transformers


def check_model(
    model: str,
    cut: int | None,
    find: Callable[[str, str], Path | None] = hub.cached,
) -> None:
    """Refuse a name that can be no model, and a cut outside the model.

    What cannot be told here, such as the blocks of adapters, is left to `open_base`.

    Args:
        model: as `open_base` takes it.
        cut: the cut layer; None where it is not known.
        find: the local path of a file of a hub repository, by the names of both.

    Raises:
        ModelError: for a directory that is not there or cannot be read.
        ConfigError: for an unknown architecture, or a wrong cut.
    """
    if model.startswith(RANDOM):
        blocks = blocks_of(settings_of(model.removeprefix(RANDOM)))
    else:
        blocks = _blocks_in_file(model, find)
    if cut is not None and blocks is not None:
        check_cut_in(blocks, cut)


def check_cut_in(blocks: int, cut: int) -> None:
    """Refuse a cut of a model with so many blocks.

    Raises:
        ConfigError: unless 0 <= cut <= blocks.
    """
    if not 0 <= cut <= blocks:
        raise ConfigError(
            f"cut-layer = {cut} is outside 0..{blocks}, the number of blocks of this model"
        )


def blocks_of(settings: Mapping[str, Any]) -> int | None:
    """The number of blocks by the settings of a config.json; None where they do not say."""
    if settings.get("model_type") == "resnet":
        depths = settings.get("depths")
        return len(depths) if isinstance(depths, list) else None
    found = [settings[key] for key in _BLOCKS if key in settings]
    return found[0] if len(found) == 1 and type(found[0]) is int else None


def _blocks_in_file(model: str, find: Callable[[str, str], Path | None]) -> int | None:
    directory = hub.local_directory(model)
    if directory is None:
        path = find(model, "config.json")
    elif (directory / "adapter_config.json").exists():
        return None  # they belong to another model
    else:
        path = directory / "config.json"
    try:
        settings = parse_json(read_regular(path)) if path else None
    except (OSError, ValueError, CheckpointError):
        return None  # it is said where the model is opened
    return blocks_of(settings) if isinstance(settings, dict) else None
