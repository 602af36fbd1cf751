"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", arXiv:1904.00962, algorithm 2): Adam's direction
with weight decay inside, scaled by each tensor's trust ratio.

The paper clips nothing and corrects no bias in its algorithm, and does both in its experiments: here the correction is
a choice, and gradients are clipped before they come (`optimizer.clip`).
"""

import torch

from selfsight.training.freezing import inside
from selfsight.training.lars import LayerWise


class LAMB(LayerWise):
    """m ← β1·m + (1 − β1)·g, v ← β2·v + (1 − β2)·g², r = m̂ / (√v̂ + ε) + weight_decay·p, p ← p − lr·φ·r with φ =
    ‖p‖/‖r‖, or 1 where either norm is zero, and at most 1 with `trust_clip` (LAMBC). m̂ and v̂ are corrected for their
    beginning at zero unless `bias_correction` is off. Tensors that do not adapt take the step without φ.
    """

    def __init__(
        self,
        params,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        trust_clip: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction, "trust_clip": trust_clip})

    def accumulate(self, p, group, gradient):
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros(())  # on the CPU, as torch's Adam has it
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        inside(state["exp_avg"], gradient).lerp_(gradient, 1 - beta1)
        inside(state["exp_avg_sq"], gradient).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    def direction(self, p, group, gradient):
        state, (beta1, beta2) = self.state[p], group["betas"]
        m, v = inside(state["exp_avg"], gradient), inside(state["exp_avg_sq"], gradient)
        correction1 = correction2 = 1.0
        if group["bias_correction"]:
            step = state["step"].item()
            correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        denominator = v.sqrt().div_(correction2**0.5).add_(group["eps"])
        return m.div(denominator).div_(correction1).add_(inside(p, gradient), alpha=group["weight_decay"])

    def ratio(self, group, weight_norm, update_norm):
        trust = weight_norm / update_norm
        return trust.clamp(max=1.0) if group["trust_clip"] else trust
