"""Work done on shapes alone: what a client would hold, without holding it.

Peak memory depends on shapes, not on values. Inside `shapes_only` every tensor is one of torch's
fake tensors: a shape, a dtype, a device and a storage of the right size without data. The
client's own code runs on them in seconds, whatever the model's size, and memory.LiveTensors counts
the same storages as in a real run.

A few operations answer with something that depends on data. Here they answer with the most
there can be: all elements differ, all are non-zero, all scalars read off a tensor are 1.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SCALAR = torch.ops.aten._local_scalar_dense.default
_UNIQUE = torch.ops.aten._unique2.default
_NON_ZERO = torch.ops.aten.nonzero.default
_INDEX = torch.ops.aten.index.Tensor


@contextmanager
def shapes_only() -> Iterator[None]:
    """Every tensor made within has a shape and no data; tensors made outside must not be used."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_MostThereCanBe())
        stack.enter_context(_Zeros())
        yield


class _MostThereCanBe(TorchDispatchMode):
    """Answers what fake tensors cannot know. Skeletons on the meta device stay plain tensors: peft
    moves the parameters it makes for them, which torch refuses for fake ones."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in memory.LiveTensors

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SCALAR:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is _UNIQUE:
            return _all_different(*args, **kwargs)
        if func is _NON_ZERO:
            return _everywhere(args[0])
        if func is _INDEX:  # with a mask, which is an index of what is non-zero
            args = (args[0], [number for index in args[1] for number in _as_numbers(index)])
        if _is_skeleton(args, kwargs):
            with unset_fake_temporarily():
                return func(*map(_on_meta, args), **kwargs)
        return func(*args, **kwargs)


def _all_different(
    x: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    inverse = x.new_empty(x.shape if return_inverse else 0, dtype=torch.int64)
    counts = x.new_empty(x.numel() if return_counts else 0, dtype=torch.int64)
    return x.new_empty(x.numel()), inverse, counts


def _everywhere(x: Tensor) -> Tensor:
    return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)


def _as_numbers(index: Tensor | None) -> tuple[Tensor | None, ...]:
    if index is None or index.dtype != torch.bool:
        return (index,)
    return _everywhere(index).unbind(1)


def _is_skeleton(args: Any, kwargs: Any) -> bool:
    """Whether an operation makes a tensor on the meta device, or is about plain ones there."""
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "meta"
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return bool(tensors) and not any(
        isinstance(tensor, FakeTensor) or tensor.device.type != "meta" for tensor in tensors
    )


def _on_meta(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


class _Zeros(TorchFunctionMode):
    """What leaves torch as an array, to be hashed or packed, is zeros."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.numpy:
            return np.zeros(args[0].shape, str(args[0].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))
