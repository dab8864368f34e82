"""LoRA adapters as a model: what peft, or a run with save-format = adapters, has written, over the
base model it names. Each matrix is read with its adapter folded in (models/lora.py), in
float32, and then has the dtype that is wanted:

    W + scale B A,   scale = alpha / r, or alpha / sqrt(r) for rank-stabilised ones
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hosl_flower.errors import ModelError
from hosl_flower.models.checkpoints import hub
from hosl_flower.models.checkpoints.source import PretrainedWeights
from hosl_flower.models.checkpoints.torch_bin import damaged

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what peft's names start with
_A, _B = ".lora_A.weight", ".lora_B.weight"
_MERGE = "merge them with peft's merge_and_unload() and use what save_pretrained then writes"
# settings with which weights are not W + scale B A, or W is not the base's: expected values
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
}
_CHANGE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # ways to start adapters


@dataclass(frozen=True)
class Adapters:
    """model: the directory or hub id of adapters. base: the one of the model they belong to.
    settings: adapter_config.json."""

    model: str
    base: str
    settings: dict[str, Any]


def find_adapters(model: str) -> Adapters | None:
    """The adapters that a model consists of; None for a model with weights of its own.

    As in transformers adapters come first where a directory has both. Raises ModelError for
    an adapter_config.json that names no base model.
    """
    if model.startswith("random:"):
        return None
    local = hub.local_directory(model) is not None
    path = hub.locate(model, _CONFIG) if local else _on_hub(model)
    if path is None:
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no configuration of adapters: {error!r}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{path} names no base model: set base_model_name_or_path, or give the merged model"
        )
    return Adapters(model, base, settings)


@cache
def _on_hub(model: str) -> Path | None:
    """The configuration of adapters in a repository without one of a model; asked for once."""
    return None if hub.locate(model, "config.json") else hub.locate(model, _CONFIG)


def base_of(model: str) -> str:
    """The model itself, or the one that its adapters belong to. ModelError where that cannot
    be had, or is adapters again."""
    found = find_adapters(model)
    if found is None:
        return model
    on_hub = hub.local_directory(model) is None
    try:
        if on_hub and hub.local_directory(found.base) is not None:
            raise ModelError("adapters on the hub may name no directory of this machine")
        again = find_adapters(found.base)
    except ModelError as error:
        raise ModelError(
            f"{model} has adapters of the model {found.base!r}, which cannot be read: {error}. "
            f"Copy it there, or change base_model_name_or_path in its {_CONFIG}"
        ) from error
    if again is not None:
        raise ModelError(f"{model} has adapters of {found.base}, itself adapters: {_MERGE}")
    return found.base


def holder(model: str, *files: str) -> str:
    """Where a model's tokenizer or image processor is: with adapters, else with their base."""
    found = find_adapters(model)
    if found is None or any(hub.locate(model, file) for file in files):
        return model
    return base_of(model)


class AdaptedWeights:
    """A base model's weights with adapters folded in; see weights.WeightSource.

    transposed: whether the adapted matrices are stored [in, out]. Raises ModelError for
    adapters of another kind than LoRA's matrices, or of another model.
    """

    def __init__(self, base: PretrainedWeights, adapters: Adapters, transposed: bool):
        self.base, self.origin, self._transposed = base, adapters.model, transposed
        _check_settings(adapters)
        self._path = _weights(adapters)
        self._alpha = float(adapters.settings.get("lora_alpha", 8))
        self._stabilised = bool(adapters.settings.get("use_rslora"))
        self._keys = self._adapted()

    def _adapted(self) -> dict[str, str]:
        """Canonical name of a matrix -> the key of its adapters, without ending."""
        keys = {}
        with self._opened() as file:
            for key in file.keys():  # noqa: SIM118  (a file, not a dict)
                stem = key.removesuffix(_A).removesuffix(_B)
                name = self.base.canonical(f"{stem.removeprefix(_PREFIX)}.weight")
                if stem == key:
                    raise ModelError(
                        f"{self._path} has {key}, no LoRA matrix of a linear module: {_MERGE}"
                    )
                if name not in self.base:
                    raise ModelError(
                        f"{self._path} has {key}, but {self.base.origin} has no {name!r}: adapters "
                        f"of another model, or of a head tied to the embedding; {_MERGE}"
                    )
                keys[name] = stem
        return keys

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise damaged(self._path, error) from error

    def __contains__(self, name: str) -> bool:
        return name in self.base

    def blocks(self) -> int:
        """Number of transformer blocks the base's files hold."""
        return self.base.blocks()

    def fill(self, name: str, out: Tensor) -> None:
        if name not in self._keys:
            self.base.fill(name, out)
            return
        whole = torch.empty(out.shape)
        self.base.fill(name, whole)
        change = self._change(name, out.shape)
        out.copy_(whole.add_(change.T if self._transposed else change))

    def rows(self, name: str, shape: tuple[int, int], rows: Sequence[int]) -> Tensor:
        out = self.base.rows(name, shape, rows)
        if name in self._keys:
            change = self._change(name, torch.Size(shape))
            out += (change.T if self._transposed else change)[list(rows)]
        return out

    def _change(self, name: str, shape: torch.Size) -> Tensor:
        """scale B A, [out, in]."""
        stem = self._keys[name]
        with self._opened() as file:
            a, b = (file.get_tensor(f"{stem}{end}").float() for end in (_A, _B))
        expected = tuple(shape)[::-1] if self._transposed else tuple(shape)
        if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != expected:
            raise ModelError(
                f"{self._path}: {stem} has adapters of shapes {list(a.shape)} and {list(b.shape)}, "
                f"which do not fit a matrix of {list(shape)}: adapters of another model?"
            )
        change = (b @ a) * (self._alpha / (math.sqrt(len(a)) if self._stabilised else len(a)))
        if not bool(change.isfinite().all()):
            raise ModelError(
                f"{self._path}: {stem} has NaN or infinity: use adapters from before their "
                "training diverged"
            )
        return change


def _check_settings(adapters: Adapters) -> None:
    settings, start = adapters.settings, adapters.settings.get("init_lora_weights")
    odd = [key for key, plain in _PLAIN.items() if settings.get(key, plain[-1]) not in plain]
    if isinstance(start, str) and start.startswith(_CHANGE_BASE):
        odd.append("init_lora_weights")
    if odd:
        raise ModelError(
            f"{adapters.model}: {_CONFIG} has {odd[0]} = {settings[odd[0]]!r}, and only plain LoRA "
            f"adapters are read: {_MERGE}"
        )


def _weights(adapters: Adapters) -> Path:
    path = hub.locate(adapters.model, _WEIGHTS)
    if path is None:
        raise ModelError(
            f"{adapters.model} has {_CONFIG} but no {_WEIGHTS}; a file of another format is to be "
            "loaded and saved again with peft"
        )
    return path
