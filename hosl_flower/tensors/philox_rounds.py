"""The rounds of Philox4x32-10, for tensors and numpy's arrays: drawing an order needs no torch."""

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32 round multipliers
_WEYL = (0x9E3779B9, 0xBB67AE85)  # Philox4x32 key increments
_ROUNDS = 10


def _split_words(value: int) -> tuple[int, int]:
    return value & MASK32, (value >> 32) & MASK32


@cache
def label_words(label: str) -> tuple[int, int]:
    """The two counter words that separate one stream from another."""
    return _split_words(int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little"))


def rounds(columns: Sequence[Any], seed: int) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 of the four columns of counters: int64 in [0, 2^32) -> columns of words, which
    are the low 32 bits.

    int64 holds the low 64 bits of a 32 x 32 bit product on every device, which is all
    that is needed: the sign bit is only another bit.
    """
    x0, x1, x2, x3 = columns
    key0, key1 = _split_words(seed)
    for _ in range(_ROUNDS):
        product0 = x0 * _MULTIPLIERS[0]
        product1 = x2 * _MULTIPLIERS[1]
        # high words, in place; what lies above 32 bits is cut off here only, since x1 and x3 are
        # but xored
        high1, high0 = product1 >> 32, product0 >> 32
        high1 ^= x1
        high1 ^= key0
        high1 &= MASK32
        high0 ^= x3
        high0 ^= key1
        high0 &= MASK32
        x0, x1, x2, x3 = high1, product1, high0, product0
        key0 = (key0 + _WEYL[0]) & MASK32
        key1 = (key1 + _WEYL[1]) & MASK32
    return x0, x1, x2, x3
