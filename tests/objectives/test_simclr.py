"""SimCLR's loss against lightly's numbers and on cases worked by hand."""

import math

import pytest
import torch

from selfsight.objectives.simclr import nt_xent

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["ntxent_t0.5", "ntxent_t0.1"])
def test_nt_xent(golden, case, dtype):
    numbers = golden.load("lightly_contrastive", dtype)
    z_a, z_b = (z.requires_grad_() for z in numbers.inputs(case).values())
    loss, _ = nt_xent(z_a, z_b, numbers.hyper(case)["temperature"])
    loss.backward()
    numbers.check(case, "loss", loss)
    numbers.check(case, "grad_z0", z_a.grad)
    numbers.check(case, "grad_z1", z_b.grad)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_images_at_right_angles(temperature):
    """Each crop lies on its positive (cosine 1) and at right angles to the other 2B − 2 crops (cosine 0):
    −ln(e^{1/τ} / (e^{1/τ} + 2B − 2)) = ln(1 + (2B − 2)·e^{−1/τ}), whatever the lengths."""
    z = torch.eye(3, dtype=torch.float64)
    loss, accuracy = nt_xent(5 * z, 0.2 * z, temperature)
    assert loss.item() == pytest.approx(math.log(1 + 4 * math.exp(-1 / temperature)), rel=1e-12)
    assert accuracy == 1


def test_a_constant_output_cannot_tell_the_positive_among_all_others():
    z = torch.ones(4, 6)
    assert nt_xent(z, z, 0.1)[0].item() == pytest.approx(math.log(2 * 4 - 1), rel=1e-6)


def test_a_wrong_match_costs_the_more_the_lower_the_temperature():
    """Two images, each crop on the other image's: positives at cosine 0, one negative at 1 and one at 0."""
    z = torch.eye(2, dtype=torch.float64)
    for temperature in (0.1, 1.0):
        loss, accuracy = nt_xent(z, z.flip(0), temperature)
        assert loss.item() == pytest.approx(math.log(2 + math.exp(1 / temperature)), rel=1e-12)
        assert accuracy == 0
