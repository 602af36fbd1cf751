"""torch's AdamW and SGD that leave frozen groups alone.

A parameter that is frozen for a while stays in its group, since under ZeRO nothing else can be done with it; the group
says "frozen", and is passed over as if it had no gradient: no weight decay, no moments, no step count.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# An optimiser's parameter (whole, or this rank's flat stretch of one), its group, and as much of its gradient as it has
# elements that are no padding, in the same order.
Held = tuple[Tensor, dict[str, Any], Tensor]


class Freezing(torch.optim.Optimizer):
    """Passes over groups with "frozen" set, and over all of them while `skip` is set.

    DeepSpeed's ZeRO calls `step` once per group; skipping inside it leaves DeepSpeed's own counters and buffers in
    order.
    """

    skip: bool = False

    def prepare(self, held: Iterable[Held], total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """For optimisers that look at all of a tensor before they step; these do not."""

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [] if self.skip else [g for g in groups if not g.get("frozen", False)]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _accelerator_graph_capture_health_check(self) -> None:
        """No step is captured in a CUDA graph here, and torch's check looks for a driver at every call: a tenth of a
        millisecond each, for every group under ZeRO."""

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check  # its older name


class AdamW(Freezing, torch.optim.AdamW):
    pass


class SGD(Freezing, torch.optim.SGD):
    pass


def inside(p: Tensor, gradient: Tensor) -> Tensor:
    """A parameter, or a moment of one, without the padding behind it, in the gradient's shape; shares its memory."""
    return p if p.shape == gradient.shape else p.view(-1)[: gradient.numel()].view(gradient.shape)
