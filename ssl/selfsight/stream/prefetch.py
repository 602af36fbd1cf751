"""Chunks that are far away, fetched before their turn: the order knows which window each lane opens next.

All lanes change windows at about the same step. Half a window ahead of that, the next one's chunks begin to come, one
after the other, into the cache of this machine.
"""

from concurrent.futures import ThreadPoolExecutor

from selfsight.stream.mixture import Mixture

FETCHERS = 4  # threads
LOOKS = 8  # at what comes next, in half a window


class Prefetch:
    """For positions [first, first + share) of a mixture's batches. `look` is called with every step, in order."""

    def __init__(self, mixture: Mixture, first: int, share: int) -> None:
        self.mixture, self._first, self._share = mixture, first, share
        self.far = {i for i, part in enumerate(mixture.parts) if part.corpus.is_far}
        pace = mixture.parts[min(self.far)] if self.far else None
        steps = 0 if pace is None else int(mixture.window * pace.view.sizes.mean()) // mixture.samples_per_lane
        self.horizon = max(1, steps // 2)
        self._every = max(1, self.horizon // LOOKS)
        self._asked: set[tuple[int, int]] = set()
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch") if self.far else None

    def look(self, t: int) -> None:
        if self._pool is None or t % self._every:
            return
        coming = self.mixture.chunks(t + self.horizon, self._first, self._first + self._share)
        for part, chunk in sorted(coming - self._asked):
            if part in self.far:
                self._pool.submit(self.mixture.parts[part].corpus.prefetch, chunk)  # who reads it says what is wrong
        self._asked = coming

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
