"""LAMB against timm's."""

import pytest
import torch
from timm.optim import Lamb
from torch import nn

from selfsight.training.lamb import LAMB

SHAPES = {"matrix": (6, 5), "token": (1, 1, 7), "zero": (3, 2), "vector": (5,)}


def drawn(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("options", [{}, {"trust_clip": True}, {"bias_correction": False}])
def test_trajectory_is_timms(options, flat):
    """timm clips the global norm itself unless told not to, and adapts what is decayed. `flat`: as ZeRO hands tensors
    over, with padding behind."""
    generator = torch.Generator().manual_seed(0)
    start = drawn(generator) | {"zero": torch.zeros(SHAPES["zero"])}  # no norm: no trust ratio
    theirs = {n: nn.Parameter(p.clone()) for n, p in start.items()}
    groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in theirs.values()]
    timms = Lamb(groups, lr=0.02, betas=(0.9, 0.99), max_grad_norm=None, **options)
    ours = {n: torch.cat([p.flatten(), torch.full((3,), 7.0)]) if flat else p.clone() for n, p in start.items()}
    groups = [
        {"params": [p], "adapt": start[n].ndim > 1, "weight_decay": 0.1 * (start[n].ndim > 1)} for n, p in ours.items()
    ]
    optimizer = LAMB(groups, lr=0.02, betas=(0.9, 0.99), **options)
    for _ in range(12):
        gradients = drawn(generator)
        for n, gradient in gradients.items():
            theirs[n].grad = gradient.clone()
            ours[n].grad = torch.cat([gradient.flatten(), torch.zeros(3)]) if flat else gradient
        if flat:
            whole = optimizer.param_groups
            held = zip(ours.values(), whole, gradients.values(), strict=True)
            optimizer.prepare((p, group, gradient.flatten()) for p, group, gradient in held)
            for group in whole:  # as DeepSpeed calls it
                optimizer.param_groups = [group]
                optimizer.step()
            optimizer.param_groups = whole
        else:
            optimizer.step()
        timms.step()
        for n, p in theirs.items():
            mine = ours[n][: p.numel()].view(p.shape) if flat else ours[n]
            torch.testing.assert_close(mine, p.detach(), rtol=2e-6, atol=1e-7)
