"""What an objective may ask of the other ranks. The base class is the identity on one process; the one below it
speaks torch.distributed.

The trainer averages gradients over the ranks. With `gather` and `sum`, whose backward passes add up what every rank
makes of the result, that average is the gradient one process would have on the joined batch: whether each rank
computes the mean over its own samples, or all of them the same loss of the joined batch.
"""

from typing import Any

import torch
from torch import Tensor


class Collective:
    """One process: every operation returns its input."""

    rank: int = 0
    world_size: int = 1

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, same shape and dtype, outside autograd; `x` itself is not changed."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, same shape and dtype, with its gradient."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(n, …) of every rank as one (world·n, …), in rank order, with its gradient. n must be the same everywhere."""
        return x


class DistributedCollective(Collective):
    """The ranks of the default torch.distributed process group."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        torch.distributed.all_reduce(x)
        return x

    def sum(self, x: Tensor) -> Tensor:
        return _Sum.apply(x)

    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.rank, self.world_size)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.rank, ctx.n = rank, len(x)
        parts = [torch.empty_like(x) for _ in range(world_size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad[ctx.rank * ctx.n : (ctx.rank + 1) * ctx.n], None, None


def own_part(parameter: Tensor) -> Tensor:
    """What a rank holds of a parameter, sharing its memory: all of it or, once the trainer shards it (ZeRO-3), a flat
    stretch, on some ranks with padding behind. Two parameters of one shape are cut alike."""
    return getattr(parameter, "ds_tensor", parameter)
