"""The masked-patch loss of iBOT (Zhou et al. 2022, equation 2), which DINOv2 and DINOv3 keep."""

import torch
import torch.nn.functional as F
from torch import Tensor

Masked = tuple[Tensor, Tensor]  # as `masked_rows` gives them


def masked_rows(mask: Tensor) -> Masked:
    """mask (B, N) bool → where it is true in the flattened (B·N,), int64 (M,), and float32 weights (M,), of which those
    of one image sum to 1: an image counts the same however much of it is masked. Waits for the device, to know M.
    """
    at = mask.flatten().nonzero().squeeze(1)
    weight = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return at, weight.flatten()[at]


def ibot_loss(logits_s: Tensor, q: Tensor, weight: Tensor, n_images: int, student_temp: float) -> Tensor:
    """Cross-entropy H(q, p_s) of masked patches: weighted within each image, averaged over images; a scalar.

    Student logits (M, K), teacher probabilities q (M, K) and weights (M,) of all masked patches, as `masked_rows` has
    them. `n_images` counts those with nothing masked too, which is what the official codes divide by.
    """
    logits_s = logits_s.to(torch.promote_types(logits_s.dtype, torch.float32))
    entropy = -(q * F.log_softmax(logits_s / student_temp, dim=-1)).sum(dim=-1)
    return (entropy * weight).sum() / n_images
