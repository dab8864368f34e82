"""Seeds: every random number follows from one."""

import hashlib

import numpy

from hosl_flower.tensors.philox_rounds import MASK32, label_words, rounds


def derive_seed(seed: int, *labels: object) -> int:
    """A 63-bit seed for one purpose, from the run seed and what names the purpose.

    The first eight bytes (little endian) of SHA-256 over "seed/label/label/...", shifted right by
    one so that it fits the signed integers of every format it travels in.
    """
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permutation(count: int, seed: int) -> list[int]:
    """0..count-1 shuffled, the same everywhere: sorted by 64-bit keys from the generator."""
    blocks = numpy.arange(-(-count // 2))
    low, high = (numpy.full_like(blocks, word) for word in label_words("permutation"))
    columns = rounds((blocks & MASK32, blocks >> 32, low, high), seed)
    words = (numpy.stack(columns, axis=1) & MASK32).reshape(-1, 2)[:count]
    keys = (words[:, 0] << 31) ^ words[:, 1]  # 63 bits, so never negative
    return numpy.argsort(keys, kind="stable").tolist()
