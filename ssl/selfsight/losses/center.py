"""The centre of a teacher's logits (DINO, equation 4): what is taken off them so that no prototype takes all."""

import torch
from torch import Tensor, nn

from selfsight.collective import Collective


class Center(nn.Module):
    """Running mean of logits (…, K): `add` gathers a forward pass, `commit` moves the mean once the step was taken."""

    value: Tensor
    pending_sum: Tensor
    pending_rows: Tensor

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self.register_buffer("pending_sum", torch.zeros(dim), persistent=False)
        self.register_buffer("pending_rows", torch.zeros(1), persistent=False)

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        """logits (…, K), each row of which counts once."""
        rows = logits.flatten(0, -2)
        self.pending_sum += rows.sum(dim=0, dtype=self.pending_sum.dtype)
        self.pending_rows += len(rows)

    @torch.no_grad()
    def commit(self, collective: Collective) -> None:
        """value ← m·value + (1 − m)·mean of all rows of all ranks; nothing happens where there were none."""
        total = collective.all_reduce_sum(torch.cat([self.pending_sum, self.pending_rows]))
        mean = torch.where(total[-1] > 0, total[:-1] / total[-1].clamp(min=1), self.value)
        self.value.copy_(self.value * self.momentum + mean * (1 - self.momentum))
        self.discard()

    def discard(self) -> None:
        self.pending_sum.zero_()
        self.pending_rows.zero_()
