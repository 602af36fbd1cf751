"""Gram anchoring: patches may move, but not against each other (DINOv3, Siméoni et al. 2025, §4.2, equation 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEGATIVES = ("keep", "drop", "drop_teacher")


def gram_loss(x_s: Tensor, x_g: Tensor, *, normalize: bool = True, negatives: str = "keep") -> Tensor:
    """Mean over all entries of (X_S·X_Sᵀ − X_G·X_Gᵀ)²; a scalar in fp32 or wider, with a gradient to the student's.

    Patch tokens of the student and of the gram teacher (B, N, D): a matrix of N × N cosines for each image. With
    `normalize` false they are products. `negatives`: what becomes of those below 0: "keep"; "drop", of both: 0; or
    "drop_teacher", of the teacher's alone. The paper's equation is the sum of the squares, its code the mean.
    """
    with torch.autocast(x_s.device.type, enabled=False):
        gram_s, gram_g = _gram(x_s, normalize), _gram(x_g.detach(), normalize)
        if negatives == "drop":
            gram_s = gram_s.clamp(min=0)
        if negatives != "keep":
            gram_g = gram_g.clamp(min=0)
        return F.mse_loss(gram_s, gram_g)


def _gram(x: Tensor, normalize: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalize:
        x = F.normalize(x, dim=-1)
    return x @ x.mT
