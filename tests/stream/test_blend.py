from fractions import Fraction

import numpy as np
import pytest

from selfsight.stream.blend import BLOCK, Blend

WEIGHTS = [Fraction("0.9"), Fraction("0.07"), Fraction("0.03")]


def test_ratios_are_exact_to_one_slot_at_every_block():
    blend = Blend(WEIGHTS, [1])
    for blocks in (1, 2, 7, 1000, 10**9):
        counts = blend.counts(blocks * BLOCK)
        assert counts.sum() == blocks * BLOCK
        for count, weight in zip(counts.tolist(), WEIGHTS, strict=True):
            assert abs(count - blocks * BLOCK * weight) < 1


def test_counts_say_how_often_each_part_was_drawn():
    blend = Blend(WEIGHTS, [1])
    drawn = blend.draw(0, 3 * BLOCK)
    for n in (0, 1, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK):
        np.testing.assert_array_equal(blend.counts(n), np.bincount(drawn[:n], minlength=3))


def test_any_slot_without_those_before():
    drawn = Blend(WEIGHTS, [1]).draw(0, 3 * BLOCK)
    for start, count in ((2 * BLOCK - 3, 7), (0, 0), (5, 1), (BLOCK, 2 * BLOCK)):
        np.testing.assert_array_equal(Blend(WEIGHTS, [1]).draw(start, count), drawn[start : start + count])
    assert not np.array_equal(Blend(WEIGHTS, [2]).draw(0, BLOCK), drawn[:BLOCK])


def test_weights_are_relative_and_nothing_comes_of_none():
    np.testing.assert_array_equal(
        Blend([Fraction(3), Fraction(1)], [0]).draw(0, 99), Blend([Fraction(3, 4), Fraction(1, 4)], [0]).draw(0, 99)
    )
    assert set(Blend([Fraction(0), Fraction(1)], [0]).draw(0, BLOCK)) == {1}
    for bad in ([], [Fraction(0)], [Fraction(1), Fraction(-1)]):
        with pytest.raises(ValueError, match="weights"):
            Blend(bad, [0])
