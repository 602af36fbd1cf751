"""Sinkhorn–Knopp: teacher logits → assignments that use all prototypes equally (Cuturi 2013; Caron et al. 2020, SwAV,
§3.1; DINOv2's teacher targets).
"""

import torch
from torch import Tensor

from selfsight.collective import Collective


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, collective: Collective, n_iterations: int = 3) -> Tensor:
    """logits (M, K) of this rank's samples → their assignments Q (M, K) ≥ 0, each row of which sums to 1.

    Q = diag(u) · exp(logits / temp) · diag(v), where each iteration makes first every prototype, then every sample
    weigh the same over the joined batch of all ranks; M may differ between the ranks, and be 0. fp32 or wider.

    The result does not change when a constant is taken off all logits. The largest is taken off, so that exp cannot
    overflow: a sample's own largest here, and its distance to the joined batch's in the first u, so that a sample
    whose logits lie far below the others' does not underflow to a row of nothing.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temp
        largest = scores.amax(dim=1)  # (M,)
        q = (scores - largest.unsqueeze(1)).exp()  # (M, K)
        mine = largest.amax(dim=0, keepdim=True) if len(largest) else scores.new_full((1,), -torch.inf)
        u = (largest - collective.gather(mine).amax()).exp()
        v, tiny = q.new_ones(q.shape[1]), torch.finfo(q.dtype).tiny
        for _ in range(n_iterations):
            v = 1 / collective.all_reduce_sum(u @ q).clamp(min=tiny)  # (K,)
            u = 1 / (q @ v).clamp(min=tiny)
        return u.unsqueeze(1) * q * v
