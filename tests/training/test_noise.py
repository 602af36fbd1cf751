"""The gradient noise scale, on gradients of which it is known."""

import math

import pytest
import torch
from torch import nn

from selfsight.recipe import OptimizerConfig
from selfsight.training import noise, optim

BATCH = 64
SHAPES = ((20, 10), (30,), (4, 5))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb"])
@pytest.mark.parametrize("scale", [16.0, 256.0])
def test_it_is_that_of_the_gradients(name, scale):
    """g = G + noise of covariance Σ / B: B_simple = tr(Σ) / |G|², within a tenth after some hundred logged steps.

    Weights hardly move, so that the norms behind trust ratios stay what they are: the assumption that LARS makes.
    """
    generator = torch.Generator().manual_seed(0)
    true = [torch.randn(shape, generator=generator) for shape in SHAPES]
    squared = sum(g.square().sum().item() for g in true)
    sigma = math.sqrt(scale * squared / sum(g.numel() for g in true))  # tr(Σ) = scale·|G|²
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [
        {"params": [p], "names": [], "decay": False, "adapt": p.ndim > 1, "frozen": False, "weight_decay": 0.0}
        for p in weights
    ]
    optimizer = optim.build(OptimizerConfig(name=name), groups, fused=False)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    follow, found, rough = noise.NoiseScale(), [], []
    for step in range(400):
        for p, g in zip(weights, true, strict=True):
            p.grad = g + sigma / math.sqrt(BATCH) * torch.randn(g.shape, generator=generator)
        held = [(p, group, p.grad) for p, group in zip(weights, optimizer.param_groups, strict=True)]
        optimizer.prepare(held)
        power, signal = noise.measure(optimizer, held, step).tolist()
        optimizer.step()
        if power:
            record = {"grad_signal": signal, "grad_noise": BATCH * (power - signal)}
            found.append(follow.look(record))
            rough.append(record)
    assert len(found) == 399  # none before there is an average
    signal, spread = (sum(r[k] for r in rough) / len(rough) for k in ("grad_signal", "grad_noise"))
    assert signal == pytest.approx(squared, rel=0.05)
    assert spread == pytest.approx(scale * squared, rel=0.05)
    assert sum(found[20:]) / len(found[20:]) == pytest.approx(scale, rel=0.1)


def test_steps_that_tell_nothing_are_passed_over():
    follow = noise.NoiseScale()
    nothing = {"grad_signal": math.nan, "grad_noise": math.nan}
    assert math.isnan(follow.look(nothing))
    assert follow.look({"grad_signal": 2.0, "grad_noise": 600.0}) == pytest.approx(300.0)
    assert follow.look(nothing) == pytest.approx(300.0)
    assert math.isnan(follow.look({"grad_signal": -50.0, "grad_noise": 600.0}))  # the noise drowns the gradient
