"""Dtype, device and number of threads by the names of the run config."""

import os

import torch

from hosl_flower.errors import RefusedError


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a config name, such as "float32"."""
    return getattr(torch, name)


def pick_device(name: str) -> str:
    """auto -> the GPU if there is one; RefusedError for a GPU that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    missing = name.startswith("cuda") and not torch.cuda.is_available()
    if missing or (name == "mps" and not torch.backends.mps.is_available()):
        raise RefusedError(f"device = {name!r} is not available here; use auto or cpu")
    return name


def use_threads(count: int) -> None:
    """CPU threads of this process; 0 is every core. Set, not inherited: a Ray worker and a
    plain process must compute alike, and the number of threads can change rounding."""
    if not count:
        own = getattr(os, "sched_getaffinity", None)  # Linux: the cores this process may use
        count = len(own(0)) if own else os.cpu_count() or 1
    torch.set_num_threads(count)
