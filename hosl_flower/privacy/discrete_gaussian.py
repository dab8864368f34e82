"""Noise of whole numbers that is exactly Gaussian: privacy proofs are about real numbers, and the
bits of floating-point noise tell what they were added to (Mironov 2012).

The discrete Gaussian, https://arxiv.org/abs/2004.00010 (Canonne, Kamath, Steinke), Algorithms 1 to
3: integers x with probability proportional to exp(-x^2 / (2 sigma^2)), by whole numbers alone. It
gives the Renyi divergences of the Gaussian it is named after, of which accountants know.
"""

import hashlib


class Bits:
    """Random bits of a secret key, by SHA-256 of key and counter: nobody without the key can tell
    them from coin flips, and the same key gives the same."""

    def __init__(self, key: bytes):
        self._key, self._counter = key, 0
        self._pool, self._size = 0, 0

    def below(self, bound: int) -> int:
        """Uniform on 0 .. bound - 1."""
        size = (bound - 1).bit_length()
        while True:
            value = self._take(size)
            if value < bound:
                return value

    def _take(self, size: int) -> int:
        while self._size < size:
            block = hashlib.sha256(self._key + self._counter.to_bytes(8, "big")).digest()
            self._counter += 1
            self._pool |= int.from_bytes(block, "big") << self._size
            self._size += 256
        value = self._pool & ((1 << size) - 1)
        self._pool >>= size
        self._size -= size
        return value


def discrete_gaussian(sigma: int, bits: Bits) -> int:
    """One sample. sigma: 1 or more."""
    scale, variance = sigma + 1, sigma * sigma
    while True:
        sample = discrete_laplace(scale, bits)
        away = abs(sample) * scale - variance
        if _exp_coin(away * away, 2 * variance * scale * scale, bits):
            return sample


def discrete_laplace(scale: int, bits: Bits) -> int:
    """One sample of integers x with probability proportional to exp(-|x| / scale)."""
    while True:
        rest = bits.below(scale)
        if not _exp_coin(rest, scale, bits):
            continue
        whole = 0
        while _exp_coin(1, 1, bits):
            whole += 1
        size, negative = rest + scale * whole, bits.below(2)
        if size or not negative:  # there is one zero
            return -size if negative else size


def _exp_coin(over: int, under: int, bits: Bits) -> bool:
    """True with probability exp(-over / under)."""
    whole, rest = divmod(over, under)
    return all(_small_exp_coin(1, 1, bits) for _ in range(whole)) and _small_exp_coin(
        rest, under, bits
    )


def _small_exp_coin(over: int, under: int, bits: Bits) -> bool:
    """The same of over / under in 0 .. 1: how long coins of that over 1, 2, 3, ... show heads."""
    tries = 1
    while bits.below(under * tries) < over:
        tries += 1
    return tries % 2 == 1
