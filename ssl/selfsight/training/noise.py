"""The gradient noise scale B_simple = tr(Σ) / |G|² (McCandlish et al. 2018, arXiv:1812.06162): the batch from which on
a larger one brings less and less. G is the true gradient, Σ the covariance of one image's.

In: the squared norms of gradients of two batch sizes at the same weights. Out: |G|², tr(Σ) (appendix A.1, unbiased) and
their ratio in images. The large batch is that of the step. The small ones are what each rank and micro-batch puts into
it, seen on their way through the backward pass, where nothing is kept; on one process without accumulation an eighth of
the batch goes through the objective once more, before the step, at logged steps only.

Gradients of earlier steps will not do for the small batch, nor will Adam's average of them, although they come for
free: a step along the noise turns the next gradient against it, and |G|² comes out ten times too small or negative.

It is assumed that the images of a batch are independent. Where they see each other (negatives, batch statistics), the
norms are of what an image puts into the joint gradient; the eighth of a batch has fewer negatives than the whole, so
that there the figure is a rough guide. One step tells little: `NoiseScale` averages before it divides.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isfinite, nan

import torch
from torch import Tensor

from selfsight.objectives import Objective, Progress

MEMORY = 0.9  # of the averages over logged steps
PART = 8  # the share of a batch that goes through once more


@contextmanager
def watched(parameters: Iterable[Tensor], squares: list[Tensor]) -> Iterator[None]:
    """Notes the squared norm of each parameter's gradient, whole and of this rank and micro-batch alone, on the device,
    whatever ZeRO does with it afterwards."""
    handles = [p.register_hook(lambda g: squares.append(torch.linalg.vector_norm(g).square())) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_of(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The first images of a batch of crops (count, B, 3, H, W) and draws (B, …), and how many they are."""
    n = max(len(x) if x.ndim < 5 else x.shape[1] for x in batch.values())
    few = max(n // PART, min(n, 2))
    return {name: x[:few] if x.ndim < 5 else x[:, :few] for name, x in batch.items()}, few


def squares_of(
    objective: Objective, parameters: list[Tensor], batch: dict[str, Tensor], progress: Progress
) -> list[Tensor]:
    """Squared norms of the gradients of a batch that is not trained on. Leaves no trace: gradients, statistics and
    generators are as they were."""
    device = parameters[0].device
    # Blocks compiled for two sizes of batch would be compiled for any, and slower for the one that counts.
    eagerly = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), eagerly:
        loss = objective(batch, progress).loss
    objective.discard_step()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.linalg.vector_norm(g).square() for g in gradients if g is not None]


def estimate(small: float, few: int, large: float, many: int) -> tuple[float, float]:
    """|G|² and tr(Σ) from squared norms of gradients of `few` and of `many` images; NaN where the two are as many."""
    if few == many:
        return nan, nan
    return (many * large - few * small) / (many - few), (small - large) / (1 / few - 1 / many)


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
