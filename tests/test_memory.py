"""memory.py: what it reports grows by what is allocated."""

import subprocess
import sys

from hosl_flower.memory import meter_name

SCRIPT = """
import torch
from hosl_flower.memory import peak_bytes
imports, first = peak_bytes("cpu"), []
while peak_bytes("cpu") == imports:  # up to the peak of the imports, and beyond
    first.append(torch.ones(50 << 20, dtype=torch.uint8))
before = peak_bytes("cpu")
held = torch.ones(200 << 20, dtype=torch.uint8)
grown = peak_bytes("cpu") - before
del held
print(grown, peak_bytes("cpu") - before)
"""


def test_the_peak_of_a_process_grows_by_what_it_holds_and_never_falls():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    grown, after = map(int, done.stdout.split())
    assert 190 << 20 < grown < 210 << 20
    assert abs(after - grown) < 8 << 20  # the kernel counts pages in batches
    assert meter_name("cpu") == "process_rss"
