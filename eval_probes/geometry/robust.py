"""A model through matches of which many are wrong: RANSAC (Fischler & Bolles 1981), its rounds computed as one batch.

Works on any model that is fitted to k matches at least and judges a match by a distance; float64 numpy, and the same
answer for the same seed.
"""

from collections.abc import Callable

import numpy as np

ROUNDS = 256  # judged at once
REFITS = 10

Fit = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (…, k, 2), (…, k, 2) → (…, 3, 3)
Distance = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (…, 3, 3), (M, 2), (M, 2) → (…, M)


def ransac(
    fit: Fit,
    distance: Distance,
    x: np.ndarray,
    y: np.ndarray,
    *,
    minimum: int,
    threshold: float,
    rounds: int,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray] | None:
    """(model (3, 3), inliers bool (M,)) of matches `x`, `y` (M, 2), or None where no model has `minimum` inliers.

    Of the models through `rounds` samples of `minimum` matches, the one with the most inliers (distance ≤ threshold) is
    fitted again to all of them for as long as that finds no fewer (the local step of LO-RANSAC, Chum et al. 2003).
    """
    if len(x) < minimum:
        return None
    generator = np.random.default_rng(seed)
    best, most = None, minimum - 1
    for start in range(0, rounds, ROUNDS):
        n = min(ROUNDS, rounds - start)
        # The first places of random permutations: no match twice in a sample.
        samples = generator.random((n, len(x))).argpartition(minimum - 1, axis=1)[:, :minimum]
        models = fit(x[samples], y[samples])
        counts = (distance(models, x, y) <= threshold).sum(axis=1)
        if counts.max() > most:
            best, most = models[counts.argmax()], int(counts.max())
    if best is None:
        return None
    for _ in range(REFITS):
        inliers = distance(best, x, y) <= threshold
        again = fit(x[inliers], y[inliers])
        found = int((distance(again, x, y) <= threshold).sum())
        if found < most:
            break
        best, grown, most = again, found > most, found
        if not grown:
            break
    return best, distance(best, x, y) <= threshold
