"""What an objective may ask of the other ranks. The base class is the identity on one process; the one below it
speaks torch.distributed. All of it is outside autograd: only statistics travel.
"""

import torch
from torch import Tensor


class Collective:
    """One process: every operation returns its input."""

    rank: int = 0
    world_size: int = 1

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, same shape and dtype; `x` itself is not changed."""
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
