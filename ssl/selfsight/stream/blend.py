"""Which part each slot of an endless sequence belongs to, by weight: exact ratios, any slot in constant time.

Of the first n slots, part s has had floor(n·W_s) − floor(n·W_{s−1}) at every border between blocks, W being the running
sum of the weights: within one slot of exact for ever. Inside a block the parts are shuffled by a seeded generator.
"""

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

BLOCK = 4096  # slots
BLOCKS_KEPT = 2


class Blend:
    """`weights` need not sum to 1; a part of weight 0 never comes. `seed` is any sequence of integers ≥ 0."""

    def __init__(self, weights: Sequence[Fraction], seed: Sequence[int]) -> None:
        total = sum(weights)
        if not weights or min(weights) < 0 or not total:
            raise ValueError(f"weights must be at least 0 and one of them more: {list(map(str, weights))}")
        self._seed = list(seed)
        self._sums = [sum(weights[: s + 1], Fraction()) / total for s in range(len(weights))]
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()

    def counts(self, n: int) -> np.ndarray:
        """How many of the first `n` slots each part has, int64 (parts,)."""
        block, inside = divmod(n, BLOCK)
        counts = self._before(block)
        if inside:
            counts += np.bincount(self._block(block)[:inside], minlength=len(counts))
        return counts

    def draw(self, start: int, count: int) -> np.ndarray:
        """The parts of slots start … start + count − 1, int64 (count,)."""
        pieces, at = [], start
        while at < start + count:
            block, inside = divmod(at, BLOCK)
            pieces.append(self._block(block)[inside : inside + start + count - at])
            at += len(pieces[-1])
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def _before(self, block: int) -> np.ndarray:
        """How many slots each part has in the blocks before `block`."""
        ends = [block * BLOCK * w.numerator // w.denominator for w in self._sums]
        return np.diff(np.array([0, *ends], dtype=np.int64))

    def _block(self, block: int) -> np.ndarray:
        parts = self._blocks.get(block)
        if parts is None:
            per_part = self._before(block + 1) - self._before(block)
            rng = np.random.Generator(np.random.PCG64([*self._seed, block]))
            parts = self._blocks[block] = rng.permutation(np.repeat(np.arange(len(per_part)), per_part))
            if len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return parts
