"""Matching another model's features (AM-RADIO, Ranzinger et al. 2024, arXiv:2312.06709, §3.3, equations 2 to 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA, BETA = 0.9, 0.1  # of the cosine distance and of smooth L1, in the loss of patches


def summary_loss(x: Tensor, y: Tensor) -> Tensor:
    """1 − cos(x, y) of class tokens (B, D) and their targets: a scalar in fp32 or wider."""
    return 1 - F.cosine_similarity(_wide(x), _wide(y), dim=-1).mean()


def spatial_loss(x: Tensor, y: Tensor) -> Tensor:
    """α·(1 − cos) + β·smooth L1 of patch tokens (B, N, D) and their targets, mean over patches: a scalar."""
    x, y = _wide(x), _wide(y)
    return ALPHA * summary_loss(x, y) + BETA * F.smooth_l1_loss(x, y)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
