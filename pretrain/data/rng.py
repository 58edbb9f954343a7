"""Randomness as functions: no generator state, so nothing to save and nothing to lose.

Sample i of a run, its mask and its random replacements are computed from (seed, epoch, i). Any rank can
compute any of them, a resume needs one integer, and the result does not depend on who computes it.
The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), the permutation
a generalised Feistel network with cycle walking (Black and Rogaway, CT-RSA 2002).
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Uint64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]


class Rules(int):
    """Version of how samples and masks are drawn, and of where the warm-up begins; a run goes on by the rules
    that it began with (`checkpoint.State.rules`). The properties tell what each version has changed."""

    @property
    def own_pieces_by_view(self) -> bool:
        """Tell whether the views of a text have random pieces of their own."""
        return self >= 2

    @property
    def cut_either_side(self) -> bool:
        """Tell whether words and spans are cut from either side, and spans run over what divides them."""
        return self >= 2

    @property
    def own_keys_by_corpus(self) -> bool:
        """Tell whether corpora that join a blend have keys of their own."""
        return self >= 2

    @property
    def few_by_sorting(self) -> bool:
        """Tell whether few items are permuted by sorting, so that each order is as likely as another."""
        return self >= 2

    @property
    def rate_of_middle(self) -> bool:
        """Tell whether an update has the learning rate of its middle, so that the first has one above 0."""
        return self >= 2

    @property
    def unspaced_words(self) -> bool:
        """Tell whether each piece of a script without spaces is a word."""
        return self >= 3


RULES = Rules(3)
"""The newest rules, by which new runs draw."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 3
_SORTED_SIZE = 4096
"""Items up to which they are permuted by sorting: three rounds are uneven for fewer than some 1,600."""
_WORD = 2**64 - 1


def mix(x: Uint64) -> Uint64:
    """Map 64-bit words one to one, each output bit depending on all input bits; any shape."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def key(*parts: int | npt.NDArray[np.integer]) -> Uint64:
    """Return a 64-bit key of a tuple of integers; arrays broadcast. Order matters, (1, 2) is not (2, 1)."""
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
    """Return `length` random words for each key: [...] -> [..., length]."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN
        return mix(keys[..., None] + counter)


def name_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed for the thing called `name`: parameters keep their values when others come or
    go."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permute(index: npt.ArrayLike, size: int, keys: Sequence[int] | int, rules: Rules = RULES) -> Int64:
    """Return a pseudo-random permutation of range(size) at `index` only, in memory of sqrt(size).

    Few items are sorted by random keys, so that each order is as likely as another. Of many:

    A number is the cell of a grid with nearly equal sides that holds `size` cells and less than a row
    more. Each round turns every row, then every column, by an amount of its own; what leaves the range
    walks on until it is back inside.
    """
    x = np.atleast_1d(np.asarray(index, np.int64))
    assert size > 0 and (x >= 0).all() and (x < size).all()
    parts = (keys,) if isinstance(keys, int) else tuple(keys)
    if size <= _SORTED_SIZE and rules.few_by_sorting:
        return _shuffled(parts, size)[x].reshape(np.shape(index))
    turns = _turns(parts, size)
    out = _feistel(x, turns)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], turns)
        outside = outside[out[outside] >= size]
    return out.reshape(np.shape(index))


@lru_cache(16)
def _shuffled(keys: tuple[int, ...], size: int) -> Int64:
    """Return range(size) in the order of a random key for each."""
    return np.argsort(key(key(*keys), np.arange(size)), kind="stable")


@lru_cache(16)
def _turns(keys: tuple[int, ...], size: int) -> tuple[tuple[Int64, Int64], ...]:
    """For each round, by how much each row [height] and then each column [width] of the grid turns."""
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    base = key(*keys)

    def amounts(count: int, below: int, number: int) -> Int64:
        draw = key(base, number, np.arange(count)) >> np.uint64(32)
        return ((draw * np.uint64(below)) >> np.uint64(32)).astype(np.int64)

    return tuple(
        (amounts(height, width, 2 * r), amounts(width, height, 2 * r + 1)) for r in range(_FEISTEL_ROUNDS)
    )


def _feistel(x: Int64, turns: tuple[tuple[Int64, Int64], ...]) -> Int64:
    height, width = (len(amounts) for amounts in turns[0])
    row = x // width
    column = x - row * width
    for of_rows, of_columns in turns:
        column += of_rows.take(row)
        column -= (column >= width) * width
        row += of_columns.take(column)
        row -= (row >= height) * height
    row *= width
    row += column
    return row
