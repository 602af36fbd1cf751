"""LARS (You et al. 2017, arXiv:1708.03888) as MAE's util/lars.py has it: for large batches and linear probes.

Tensors with more than one dimension are decayed and scaled by their trust ratio; vectors take a plain momentum step.
"""

import torch


class LARS(torch.optim.Optimizer):
    """mu ← momentum·mu + trust·(g + weight_decay·p), p ← p − lr·mu; trust = coefficient·‖p‖/‖g + weight_decay·p‖, or 1
    where either norm is zero. A group's "adapt" says whether decay and trust apply; without it a tensor's rank decides.
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
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "adapt": None,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                adapt = p.ndim > 1 if group["adapt"] is None else group["adapt"]
                if adapt:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight_norm, update_norm = p.norm(), update.norm()
                    trust = group["trust_coefficient"] * weight_norm / update_norm
                    trust = torch.where((weight_norm > 0) & (update_norm > 0), trust, torch.ones_like(trust))
                    update = update * trust
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                p.add_(state["momentum"], alpha=-group["lr"])
