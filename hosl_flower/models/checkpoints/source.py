"""Reading single tensors from any checkpoint layout Hugging Face models come in.

A side of the split asks for its own tensors by canonical name (as in the unsplit model's
state dict, `model.decoder.layers.0.fc1.weight`) and nothing else is read: safetensors files
are read a few MiB at a time (safetensors_file.py), shards of the other side are not even opened or
downloaded, and of a file on the hub a client downloads its own tensors alone (partial_download.py).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hosl_flower.errors import ModelError
from hosl_flower.models.checkpoints import hub
from hosl_flower.models.checkpoints import partial_download as ranged
from hosl_flower.models.checkpoints.model_kind import other_weights, quantised
from hosl_flower.models.checkpoints.partial_download import RemoteFile
from hosl_flower.models.checkpoints.safetensors_file import (
    CHUNK_ELEMENTS,
    NotFiniteError,
    Stored,
    copy_into,
    copy_rows,
    find,
)
from hosl_flower.models.checkpoints.tensor_names import plain_names
from hosl_flower.models.checkpoints.torch_bin import converted, damaged, legacy_keys
from hosl_flower.models.families.base import InitStd, Rename
from hosl_flower.tensors.seeds import derive_seed


class WeightSource(Protocol):
    """Where tensors come from, by canonical name."""

    origin: str

    def __contains__(self, name: str) -> bool:
        """Whether the source has this tensor."""

    def fill(self, name: str, out: Tensor) -> None:
        """Write the tensor into `out`, contiguous, of any floating point dtype and device, with
        little memory beside it. Raises ModelError when it is missing or does not fit."""

    def rows(self, name: str, shape: tuple[int, int], rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix of this shape: float32 [n, D], on the CPU, and not the matrix.
        Raises as `fill`."""


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
        init_std: InitStd,
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
        std = self._std(name, out.shape)
        # one generator, so that the numbers are the same however many are drawn at a time
        generator = numpy.random.default_rng(derive_seed(self.seed, "init", name))
        for part in out.view(-1).split(CHUNK_ELEMENTS):
            uniform = torch.from_numpy(generator.random(part.numel(), dtype=numpy.float32))
            part.copy_(_scaled(uniform, std))

    def rows(self, name: str, shape: tuple[int, int], rows: Sequence[int]) -> Tensor:
        count, width = shape
        std = self._std(name, torch.Size(shape))
        out = torch.empty(len(rows), width)
        generator = numpy.random.default_rng(derive_seed(self.seed, "init", name))
        size = max(1, CHUNK_ELEMENTS // width)
        for first in range(0, count, size):
            drawn = generator.random((min(size, count - first), width), dtype=numpy.float32)
            for row, own in zip(rows, out, strict=True):
                if first <= row < first + len(drawn):
                    own.copy_(_scaled(torch.from_numpy(drawn[row - first].copy()), std))
        return out

    def _std(self, name: str, shape: torch.Size) -> float:
        return self.init_std if isinstance(self.init_std, float) else self.init_std(name, shape)


def _scaled(uniform: Tensor, std: float) -> Tensor:
    return uniform.sub_(0.5).mul_(math.sqrt(12) * std)


class PretrainedWeights:
    """A pretrained checkpoint: a local directory or a hub repository.

    base_prefix: what canonical names of the decoder start with ("model"); checkpoints saved
    from the bare base model leave it out and are understood too. block_list: what comes before
    the number of a block in them ("layers"). partial: of files on the hub, download no more than
    the tensors that are asked for. heads: what canonical names start with that are not the base
    model's. rename: from names in the files to canonical ones, but for the prefix.
    """

    def __init__(
        self,
        model: str,
        base_prefix: str,
        block_list: str,
        partial: bool = False,
        heads: tuple[str, ...] = ("lm_head.",),
        rename: Rename = str,
    ):
        self.origin, self.partial = model, partial
        self._known, self._rename = (f"{base_prefix}.", *heads), rename
        self.block_list = block_list
        self._remote: dict[str, Path | RemoteFile | None] = {}
        self._files = self._index()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def fill(self, name: str, out: Tensor) -> None:
        with self._stored(name, tuple(out.shape)) as (file, stored):
            copy_into(out, file, stored)

    def rows(self, name: str, shape: tuple[int, int], rows: Sequence[int]) -> Tensor:
        out = torch.empty(len(rows), shape[1])
        with self._stored(name, shape) as (file, stored):
            copy_rows(out, file, stored, rows)
        return out

    @contextmanager
    def _stored(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[Path, Stored]]:
        """The file that holds a tensor of this shape, and where; errors of reading it are ours."""
        if name not in self._files:
            raise ModelError(
                f"{self.origin} has no tensor {name!r}; it holds {len(self._files)} others, "
                f"such as {', '.join(sorted(self._files)[:3]) or 'none'}: another model, or half "
                "of one?"
            )
        filename, key = self._files[name]
        path = self._locate(filename)
        if path is None:
            raise ModelError(f"{self.origin} lists {filename!r} in its index but lacks it")
        if isinstance(path, RemoteFile):
            path = path.tensor(key)
        file = converted(path, key) if filename.endswith(".bin") else path
        try:
            stored = find(file, key)
            self._check(stored, shape, f"{path}: {key}")
            yield file, stored
        except NotFiniteError as error:
            raise ModelError(
                f"{path}: {key} holds {error}: nothing can be trained from there; use a checkpoint "
                "from before its training diverged, or dtype = float32 where 16 bits are too few"
            ) from error
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error

    def _check(self, stored: Stored, shape: tuple[int, ...], where: str) -> None:
        if stored.shape != shape:
            raise ModelError(
                f"{where} has shape {list(stored.shape)}, the configuration asks for "
                f"{list(shape)}; config.json and weights do not belong together"
            )
        if not stored.is_floating_point:
            raise quantised(self.origin, f"{where} is {stored.dtype}")

    def blocks(self) -> int:
        """Number of transformer blocks the files hold."""
        found = (re.search(rf"\b{self.block_list}\.(\d+)\.", name) for name in self._files)
        return max((int(match.group(1)) + 1 for match in found if match), default=0)

    def _index(self) -> dict[str, tuple[str, str]]:
        """canonical name -> (file, key in that file), from headers only."""
        files = self._keys_and_files()
        names = plain_names(self.origin, list(files), self._known)
        return {self.canonical(names[key]): (file, key) for key, file in files.items()}

    def _keys_and_files(self) -> dict[str, str]:
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            single = index.removesuffix(".index.json")
            file = self._locate(single)
            if file is not None:
                return dict.fromkeys(_keys(file), single)
            path = hub.locate(self.origin, index)
            if path is not None:
                return _weight_map(path)
        raise ModelError(
            f"{self.origin} has none of model.safetensors, pytorch_model.bin or their sharded "
            f"forms; {other_weights(self.origin)}expected a Hugging Face model directory or hub id"
        )

    def _locate(self, filename: str) -> Path | RemoteFile | None:
        """A file of the model, whole or by pieces; None where it has no such file."""
        on_hub = hub.local_directory(self.origin) is None
        if not (self.partial and on_hub and filename.endswith(".safetensors")):
            return hub.locate(self.origin, filename)
        if filename not in self._remote:
            self._remote[filename] = ranged.locate(self.origin, filename)
        return self._remote[filename]

    def canonical(self, key: str) -> str:
        """The canonical name of a tensor that an unwrapped model calls `key`."""
        key = self._rename(key)
        return key if key.startswith(self._known) else f"{self._known[0]}{key}"


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not a sharded-checkpoint index ({error})") from error
    entries = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(entries, dict):
        raise ModelError(f"{path}: not a sharded-checkpoint index, it has no weight_map")
    bad = [f for f in entries.values() if not isinstance(f, str) or Path(f).name != f]
    if bad:
        raise ModelError(f"{path}: shard names must be plain file names, found {bad[0]!r}")
    return entries


def _keys(file: Path | RemoteFile) -> list[str]:
    if isinstance(file, RemoteFile):
        return file.keys()
    return legacy_keys(file) if file.suffix == ".bin" else _keys_safetensors(file)


def _keys_safetensors(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
