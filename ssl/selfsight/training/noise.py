"""The gradient noise scale B_simple = tr(Σ) / |G|² (McCandlish et al. 2018, arXiv:1812.06162): the batch from which on
a larger one brings less and less. G is the true gradient, Σ the covariance of one image's.

In: the gradient g of a step and the optimiser's own average ḡ of those before it. Out: |G|², tr(Σ) and their ratio in
images. The paper compares gradients of two batch sizes; here the second is the average, which needs neither several
micro-batches nor several ranks, and no memory. With B images in a batch E|g|² = |G|² + tr(Σ)/B, and since the noise of
g is independent of that of ḡ, E⟨g, ḡ⟩ = |G|². So

    |G|² ≈ ⟨g, ḡ⟩        tr(Σ) ≈ B·(|g|² − ⟨g, ḡ⟩)

as long as G hardly turns within the average's memory, about 1/(1 − β1) steps. Where it does turn, ⟨g, ḡ⟩ comes out too
small and B_simple too large: at the very beginning, and at rates that make training oscillate. Both are taken of
clipped gradients, as the average is. A single step tells little: `NoiseScale` averages before it divides.
"""

from collections.abc import Iterable
from math import isfinite, nan

import torch
from torch import Tensor

from selfsight.training.freezing import Held

MEMORY = 0.9  # of the averages over logged steps


@torch.no_grad()
def measure(optimizer, held: Iterable[Held], steps: int) -> Tensor:
    """(|g|², ⟨g, ḡ⟩) of what this rank holds, float32 (2,) on the device, between `prepare` and the step after `steps`
    others. Zeros while there is no average yet; frozen parameters do not count."""
    sums = []
    for p, group, gradient in held:
        if not group["frozen"] and (past := optimizer.past_gradient(p, group, gradient, steps)) is not None:
            flat = gradient.flatten()
            sums.append(torch.stack([flat.dot(flat), flat.dot(past.flatten())]))
    return torch.stack(sums).sum(dim=0) if sums else torch.zeros(2)


class NoiseScale:
    """Follows the records of logged steps, which have "grad_signal", |G|², and "grad_noise", tr(Σ)."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def look(self, record: dict[str, float]) -> float:
        """B_simple in images; NaN as long as the gradient cannot be told from its noise."""
        signal, noise = record["grad_signal"], record["grad_noise"]
        if isfinite(signal) and isfinite(noise):
            self._signal = MEMORY * self._signal + (1 - MEMORY) * signal
            self._noise = MEMORY * self._noise + (1 - MEMORY) * noise
        return self._noise / self._signal if self._signal > 0 else nan
