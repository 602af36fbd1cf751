"""Which samples make the batch of step t: a pure function of (chunk sizes, batch_size, lanes, window, seed, t).

Epoch e permutes the chunks and cuts their samples into L segments of equal length, to one sample. Lane l plays one
segment an epoch, another one each time, shuffled inside windows of `window` chunks or more. Step t is the next
batch_size / L samples of every lane. So the batch is the same set for any number of ranks and workers, resuming is
knowing t, at any t as soon as at the first one, and nothing is padded, dropped or replayed.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from selfsight.errors import UserError

MAX_LANES = 256
EPOCHS_KEPT = 2  # at a time: lanes are never more than a sample apart

Key = TypeVar("Key")
Value = TypeVar("Value")


def auto_lanes(batch_size: int, n_chunks: int) -> int:
    """The largest divisor of `batch_size` that `n_chunks` chunks can fill, 256 at most: more lanes mix better."""
    most = min(batch_size, n_chunks, MAX_LANES)
    return next(lanes for lanes in range(most, 0, -1) if batch_size % lanes == 0)


@dataclass(frozen=True)
class _Epoch:
    permutation: np.ndarray  # (n_chunks,) uint32
    ends: np.ndarray  # (n_chunks,) int64: samples in the permuted chunks up to the end of each


@dataclass(frozen=True)
class _Window:
    samples: np.ndarray  # int64: the shuffled ordinals
    at: int  # where in it the asked position is


class Order:
    """The endless sequence of samples, L lanes wide.

    `sizes` (n_chunks,) holds the samples per chunk in the order of the corpus, so that sample ordinals follow from it.
    An instance only remembers what it computed; two instances with equal arguments agree, whatever was asked before.
    Threads must not share one.

    Raises UserError when the batch is larger than the corpus, the lanes do not divide the batch, or the corpus has
    fewer chunks than lanes.
    """

    def __init__(self, sizes: np.ndarray, *, batch_size: int, lanes: int, window: int, seed: int) -> None:
        self.sizes = np.ascontiguousarray(sizes)
        self.batch_size, self.lanes, self.window, self.seed = batch_size, lanes, window, seed
        if self.sizes.ndim != 1 or (len(self.sizes) and self.sizes.min() < 1):
            raise ValueError("sizes must be one-dimensional and every chunk must hold a sample")
        self._firsts = np.zeros(len(self.sizes) + 1, dtype=np.int64)  # ordinal of the first sample of each chunk
        np.cumsum(self.sizes, dtype=np.int64, out=self._firsts[1:])
        self.n = int(self._firsts[-1])
        if min(batch_size, lanes, window) < 1 or seed < 0:
            raise UserError("batch_size, lanes and window must be at least 1 and seed at least 0: change the recipe")
        if batch_size > self.n:
            raise UserError(f"corpus has fewer images than the batch, {self.n} for {batch_size}: lower batch_size")
        if batch_size % lanes:
            raise UserError(f"batch_size {batch_size} is no multiple of stream.lanes {lanes}: set lanes to a divisor")
        if lanes > len(self.sizes):
            raise UserError(
                f"corpus has {len(self.sizes)} chunks for {lanes} lanes: "
                f"set stream.lanes to {auto_lanes(batch_size, len(self.sizes))} or null"
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def step(self, t: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions [start, stop) of the batch of step `t`, the whole batch by default.

        Returns (ordinals, visits), both int64 (stop − start,), lane after lane. A sample's visit is the epoch its lane
        is in: over the run each pair (ordinal, visit) comes once. Rank r of W takes [r·B/W, (r+1)·B/W).
        """
        stop = self.batch_size if stop is None else stop
        ordinals, visits = np.empty(stop - start, dtype=np.int64), np.empty(stop - start, dtype=np.int64)
        for piece, lane, position in self.pieces(t, start, stop):
            ordinals[piece], visits[piece] = self.lane(lane, position, piece.stop - piece.start)
        return ordinals, visits

    def pieces(self, t: int, start: int, stop: int) -> list[tuple[slice, int, int]]:
        """Positions [start, stop) of step `t` as (slice of them, lane, position in the lane)."""
        if t < 0 or not 0 <= start <= stop <= self.batch_size:
            raise ValueError(f"no positions [{start}, {stop}) in step {t} of batches of {self.batch_size}")
        share = self.batch_size // self.lanes  # samples per lane and step
        found, at = [], start
        while at < stop:
            lane, inside = divmod(at, share)
            count = min(share - inside, stop - at)
            found.append((slice(at - start, at - start + count), lane, t * share + inside))
            at += count
        return found

    def lane(self, lane: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` samples of one lane's endless sequence, from `position` on: (ordinals, visits), int64 (count,)."""
        ordinals, visits = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, window = self._window(lane, position + done)
            taken = window.samples[window.at : window.at + count - done]
            ordinals[done : done + len(taken)] = taken
            visits[done : done + len(taken)] = epoch
            done += len(taken)
        return ordinals, visits

    def stand_in(self, lane: int, position: int, attempt: int) -> int | None:
        """The ordinal of a sample of the same window for one that cannot be had: another one for each `attempt`.

        None once every sample of the window has been named.
        """
        epoch, window = self._window(lane, position)
        others = len(window.samples) - 1
        if attempt >= others:
            return None
        # Steps of a size that shares no factor with `others` reach each of them once.
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch, lane, position, 1]))
        first, stride = int(rng.integers(others)), int(rng.integers(1, others + 1))
        while np.gcd(stride, others) != 1:
            stride += 1
        return int(window.samples[(window.at + 1 + (first + attempt * stride) % others) % len(window.samples)])

    def chunks_at(self, lane: int, position: int) -> np.ndarray:
        """The chunks of the window in which a lane is at `position`."""
        number, offset = self._locate(lane, position)
        start, stop, _ = self._bounds(number, (lane + number) % self.lanes, offset)
        return self._epoch(number).permutation[start:stop]

    def epochs_over(self, lane: int, position: int) -> int:
        """How many epochs a lane has behind it at `position`."""
        return self._locate(lane, position)[0]

    def _start(self, lane: int, epoch: int) -> int:
        """The position at which a lane enters an epoch: it has played the segments lane, lane + 1, … (mod L)."""
        rounds, rest = divmod(epoch, self.lanes)
        last = lane + rest
        wrapped = self._border(last - self.lanes) + self.n - self._border(lane)
        return rounds * self.n + (wrapped if last > self.lanes else self._border(last) - self._border(lane))

    def _border(self, segment: int) -> int:
        """Samples of an epoch that come before a segment."""
        return segment * self.n // self.lanes

    def _locate(self, lane: int, position: int) -> tuple[int, int]:
        """The epoch in which the lane is at `position`, and how many of its samples of that epoch came before."""
        epoch = position * self.lanes // self.n  # right, or off by one, because segments have the same length to one
        while self._start(lane, epoch) > position:
            epoch -= 1
        while self._start(lane, epoch + 1) <= position:
            epoch += 1
        return epoch, position - self._start(lane, epoch)

    def _epoch(self, epoch: int) -> _Epoch:
        def make() -> _Epoch:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            permutation = np.arange(len(self.sizes), dtype=np.uint32)
            rng.shuffle(permutation)
            return _Epoch(permutation, np.cumsum(self.sizes[permutation], dtype=np.int64))

        return _kept(self._epochs, epoch, make, EPOCHS_KEPT)

    def _window(self, lane: int, position: int) -> tuple[int, _Window]:
        """The epoch in which the lane is at `position`, and the window there."""
        number, offset = self._locate(lane, position)
        epoch, segment = self._epoch(number), (lane + number) % self.lanes
        low, high = self._border(segment), self._border(segment + 1)
        start, stop, w = self._bounds(number, segment, offset)
        begin = max(low, int(epoch.ends[start - 1]) if start else 0)

        def make() -> np.ndarray:
            ends, numbers = epoch.ends[start:stop].tolist(), epoch.permutation[start:stop].tolist()
            ranges = []
            for end, c in zip(ends, numbers, strict=True):  # a chunk on a border is shared between two lanes
                shift = int(self._firsts[c + 1]) - end
                ranges.append(np.arange(max(end - int(self.sizes[c]), low) + shift, min(end, high) + shift))
            rng = np.random.Generator(np.random.PCG64([self.seed, number, segment, w]))
            return rng.permutation(np.concatenate(ranges))

        samples = _kept(self._windows, (number, segment, w), make, 2 * self.lanes)
        return number, _Window(samples, low + offset - begin)

    def _bounds(self, number: int, segment: int, offset: int) -> tuple[int, int, int]:
        """Of the window that holds a segment's sample `offset`: its range in the permuted chunks, and its number."""
        low, high = self._border(segment), self._border(segment + 1)
        places = [low + offset, low, high - 1]
        chunk, first, last = np.searchsorted(self._epoch(number).ends, places, side="right").tolist()
        # Windows of equal length to one chunk: a short last one would mix badly.
        chunks = last + 1 - first
        windows = max(1, chunks // self.window)
        w = ((chunk - first + 1) * windows - 1) // chunks
        return first + chunks * w // windows, first + chunks * (w + 1) // windows, w


def _kept(cache: OrderedDict[Key, Value], key: Key, make: Callable[[], Value], most: int) -> Value:
    """`make()`, remembered in `cache` until `most` others were asked for since."""
    found = cache.get(key)
    if found is None:
        found = cache[key] = make()
        if len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return found
