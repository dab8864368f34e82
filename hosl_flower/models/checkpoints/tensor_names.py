"""Names of tensors in a file, as wrappers around a model have changed them.

torch's DistributedDataParallel, FullyShardedDataParallel and compile, peft and Lightning each put
something before the names, or between their parts.
"""

from collections.abc import Iterable, Sequence

from hosl_flower.errors import ModelError
from hosl_flower.models.checkpoints.model_kind import quantised

_BEFORE = ("module.", "_orig_mod.", "base_model.model.")
_BETWEEN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_ATTRIBUTE = "model."  # of a module that holds the model, as in Lightning
_QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".weight_scale_inv": "FP8",
}


def plain_names(origin: str, keys: Sequence[str], known: tuple[str, ...]) -> dict[str, str]:
    """Key -> name as the model alone would have saved it.

    known: what such names start with. Raises ModelError for tensors of a quantised model, and
    for adapters among the weights.
    """
    _check(origin, keys)
    names = {key: _without(key, _BETWEEN) for key in keys}
    while before := _wrapper(names.values(), known):
        names = {key: name.removeprefix(before) for key, name in names.items()}
    return names


def _wrapper(names: Iterable[str], known: tuple[str, ...]) -> str | None:
    """What a wrapper has put before all names. "model." may be the model's own."""
    names = list(names)
    for before in (*_BEFORE, _ATTRIBUTE):
        inner = [name.removeprefix(before) for name in names if name.startswith(before)]
        if inner and len(inner) == len(names):
            own = (*known, *_BEFORE)
            if before != _ATTRIBUTE or any(name.startswith(own) for name in inner):
                return before
    return None


def _without(name: str, parts: Iterable[str]) -> str:
    for part in parts:
        name = name.replace(part, "")
    return name


def _check(origin: str, keys: Sequence[str]) -> None:
    for key in keys:
        for end, method in _QUANTISED.items():
            if key.endswith(end):
                raise quantised(origin, f"{method}: it has {key}")
        if ".lora_A." in key:
            raise ModelError(
                f"{origin} has adapters among its weights ({key}): load it with peft, merge them "
                "with merge_and_unload(), and use what save_pretrained then writes"
            )
