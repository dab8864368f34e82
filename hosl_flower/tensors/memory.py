"""How much memory a client needs: tensor bytes by phase, and the resident set of its process.

On CUDA the allocator counts tensor bytes itself, for nothing. On the CPU nobody does, so
LiveTensors watches every operation and keeps a weak reference to the storage of each result:
what is alive is counted once, however many views it has, until it is really freed. What a kernel
allocates and frees within itself is not seen; the resident set has that too.

torch's own torch.distributed._tools.MemTracker works the same way, but it is private, wants
nn.Module hooks and keeps a breakdown per module that costs more than the operations of a small
model; torch.profiler records every allocation of the process and must be post-processed.

Watching costs tens of microseconds per operation, which is more than a small model's
operations take. So a phase is watched when it is new and when its batch is larger than any it
was watched with: memory only depends on shapes, and a run has few of them.
"""

import resource
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

# exchange: weights sent and taken whole
PHASES = ("load", "forward", "probe", "backward", "update", "evaluate", "exchange")


def peak_rss_bytes() -> int:
    """Peak resident set of this process so far, libraries and all."""
    if sys.platform == "linux":
        # not ru_maxrss: a process inherits that from the one that started it
        status = Path("/proc/self/status").read_text(encoding="latin-1")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count KiB


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that are alive: of `hold`'s tensors, and of all results of
    operations while it is active. It also counts down outside its context.

    live_bytes: now; peak_bytes: at most since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}  # by address
        self._self = weakref.ref(self)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before, as long as they live."""
        for tensor in tensors:
            self._count(tensor)

    def restart(self) -> None:
        """Forget the peak."""
        self.peak_bytes = self.live_bytes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch imports its compiler (75 MiB, seconds) to keep this out of compiled graphs.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._count(result)
        elif isinstance(result, (tuple, list)):
            self.hold(item for item in result if isinstance(item, Tensor))
        return result

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":  # has a size, but no memory
            return
        if tensor.layout == torch.sparse_coo:  # an embedding's gradient, where it is sparse
            self.hold((tensor._indices(), tensor._values()))
            return
        if is_traceable_wrapper_subclass(tensor):  # 8-bit codes and scales that look like floats
            inner, _ = tensor.__tensor_flatten__()
            self.hold(getattr(tensor, name) for name in inner)
            return
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._storages.get(address)
        if known is not None and known[1] == size:
            return
        if known is None:
            reference = weakref.ref(storage, partial(_forget, self._self, address))
        else:
            reference = known[0]  # resized in place
        self._storages[address] = (reference, size)
        self.live_bytes += size - (known[1] if known else 0)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _forget(counter: "weakref.ref[LiveTensors]", address: int, _: Any) -> None:
    """A storage was freed. The counter does not hold itself alive by the storages it counts."""
    if (own := counter()) is not None:
        _, size = own._storages.pop(address)
        own.live_bytes -= size


class Meter:
    """Peak tensor bytes of one client by phase, weights included.

    name: what counts them. peaks: by phase, 0 for one that has not happened.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.name = "cuda_allocated" if self.device.type == "cuda" else "live_storages"
        self.start_over()

    def start_over(self) -> None:
        """Forget all peaks, and measure every phase anew."""
        self.peaks = dict.fromkeys(PHASES, 0)
        self._live = LiveTensors()
        self._watched: dict[tuple[str, str], int] = {}  # (phase, part) -> largest size

    @contextmanager
    def phase(
        self, name: str, size: int, held: Iterable[Tensor] = (), part: str = ""
    ) -> Iterator[None]:
        """Measure what runs within, if it is new or larger than before.

        size: of the work, in any unit of its own, such as tokens. held: tensors alive at the
        start that earlier phases may not have seen. part: of the phase, with sizes of its own.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            try:
                yield
            finally:
                self._note(name, torch.cuda.max_memory_allocated(self.device))
            return
        if size <= self._watched.get((name, part), -1):
            del held  # not to keep alive what the caller lets go
            yield
            return
        self._watched[name, part] = size
        self._live.hold(held)
        del held
        self._live.restart()
        try:
            with self._live:
                yield
        finally:
            self._note(name, self._live.peak_bytes)

    def _note(self, name: str, peak: int) -> None:
        self.peaks[name] = max(self.peaks[name], peak)
