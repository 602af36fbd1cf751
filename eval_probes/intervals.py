"""How sure a figure is: Wilson's score interval for a proportion (1927), honest near 0 and 1 and for small n."""

import math

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
