"""Which samples make the batch of step t: a pure function of (chunk sizes, batch_size, lanes, window, seed, t).

Epoch e permutes the chunks; lane l of L takes every L-th of them, shuffles inside windows of `window` chunks, and rolls
on into epoch e + 1 by itself. Step t is the next batch_size / L samples of every lane. So the batch is the same set for
any number of ranks and workers, resuming is knowing t, and nothing is padded, dropped or replayed.
"""

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from selfsight.errors import UserError

MAX_LANES = 256


def auto_lanes(batch_size: int, n_chunks: int) -> int:
    """The largest divisor of `batch_size` that `n_chunks` chunks can fill, 256 at most: more lanes mix better."""
    most = min(batch_size, n_chunks, MAX_LANES)
    return next(lanes for lanes in range(most, 0, -1) if batch_size % lanes == 0)


@dataclass(frozen=True)
class _Epoch:
    permutation: np.ndarray  # (n_chunks,) uint32
    ends: np.ndarray  # (L, n_windows) int64: samples of the lane up to the end of each of its windows


class Order:
    """The endless sequence of samples, L lanes wide.

    `sizes` (n_chunks,) holds the samples per chunk in the order of the corpus, so that sample ordinals follow from it.
    An instance only remembers what it computed; two instances with equal arguments agree, whatever was asked before.

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
        self._starts = [np.zeros(lanes, dtype=np.int64)]  # per epoch: the position at which each lane enters it
        # Lanes drift apart by an epoch or a few; small corpora can afford to remember all epochs that are in flight.
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._epochs_kept = max(4, 2**21 // len(self.sizes))
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._windows_kept = 2 * lanes

    def step(self, t: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions [start, stop) of the batch of step `t`, the whole batch by default.

        Returns (ordinals, visits), both int64 (stop − start,), lane after lane. A sample's visit is the epoch its lane
        is in: over the run each pair (ordinal, visit) comes once. Rank r of W takes [r·B/W, (r+1)·B/W).
        """
        stop = self.batch_size if stop is None else stop
        if t < 0 or not 0 <= start <= stop <= self.batch_size:
            raise ValueError(f"no positions [{start}, {stop}) in step {t} of batches of {self.batch_size}")
        ordinals, visits = np.empty(stop - start, dtype=np.int64), np.empty(stop - start, dtype=np.int64)
        share = self.batch_size // self.lanes  # samples per lane and step
        at = start
        while at < stop:
            lane, inside = divmod(at, share)
            count = min(share - inside, stop - at)
            piece = slice(at - start, at - start + count)
            ordinals[piece], visits[piece] = self.lane(lane, t * share + inside, count)
            at += count
        return ordinals, visits

    def lane(self, lane: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` samples of one lane's endless sequence, from `position` on: (ordinals, visits), int64 (count,)."""
        ordinals, visits = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, offset = self._locate(lane, position + done)
            ends = self._epoch(epoch).ends[lane]
            w = int(np.searchsorted(ends, offset, side="right"))
            samples = self._window(epoch, lane, w)
            inside = len(samples) - (int(ends[w]) - offset)
            taken = samples[inside : inside + count - done]
            ordinals[done : done + len(taken)] = taken
            visits[done : done + len(taken)] = epoch
            done += len(taken)
        return ordinals, visits

    def _locate(self, lane: int, position: int) -> tuple[int, int]:
        """The epoch in which the lane is at `position`, and how many of its samples of that epoch came before."""
        while self._starts[-1][lane] <= position:
            last = len(self._starts) - 1
            self._starts.append(self._starts[-1] + self._epoch(last).ends[:, -1])
        epoch = bisect_right(self._starts, position, key=lambda starts: starts[lane]) - 1
        return epoch, position - int(self._starts[epoch][lane])

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            permutation = rng.permutation(len(self.sizes)).astype(np.uint32)
            rows = -(-len(self.sizes) // (self.lanes * self.window)) * self.window
            table = np.zeros(rows * self.lanes, dtype=self.sizes.dtype)  # zeros where the last row is not full
            table[: len(permutation)] = self.sizes[permutation]
            per_window = table.reshape(-1, self.window, self.lanes).sum(axis=1, dtype=np.int64)
            ends = np.ascontiguousarray(np.roll(per_window.cumsum(axis=0).T, -epoch, axis=0))
            found = self._epochs[epoch] = _Epoch(permutation, ends)
            if len(self._epochs) > self._epochs_kept:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return found

    def _window(self, epoch: int, lane: int, w: int) -> np.ndarray:
        """The shuffled sample ordinals of a lane's w-th window of an epoch, int64."""
        key = (epoch, lane, w)
        found = self._windows.get(key)
        if found is None:
            # The rotation by the epoch hands the one chunk more of an uneven split to other lanes each time.
            column = (lane + epoch) % self.lanes + self.lanes * self.window * w
            chunks = self._epoch(epoch).permutation[column : column + self.lanes * self.window : self.lanes]
            samples = np.concatenate([np.arange(*self._firsts[c : c + 2].tolist()) for c in chunks.tolist()])
            found = np.random.Generator(np.random.PCG64([self.seed, epoch, lane, w])).permutation(samples)
            self._windows[key] = found
            if len(self._windows) > self._windows_kept:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return found
