"""How much memory a process has needed at most."""

import resource
import sys
from pathlib import Path

import torch


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """Peak so far: allocated tensor bytes on CUDA, resident set of the whole process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # not ru_maxrss: a process inherits that from the one that started it
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count KiB


def meter_name(device: torch.device | str = "cpu") -> str:
    """What peak_bytes measures on this device, for reports."""
    return "cuda_allocated" if torch.device(device).type == "cuda" else "process_rss"
