"""How sure a figure is: Wilson's score interval for a proportion (1927), the bootstrap's for a mean,
Student's over repeats, paired tests."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """(low, high) of the proportion k/n at the confidence that `z` stands for; 95 % by default. n must be positive."""
    assert 0 <= k <= n, f"{k} successes in {n} trials"
    assert n > 0
    p, z2 = k / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At k = 0 and k = n the ends are exactly 0 and 1; rounding would leave 1e-17 there.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def bootstrap(values: np.ndarray, statistic=np.mean, *, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of `statistic` over resamples of the first axis of `values` (n, …) (Efron 1979)."""
    generator = np.random.default_rng(seed)
    found = [statistic(values[generator.integers(0, len(values), len(values))]) for _ in range(rounds)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def student(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval (1908) of the mean that `values` (r,), at least two of them, are draws around."""
    r = len(values)
    assert r > 1
    # t = √ν·tan θ turns the density with ν = r − 1 degrees of freedom into cos^(ν−1) θ on (−π/2, π/2).
    theta = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(theta).clip(0) ** (r - 2)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    t = math.sqrt(r - 1) * math.tan(np.interp(0.975, below / below[-1], theta))
    mean, half = float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(r)
    return mean - half, mean + half


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided exact p of McNemar's test (1947) that two answers to the same n questions are right equally often.

    `a`, `b`: bool (n,), whether each was right. Only questions on which they differ count: a sign test on those.
    """
    more, less = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = more + less, min(more, less)
    if n == 0:
        return 1.0
    # log of the binomial tail, so that ten thousand questions do not overflow
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    largest = max(logs)
    return min(1.0, 2 * math.exp(largest) * sum(math.exp(x - largest) for x in logs))


def sign_flips(a: np.ndarray, b: np.ndarray, *, rounds: int = 10_000, seed: int = 0) -> float:
    """Two-sided p that paired values have the same mean, by flipping the signs of their differences at random (Fisher).

    `a`, `b`: float (n,).
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    observed = abs(difference.sum())
    generator = np.random.default_rng(seed)
    tolerance = 1e-12 * np.abs(difference).sum()
    extreme = 0
    for start in range(0, rounds, 256):
        signs = generator.integers(0, 2, (min(256, rounds - start), len(difference)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= observed - tolerance).sum())
    return (extreme + 1) / (rounds + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """`ps` of several tests, adjusted so that all that lie below α are right at once with probability 1 − α (Holm
    1979)."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, so_far = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = so_far
    return adjusted
