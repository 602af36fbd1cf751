"""One training step that is imagined: shapes without numbers, from which its FLOPs and its memory are counted.

In: an objective built on the meta device, and a micro-batch's size. Out: what a forward and a backward pass compute and
hold. Weights and activations are torch's fake tensors, which dispatch as those of a CPU do (autocast, attention kernels
and checkpointing included) and take no memory, so that seven billion parameters take seconds. The noise that masks are
made of is real, and so is whatever follows from it alone: how many patches are hidden is then a number.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from selfsight.objectives import Objective, Progress

LARGE = 1 << 20  # elements from which on a tensor that nothing precedes is imagined, too


@dataclass
class Trace:
    """Bytes on one device, but for weights and optimiser; FLOPs are of the whole micro-batch."""

    micro_batch: int
    flops: float  # multiplications and additions of the matrix products, forward, backward and what is recomputed
    views: int  # the views of the micro-batch, as the objective gets them
    buffers: int
    changes: list[tuple[int, int]] = field(default_factory=list, repr=False)  # (activations, gradients), in order

    @property
    def flops_per_image(self) -> float:
        return self.flops / self.micro_batch

    def peak(self, gradients: float = 1.0) -> int:
        """The most that activations, views and `gradients` (the share of them that stays on a device) take together."""
        activations = held = 0
        peak = 0.0
        for more, gradient in self.changes:
            activations, held = activations + more, held + gradient
            peak = max(peak, activations + gradients * held)
        return int(peak)


def trace(objective: Objective, micro_batch: int, progress: Progress, *, bf16: bool) -> Trace:
    """Imagines a step of `objective`, all of whose parameters and buffers are on the meta device."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        objective.to_empty(device="cpu")
        batch: dict[str, Tensor] = {
            crop.name: torch.empty(crop.count, micro_batch, 3, crop.size, crop.size) for crop in objective.views().crops
        }
    generator = torch.Generator().manual_seed(0)
    noise = {n.name: torch.rand(micro_batch, n.length, generator=generator) for n in objective.views().noise}
    views = sum(_bytes(x) for x in batch.values())
    buffers = sum(_bytes(x) for x in objective.buffers())
    memory = _Step(fake)
    for x in (*objective.parameters(), *objective.buffers()):
        memory.known.add(x.untyped_storage()._cdata)
    for x in batch.values():
        memory.note(x)
    with torch.random.fork_rng(devices=[]), memory:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = objective(batch | noise, progress).loss
        loss.backward()
    gradients = {memory.number(p.grad) for p in objective.parameters() if p.grad is not None}
    changes = [(0, n) if key in gradients else (n, 0) for key, n in memory.changes]
    return Trace(micro_batch, memory.flops, views, buffers, changes)


class _Step(TorchDispatchMode):
    """Counts FLOPs, and notes when each storage appears and goes. What is small and follows from no imagined tensor is
    computed for real."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.known: set[int] = set()  # storages that are not counted: weights and buffers
        self.changes: list[tuple[int, int]] = []  # (storage, bytes)
        self.flops = 0.0
        self._numbers: dict[int, int] = {}  # storage's address → its number, as long as it lives

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if inputs and not any(isinstance(x, FakeTensor) for x in inputs):
            out = func(*args, **kwargs)
        else:
            args, kwargs = tree_map_only(Tensor, self._imagined, (args, kwargs))
            with self.fake:
                out = func(*args, **kwargs)
            self.flops += _flops(func, args, kwargs, out)
            if not inputs:
                out = tree_map_only(FakeTensor, lambda x: _real(func, args, kwargs, x), out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.note(x)
        return out

    def number(self, x: Tensor) -> int | None:
        return self._numbers.get(x.untyped_storage()._cdata)

    def _imagined(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x, static_shapes=True)

    def note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self.known or address in self._numbers:
            return
        number = self._numbers[address] = len(self.changes)
        self.changes.append((number, size))
        weakref.finalize(storage, self._gone, address, number, size)

    def _gone(self, address: int, number: int, size: int) -> None:
        self._numbers.pop(address, None)
        self.changes.append((number, -size))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    if func is torch.ops.aten.convolution_backward.default:  # torch counts grouped ones several times
        grad, _, weight = args[:3]
        return sum(args[-1][:2]) * 2.0 * grad.numel() * weight[0].numel()
    count = flop_registry.get(func._overloadpacket)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


def _real(func: Callable, args: Any, kwargs: Any, imagined: FakeTensor) -> Tensor:
    return imagined if imagined.numel() >= LARGE else func(*args, **kwargs)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
