"""What features tell about an encoder without any label: their effective rank and how far they spread."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """RankMe, the effective rank of features (N, D): exp of the entropy of the normalised singular values.

    Between 1 (all on a line) and min(N, D); a scalar float32. Garrido et al. 2023, equation 1: p_k = σ_k / ‖σ‖₁ + ε.
    """
    sigma = torch.linalg.svdvals(_matrix(features))
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + eps
    return torch.exp(-(p * p.log()).sum())


def feature_spread(features: Tensor) -> Tensor:
    """How far L2-normalised features (N, D) spread: mean over dimensions of their standard deviation, times √D.

    0 when all are one direction, close to 1 when they point everywhere alike; a scalar float32. The measure is that of
    SimSiam's collapse study (Chen & He 2021, section 4.1), scaled to be the same for every D.
    """
    unit = F.normalize(_matrix(features), dim=-1)
    return unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5


def _matrix(features: Tensor) -> Tensor:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features should be (N, D) with N ≥ 1, not {tuple(features.shape)}")
    return features.detach().float()
