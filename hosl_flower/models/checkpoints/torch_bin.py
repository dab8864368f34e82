"""Checkpoints of older versions: names, and `pytorch_model.bin` files, which are converted to
safetensors once, block by block and on demand.

No pickle is executed: `torch.load` runs with weights_only.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hosl_flower.errors import ModelError, first_line
from hosl_flower.models.checkpoints import hub


def damaged(path: Path, error: Exception) -> ModelError:
    """The error for a file that is no readable checkpoint."""
    return ModelError(
        f"{path} cannot be read as model weights ({error}); it is truncated or of another "
        "format: download or copy it again"
    )


def _load_bin(path: Path) -> dict[str, Tensor]:
    """The state dict of a legacy file. Memory-mapped, so only what is used is ever read."""
    try:
        try:
            state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            # Written before torch 1.6 as one stream: it has to be read whole.
            state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        # torch's own text suggests weights_only=False: not here, never
        refused = "weights_only" in str(error)
        reason = "it holds objects that are not tensors" if refused else first_line(error)
        raise damaged(path, ValueError(reason)) from error
    tensors = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not tensors:
        raise damaged(path, ValueError("it does not hold a state dict of tensors"))
    return state


def _conversion_directory(path: Path) -> Path:
    path = path.resolve()
    status = path.stat()
    identity = f"{path}|{status.st_size}|{status.st_mtime_ns}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    return hub.cache_directory() / "converted" / name


def legacy_keys(path: Path) -> list[str]:
    """Names of the tensors of a legacy file; remembered in the cache."""
    listing = _conversion_directory(path) / "keys.json"
    if not listing.is_file():
        keys = sorted(_load_bin(path))
        _write_atomically(
            listing, lambda target: target.write_text(json.dumps(keys), encoding="utf-8")
        )
    with hub.using_cache():
        return json.loads(listing.read_text(encoding="utf-8"))


def converted(path: Path, key: str) -> Path:
    """A safetensors copy, in the cache, of the block of a legacy file that holds a tensor. Making
    it takes the memory of that block once."""
    block = re.match(r"(.*?\.\d+)\.", key)  # whatever the list of blocks is called
    group = block.group(1) if block else key
    target = _conversion_directory(path) / f"{group}.safetensors"
    if not target.is_file():
        own = {k: t for k, t in _load_bin(path).items() if k == key or k.startswith(f"{group}.")}
        # clone: tied tensors share storage, which safetensors rightly refuses
        own = {k: t.clone().contiguous() for k, t in own.items()}
        if key not in own:
            raise ModelError(f"{path} lacks {key!r}, which its index says it holds")
        _write_atomically(target, lambda part: save_file(own, part))
    return target


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Several clients on one machine may convert the same file at the same time."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    with hub.using_cache():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as umask wants it; safetensors makes private files
        try:
            write(temporary)
            temporary.chmod(mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
