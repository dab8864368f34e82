"""memory.py: what it reports grows by what is allocated, no more and no less."""

import subprocess
import sys

import torch
from torch import nn

from hosl_flower.tensors.memory import LiveTensors, Meter

MIB = 1 << 20
SCRIPT = """
import torch
from hosl_flower.tensors.memory import peak_rss_bytes
imports, first = peak_rss_bytes(), []
while peak_rss_bytes() == imports:  # up to the peak of the imports, and beyond
    first.append(torch.ones(50 << 20, dtype=torch.uint8))
before = peak_rss_bytes()
held = torch.ones(200 << 20, dtype=torch.uint8)
grown = peak_rss_bytes() - before
del held
print(grown, peak_rss_bytes() - before)
"""


def mib(count: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(count * MIB // dtype.itemsize, dtype=dtype)


def test_the_peak_of_a_process_grows_by_what_it_holds_and_never_falls():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    grown, after = map(int, done.stdout.split())
    assert 190 << 20 < grown < 210 << 20
    assert abs(after - grown) < 8 << 20  # the kernel counts pages in batches


def test_tensors_count_while_they_live():
    with LiveTensors() as live:
        a = mib(3)
        b = mib(2, torch.float32)
        assert (live.live_bytes, live.peak_bytes) == (5 * MIB, 5 * MIB)
        del a
        c = mib(1, torch.bfloat16)
        assert (live.live_bytes, live.peak_bytes) == (3 * MIB, 5 * MIB)
    del b, c
    assert (live.live_bytes, live.peak_bytes) == (0, 5 * MIB), "freed after watching"


def test_views_and_in_place_operations_add_nothing():
    with LiveTensors() as live:
        a = mib(4, torch.float32)
        views = [a[10:], a.view(2, -1).t(), a.detach(), *a.chunk(3)]
        a.add_(1).mul_(2)
        torch.relu_(a)
        assert live.peak_bytes == 4 * MIB
        del a, views[1:]
        assert live.live_bytes == 4 * MIB, "one view keeps it all"
        views.clear()
        assert live.live_bytes == 0


def test_temporaries_of_an_expression_count_at_their_peak():
    with LiveTensors() as live:
        a = mib(4, torch.float32)
        b = (a + 1) * 2 - a  # the sum, the product and the difference: two at a time
        assert (live.live_bytes, live.peak_bytes) == (8 * MIB, 12 * MIB)
        a.resize_(2 * MIB)
        assert live.live_bytes == 12 * MIB
        del a, b
    assert live.live_bytes == 0


def test_the_graph_and_the_gradient_count():
    live = LiveTensors()
    weight = nn.Parameter(mib(1, torch.float32))
    live.hold([weight])
    with live:
        squared = (weight * 3).square()  # the graph keeps the factor
        assert live.live_bytes == 3 * MIB
        squared.sum().backward()
        del squared
        assert live.live_bytes == 2 * MIB, "weight and gradient"
        assert live.peak_bytes >= 4 * MIB


def test_what_has_no_memory_does_not_count():
    with LiveTensors() as live:
        torch.empty(1 << 40, device="meta").add_(1)
    assert live.peak_bytes == 0


def test_a_meter_keeps_the_peak_of_each_phase():
    meter, weights = Meter("cpu"), mib(2)
    assert meter.name == "live_storages"
    with meter.phase("forward", 10, held=[weights]):
        mib(5)
        mib(3)
    with meter.phase("probe", 10):
        kept = mib(1)
    expected = {"load": 0, "forward": 7 * MIB, "probe": 3 * MIB, "backward": 0, "update": 0}
    expected["evaluate"] = expected["exchange"] = 0
    assert meter.peaks == expected
    with meter.phase("forward", 10):
        mib(50)  # not watched: no larger batch than before
    with meter.phase("forward", 11):
        mib(9)
    assert meter.peaks["forward"] == 12 * MIB
    del kept
