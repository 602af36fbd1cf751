"""Parameter groups, AdamW that leaves frozen groups alone, and gradient norms that are exact under ZeRO-1.

ZeRO-1 hands the optimiser flat one-dimensional shards, one per parameter group, so everything that depends on a
tensor's shape is decided here at construction and kept in its group; a norm per tensor needs one group per tensor.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.errors import UserError, check_range
from selfsight.objectives import ParameterRule, Progress
from selfsight.recipe import OptimizerConfig

CLIP_EPSILON = 1e-6  # in the clipping coefficient, as DINO's `clip_gradients` and torch have it


def check(config: OptimizerConfig) -> None:
    """Raises UserError for values that no optimiser takes."""
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"optimizer.betas is {config.betas}: give two numbers from 0 to below 1, such as [0.9, 0.999]")
    check_range("optimizer.clip", config.clip, 0)
    if config.clip_per not in ("global", "tensor"):
        raise UserError(f"optimizer.clip_per is {config.clip_per!r}: choose global or tensor")


def parameter_groups(module: nn.Module, rules: list[ParameterRule], *, per_tensor: bool) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of `module`, each with "names", "decay" and "rule" (an index, or -1).

    Vectors and names that end in `.bias` are not decayed; everything else is, tokens and position tables included, as
    in DINO's `get_params_groups` and timm's `add_weight_decay`. The first rule whose prefix fits a name holds.
    """
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim > 1 and not name.endswith(".bias")
        rule = next((i for i, r in enumerate(rules) if name.startswith(r.prefix)), -1)
        key = name if per_tensor else (decay, rule)
        group = groups.setdefault(key, {"params": [], "names": [], "decay": decay, "rule": rule, "frozen": False})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class AdamW(torch.optim.AdamW):
    """torch's AdamW that passes over groups with "frozen" set, and over all of them while `skip` is set.

    A frozen group is as if it had no gradient: no weight decay, no moments, no step count. DeepSpeed's ZeRO-1 calls
    `step` once per group; skipping inside it leaves DeepSpeed's own counters and buffers in order.
    """

    skip: bool = False

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [] if self.skip else [g for g in groups if not g["frozen"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _accelerator_graph_capture_health_check(self) -> None:
        """No step is captured in a CUDA graph here, and torch's check looks for a driver at every call: a tenth of a
        millisecond each, for every group under ZeRO-1."""

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check  # its older name


def set_schedule(
    optimizer: torch.optim.Optimizer, rules: list[ParameterRule], progress: Progress, *, lr: float, weight_decay: float
) -> None:
    """Writes this step's values into every group."""
    for group in optimizer.param_groups:
        scale = rules[group["rule"]].lr_scale(progress) if group["rule"] >= 0 else 1.0
        group["lr"] = lr * scale
        group["weight_decay"] = weight_decay if group["decay"] else 0.0
        group["frozen"] = scale == 0.0


def averaged_gradients(engine) -> list[list[Tensor]]:
    """Per parameter group, the gradients that this rank's optimiser is about to use, averaged over the ranks.

    Changing them in place changes the step. ZeRO-0: whole tensors, on every rank the same. ZeRO-1: this rank's shards,
    which `engine.optimizer.averaged_gradients` holds between the last backward and the step.
    """
    sharded = getattr(engine.optimizer, "averaged_gradients", None)
    if sharded is not None:
        return [list(sharded[i]) for i in range(len(engine.optimizer.param_groups))]
    return [[p.grad for p in g["params"] if p.grad is not None] for g in engine.optimizer.param_groups]


def squared_norms(groups: list[list[Tensor]], device: torch.device) -> Tensor:
    """Squared l2 norm per group of gradients: float32 (groups,), of what this rank holds."""
    flat = [g for group in groups for g in group]
    norms = iter(torch._foreach_norm(flat, 2.0) if flat else ())  # pyright: ignore[reportPrivateImportUsage]
    zero = torch.zeros((), device=device)
    sums = [sum((n.square() for n in _take(norms, len(group))), zero) for group in groups]
    return torch.stack(sums) if sums else torch.zeros(0, device=device)


def clip(groups: list[list[Tensor]], norms: list[float], limit: float, *, per_group: bool) -> None:
    """Scales gradients in place so that each group's norm, or the global one, is at most `limit`; `norms` are whole."""
    whole = sum(n * n for n in norms) ** 0.5
    gradients, factors = [], []
    for group, norm in zip(groups, norms, strict=True):
        factor = limit / ((norm if per_group else whole) + CLIP_EPSILON)
        if factor < 1.0:
            gradients += group
            factors += [factor] * len(group)
    if gradients:
        torch._foreach_mul_(gradients, factors)  # pyright: ignore[reportPrivateImportUsage]


def _take(norms: Iterator[Tensor], n: int) -> list[Tensor]:
    return [next(norms) for _ in range(n)]
