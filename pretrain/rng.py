"""Randomness as functions: no generator state, so nothing to save and nothing to lose.

Sample i of a run, its mask and its random replacements are computed from (seed, epoch, i). Any rank can
compute any of them, a resume needs one integer, and the result does not depend on who computes it.
The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), the permutation
a Feistel network with cycle walking (Black and Rogaway, CT-RSA 2002).
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Uint64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 4
_WORD = 2**64 - 1


def mix(x: Uint64) -> Uint64:
    """A bijection of 64-bit words whose output bits each depend on all input bits; any shape."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def key(*parts: int | npt.NDArray[np.integer]) -> Uint64:
    """A 64-bit key of a tuple of integers; arrays broadcast. Order matters, (1, 2) is not (2, 1)."""
    known = 0  # leading Python integers, at a fraction of numpy's price for single numbers
    numbers = 0
    while numbers < len(parts) and isinstance(part := parts[numbers], int):
        known, numbers = _mix_int(known + int(_GOLDEN) + part), numbers + 1
    h = np.asarray(np.uint64(known))
    with np.errstate(over="ignore"):
        for part in parts[numbers:]:
            h = mix(h + _GOLDEN + np.asarray(part).astype(np.uint64))
    return h


def _mix_int(x: int) -> int:
    """`mix` of one number, modulo 2**64."""
    x &= _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


def stream(keys: Uint64, length: int) -> Uint64:
    """`length` random words for each key: [...] -> [..., length]."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN
        return mix(keys[..., None] + counter)


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the thing called `name`: parameters keep their values when others come or go."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permute(index: npt.ArrayLike, size: int, keys: Sequence[int] | int) -> npt.NDArray[np.int64]:
    """A pseudo-random permutation of range(size) evaluated at `index` only, in constant memory.

    A Feistel network permutes the smallest even-bit power of two that holds `size`; values outside the
    range walk on until they fall inside (fewer than 4 rounds on average).
    """
    x = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    assert size > 0 and (x < size).all()
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    rounds = _round_keys((keys,) if isinstance(keys, int) else tuple(keys))
    out = _feistel(x, half, low, rounds)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], half, low, rounds)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64).reshape(np.shape(index))


@lru_cache(16)
def _round_keys(keys: tuple[int, ...]) -> list[Uint64]:
    base = key(*keys)
    return [key(base, r) for r in range(_FEISTEL_ROUNDS)]


def _feistel(x: Uint64, half: np.uint64, low: np.uint64, rounds: list[Uint64]) -> Uint64:
    left, right = x >> half, x & low
    for round_key in rounds:
        left, right = right, left ^ (mix(right ^ round_key) & low)
    return (left << half) | right
