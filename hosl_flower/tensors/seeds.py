"""Seeds: every random number follows from one."""

import hashlib

import torch

from hosl_flower.tensors.philox import counters_of, philox


def derive_seed(seed: int, *labels: object) -> int:
    """A 63-bit seed for one purpose, from the run seed and what names the purpose.

    The first eight bytes (little endian) of SHA-256 over "seed/label/label/...", shifted right by
    one so that it fits the signed integers of every format it travels in.
    """
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permutation(count: int, seed: int) -> list[int]:
    """0..count-1 shuffled, the same everywhere: sorted by 64-bit keys from the generator."""
    words = philox(counters_of("permutation", torch.arange(-(-count // 2))), seed).view(-1, 2)[
        :count
    ]
    keys = (words[:, 0] << 31) ^ words[:, 1]  # 63 bits, so never negative
    return torch.argsort(keys, stable=True).tolist()
