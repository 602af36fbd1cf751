"""How often each prototype is the one that a teacher chooses: counted on the device, so that nobody waits for it."""

import torch
from torch import Tensor, nn


class PrototypeUse(nn.Module):
    """Counts (K,) float32 of this rank, since somebody zeroed them. They are no part of what a model has learnt, nor of
    its state."""

    counts: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(dim), persistent=False)

    @torch.no_grad()
    def add(self, q: Tensor) -> None:
        """q (…, K): each row counts for its largest entry."""
        best = q.flatten(0, -2).argmax(dim=-1)
        self.counts.scatter_add_(0, best, torch.ones_like(best, dtype=self.counts.dtype))
