"""LARS (You et al. 2017, arXiv:1708.03888) as MAE's util/lars.py has it, and what it shares with LAMB: a trust ratio.

Each tensor's step is scaled by the ratio of its own norm to that of its update. Under ZeRO a rank holds a stretch of a
tensor, so that both norms are sums over the ranks: `prepare` makes one reduction for all tensors of a step, before
DeepSpeed, which calls `step` once per group, begins.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from selfsight.training.freezing import Held, inside


class LayerWise(torch.optim.Optimizer):
    """p ← p − lr·(what `update` gives). Under ZeRO: one group per tensor, its "adapt" set, `prepare` before the step.

    A group's "adapt" says whether its trust ratio counts; without it a tensor's rank decides, so that biases and norms
    are left out. "frozen" and `skip` are as in `Freezing`.
    """

    skip: bool = False

    def __init__(self, params, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "adapt": None})
        self._trust: dict[Tensor, Tensor | None] = {}  # of the step that was prepared; None where it does not count

    def accumulate(self, p: Tensor, group: dict[str, Any], gradient: Tensor) -> None:
        """Takes the gradient into the moments that `direction` needs."""

    def direction(self, p: Tensor, group: dict[str, Any], gradient: Tensor) -> Tensor:
        """Where the step would go without a trust ratio: of the shape of `gradient`."""
        raise NotImplementedError

    def ratio(self, group: dict[str, Any], weight_norm: Tensor, update_norm: Tensor) -> Tensor:
        """The trust ratio where neither norm is zero."""
        raise NotImplementedError

    def update(self, p: Tensor, group: dict[str, Any], direction: Tensor) -> Tensor:
        """What is subtracted, of the direction that the trust ratio has scaled, but for the learning rate."""
        return direction

    @torch.no_grad()
    def prepare(self, held: Iterable[Held], total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Decides the trust ratios of the step that follows; `total` sums a tensor over the ranks that share weights.

        Nothing waits for the device: the ratios stay there.
        """
        held = [(p, group, gradient) for p, group, gradient in held if not group.get("frozen", False)]
        squares = []
        for p, group, gradient in held:
            self.accumulate(p, group, gradient)
            pair = (inside(p, gradient), self.direction(p, group, gradient)) if adapts(p, group) else ()
            squares += [torch.linalg.vector_norm(x).square() for x in pair]
        norms = iter(total(torch.stack(squares)).sqrt() if squares else ())
        self._trust = {p: None for p, _, _ in held}
        for p, group, _ in held:
            if adapts(p, group):
                weight_norm, update_norm = next(norms), next(norms)
                trust = self.ratio(group, weight_norm, update_norm)
                self._trust[p] = torch.where((weight_norm > 0) & (update_norm > 0), trust, torch.ones_like(trust))

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        if self.skip:
            return
        groups = [g for g in self.param_groups if not g.get("frozen", False)]
        held = [(p, g, p.grad) for g in groups for p in g["params"] if p.grad is not None]
        if not all(p in self._trust for p, _, _ in held):
            self.prepare(held)
        for p, group, gradient in held:
            direction, trust = self.direction(p, group, gradient), self._trust.pop(p)
            p.add_(self.update(p, group, direction if trust is None else direction * trust), alpha=-group["lr"])


def adapts(p: Tensor, group: dict[str, Any]) -> bool:
    return p.ndim > 1 if group["adapt"] is None else group["adapt"]


class LARS(LayerWise):
    """mu ← momentum·mu + trust·(g + weight_decay·p), p ← p − lr·mu; trust = coefficient·‖p‖/‖g + weight_decay·p‖, or 1
    where either norm is zero. Tensors that do not adapt are not decayed either: they take a plain momentum step.
    """

    def __init__(
        self,
        params,
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    def direction(self, p, group, gradient):
        return gradient.add(inside(p, gradient), alpha=group["weight_decay"]) if adapts(p, group) else gradient

    def ratio(self, group, weight_norm, update_norm):
        return group["trust_coefficient"] * weight_norm / update_norm

    def update(self, p, group, direction):
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"].mul_(group["momentum"]).add_(direction)
