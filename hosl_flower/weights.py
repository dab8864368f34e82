"""Reading single tensors from any checkpoint layout Hugging Face models come in.

A side of the split asks for its own tensors by canonical name (as in the unsplit model's
state dict, `model.decoder.layers.0.fc1.weight`) and nothing else is read: safetensors files
are read a few MiB at a time, shards of the other side are not even opened or downloaded. Legacy
`pytorch_model.bin` files are converted to safetensors once, block by block and on demand.
No pickle is executed: `torch.load` runs with weights_only.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hosl_flower import hub
from hosl_flower.errors import CheckpointError, first_line
from hosl_flower.perturb import derive_seed
from hosl_flower.tensorfile import CHUNK_ELEMENTS, Stored, copy_into, find


class WeightSource(Protocol):
    """Where tensors come from, by canonical name."""

    origin: str

    def __contains__(self, name: str) -> bool:
        """Whether the source has this tensor."""

    def fill(self, name: str, out: Tensor) -> None:
        """Write the tensor into `out`, contiguous, of any floating point dtype and device, with
        little memory beside it. Raises CheckpointError when it is missing or does not fit."""


class RandomWeights:
    """Fresh weights for a model that has no checkpoint: matrices of std `init_std`, vectors of ones
    (norms) and zeros.

    Every tensor has its own generator, so each side can make its half alone and the halves
    fit. Uniform, not normal: numpy's uniform float32 is 24 random bits, the same on every
    machine, while torch's normals already differ between instruction sets.
    """

    def __init__(
        self,
        seed: int,
        init_std: float,
        starts_at_one: Callable[[str], bool] = lambda name: False,
        absent: Iterable[str] = (),
    ):
        self.origin = f"random weights (seed {seed})"
        self.seed, self.init_std, self.starts_at_one = seed, init_std, starts_at_one
        self.absent = frozenset(absent)

    def __contains__(self, name: str) -> bool:
        return name not in self.absent

    def fill(self, name: str, out: Tensor) -> None:
        if out.dim() < 2:
            out.fill_(1.0 if self.starts_at_one(name) else 0.0)
            return
        # one generator, so that the numbers are the same however many are drawn at a time
        generator = numpy.random.default_rng(derive_seed(self.seed, "init", name))
        for part in out.view(-1).split(CHUNK_ELEMENTS):
            uniform = torch.from_numpy(generator.random(part.numel(), dtype=numpy.float32))
            part.copy_(uniform.sub_(0.5).mul_(math.sqrt(12) * self.init_std))


class Checkpoint:
    """A pretrained checkpoint: a local directory or a hub repository.

    base_prefix: what canonical names of the decoder start with ("model"); checkpoints saved
    from the bare base model leave it out and are understood too. block_list: what comes before
    the number of a block in them ("layers").
    """

    def __init__(self, model: str, base_prefix: str, block_list: str):
        self.origin = model
        self.base_prefix, self.block_list = base_prefix, block_list
        self._files = self._index()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def fill(self, name: str, out: Tensor) -> None:
        if name not in self._files:
            raise CheckpointError(
                f"{self.origin} has no tensor {name!r}; it holds {len(self._files)} others, "
                f"such as {', '.join(sorted(self._files)[:3]) or 'none'}: another model?"
            )
        filename, key = self._files[name]
        path = hub.locate(self.origin, filename)
        if path is None:
            raise CheckpointError(f"{self.origin} lists {filename!r} in its index but lacks it")
        converted = _convert_bin(path, key) if filename.endswith(".bin") else path
        try:
            stored = find(converted, key)
            self._check(stored, out, f"{path}: {key}")
            copy_into(out, converted, stored)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def _check(self, stored: Stored, out: Tensor, where: str) -> None:
        if stored.shape != tuple(out.shape):
            raise CheckpointError(
                f"{where} has shape {list(stored.shape)}, the configuration asks for "
                f"{list(out.shape)}; config.json and weights do not belong together"
            )
        if not stored.is_floating_point:
            raise CheckpointError(
                f"{where} is {stored.dtype}, expected floating point weights; "
                "quantised checkpoints are not supported"
            )

    def blocks(self) -> int:
        """Number of transformer blocks the files hold."""
        found = (re.search(rf"\b{self.block_list}\.(\d+)\.", name) for name in self._files)
        return max((int(match.group(1)) + 1 for match in found if match), default=0)

    def _index(self) -> dict[str, tuple[str, str]]:
        """canonical name -> (file, key in that file), from headers only."""
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            single = index.removesuffix(".index.json")
            path = hub.locate(self.origin, single)
            if path is not None:
                keys = _keys_bin(path) if single.endswith(".bin") else _keys_safetensors(path)
                return {self._canonical(key): (single, key) for key in keys}
            path = hub.locate(self.origin, index)
            if path is not None:
                entries = _weight_map(path)
                return {self._canonical(key): (file, key) for key, file in entries.items()}
        raise CheckpointError(
            f"{self.origin} has none of model.safetensors, pytorch_model.bin or their sharded "
            "forms; expected a Hugging Face model directory or hub id"
        )

    def _canonical(self, key: str) -> str:
        known = (f"{self.base_prefix}.", "lm_head.")
        return key if key.startswith(known) else f"{self.base_prefix}.{key}"


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not a sharded-checkpoint index ({error})") from error
    entries = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: not a sharded-checkpoint index, it has no weight_map")
    bad = [f for f in entries.values() if not isinstance(f, str) or Path(f).name != f]
    if bad:
        raise CheckpointError(f"{path}: shard names must be plain file names, found {bad[0]!r}")
    return entries


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as model weights ({error}); it is truncated or of another "
        "format: download or copy it again"
    )


def _keys_safetensors(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


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
        raise _damaged(path, ValueError(reason)) from error
    tensors = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not tensors:
        raise _damaged(path, ValueError("it does not hold a state dict of tensors"))
    return state


def _conversion_directory(path: Path) -> Path:
    path = path.resolve()
    status = path.stat()
    identity = f"{path}|{status.st_size}|{status.st_mtime_ns}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    return hub.cache_directory() / "converted" / name


def _keys_bin(path: Path) -> list[str]:
    listing = _conversion_directory(path) / "keys.json"
    if not listing.is_file():
        keys = sorted(_load_bin(path))
        _write_atomically(listing, lambda target: target.write_text(json.dumps(keys)))
    return json.loads(listing.read_text())


def _convert_bin(path: Path, key: str) -> Path:
    """A safetensors copy, in the cache, of the block of a legacy file that holds a tensor. Making
    it takes the memory of that block once."""
    block = re.match(r"(.*?\.\d+)\.", key)  # whatever the list of blocks is called
    group = block.group(1) if block else key
    converted = _conversion_directory(path) / f"{group}.safetensors"
    if not converted.is_file():
        own = {k: t for k, t in _load_bin(path).items() if k == key or k.startswith(f"{group}.")}
        # clone: tied tensors share storage, which safetensors rightly refuses
        own = {k: t.clone().contiguous() for k, t in own.items()}
        if key not in own:
            raise CheckpointError(f"{path} lacks {key!r}, which its index says it holds")
        _write_atomically(converted, lambda target: save_file(own, target))
    return converted


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Several clients on one machine may convert the same file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
