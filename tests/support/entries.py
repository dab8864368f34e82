"""Ledger entries."""

from hosl_flower.ledger.ledger import Entry
from hosl_flower.tensors.rounding import to_float32

ENTRIES = [
    Entry(1, (11, 12), (0.5, -0.25), 1e-2),
    Entry(2, (13,), (to_float32(0.3),), 3e-3),
    Entry(5, (), (), 1e-2),
    Entry(6, (14, 15, 16), (1.0, 2.0, -4.0), 1e-2),
]
