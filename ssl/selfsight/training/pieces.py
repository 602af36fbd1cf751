"""Who holds what of the optimiser: which stretch of which parameter each tensor in this rank's optimiser is.

DeepSpeed hands the optimiser whole parameters (ZeRO-0), one flat part per group (ZeRO-1 and 2: padded, cut anywhere) or
flat shards of whole sub-groups (ZeRO-3), on the device or offloaded to the host. Said in pieces of named parameters, a
state belongs to no world size and no stage. In: a module and DeepSpeed's optimiser. Out: the pieces of this rank.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of a flattened parameter, which lie in `shard` from `offset` on."""

    name: str  # of the parameter in the module
    start: int
    stop: int
    shard: Tensor  # what the optimiser steps, fp32: its key in `optimizer.state`
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's elements, a view (stop − start,), of `shard` itself or of a state that is shaped like it."""
        assert tensor.numel() == self.shard.numel(), f"a state of {self.name} is not one number per weight"
        return tensor.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


def pieces(module: nn.Module, optimizer: Any) -> list[Piece]:
    """The pieces of the trainable parameters of `module` that `optimizer` steps on this rank, shard by shard.

    `optimizer` is that of the DeepSpeed engine of `module`: a plain one of torch under ZeRO-0, else DeepSpeed's own.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        found = [_sharded(name, p, optimizer) for name, p in named]
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        found = [_partitioned(name, p, optimizer) for name, p in named]
    else:
        found = [Piece(name, 0, p.numel(), p, 0) for name, p in named]
    return [piece for piece in found if piece is not None]


def by_shard(found: list[Piece]) -> list[tuple[Tensor, list[Piece]]]:
    """The same pieces, together with those that share their shard."""
    ordered = sorted(found, key=lambda piece: id(piece.shard))
    grouped = [list(group) for _, group in groupby(ordered, key=lambda piece: id(piece.shard))]
    return [(group[0].shard, group) for group in grouped]


def inner(optimizer: Any) -> Any:
    """The torch optimiser inside DeepSpeed's, whose `state` the shards are keys of."""
    return getattr(optimizer, "optimizer", optimizer)


def _partitioned(name: str, parameter: Any, optimizer: Any) -> Piece | None:
    mapping = parameter._hp_mapping  # None where another rank has all of it
    if mapping is None:
        return None
    here, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
    shard = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Piece(name, whole.start, whole.start + whole.numel, shard, here.start)


def _sharded(name: str, parameter: Any, optimizer: Any) -> Piece | None:
    # The part of a rank is as long on every rank, so that the last ones may be padding in part or in whole.
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = dist.get_rank() * length
    stop = min(start + length, parameter.ds_numel)
    if start >= stop:
        return None
    return Piece(name, start, stop, optimizer.fp32_partitioned_groups_flat[group], offset)
