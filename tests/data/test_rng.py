"""The stateless hash and permutation behind every sample and mask."""

import math
from collections import Counter

import numpy as np
import pytest

from pretrain.data import rng


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size):
    for key in range(3):
        assert sorted(rng.permute(np.arange(size), size, key)) == list(range(size))


def test_permute_point_by_point_equals_permute_at_once():
    whole = rng.permute(np.arange(1000), 1000, (1, 2, 3))
    assert [int(rng.permute(i, 1000, (1, 2, 3))) for i in range(0, 1000, 37)] == list(whole[::37])


def test_permute_reaches_every_place_equally_often():
    """Chi-square of where item 0 lands, 64 places, 6,400 keys: 99.99 % of fair draws stay below 113."""
    landed = np.bincount([int(rng.permute(0, 64, key)) for key in range(6400)], minlength=64)
    assert ((landed - 100.0) ** 2 / 100).sum() < 113


@pytest.mark.parametrize("size", [3, 5, 6])
def test_each_order_of_few_items_is_equally_likely(size):
    """Chi-square over all orders: 99.99 % of fair draws stay below the bound."""
    orders = math.factorial(size)
    found = Counter(tuple(rng.permute(np.arange(size), size, key)) for key in range(20 * orders))
    chi = sum((count - 20.0) ** 2 / 20 for count in found.values()) + 20.0 * (orders - len(found))
    free = orders - 1
    bound = free * (1 - 2 / (9 * free) + 3.719 * math.sqrt(2 / (9 * free))) ** 3  # Wilson and Hilferty 1931
    assert chi < bound


def test_large_permutation_stays_in_range_past_2_to_the_40():
    size = (1 << 41) + 12345
    there = rng.permute(np.arange(1000) * (1 << 31), size, 5)
    assert there.min() >= 0 and there.max() < size and len(set(there)) == 1000


def test_keys_depend_on_every_part_and_on_their_order():
    assert rng.key(1, 2) != rng.key(2, 1)
    assert len({int(rng.key(a, b)) for a in range(50) for b in range(50)}) == 2500


def test_stream_bits_are_fair():
    """Each of 64 bits is set in half of 100,000 words, within 5 standard errors (0.0079)."""
    words = rng.stream(rng.key(np.arange(1000)), 100).ravel()
    share = ((words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(0)
    assert abs(share - 0.5).max() < 0.0079


def test_name_seed_is_a_function_of_seed_and_name():
    assert rng.name_seed(0, "a") == rng.name_seed(0, "a")
    assert len({rng.name_seed(s, n) for s in range(5) for n in "abc"}) == 15
