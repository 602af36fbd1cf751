"""VICReg's three terms against lightly's and solo-learn's numbers, whose weightings differ, and by hand."""

import pytest
import torch

from selfsight.objectives.vicreg import covariance, variance, vicreg_terms

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lightlys_mean_of_the_variance_terms(golden, dtype):
    """lightly (and the official code) takes the mean of v(Z) and v(Z') where the paper adds them: hence the half."""
    numbers = golden.load("lightly_redundancy", dtype)
    hyper = numbers.hyper("vicreg")
    z_a, z_b = (z.requires_grad_() for z in numbers.inputs("vicreg").values())
    s, v, c = vicreg_terms(z_a, z_b)
    loss = hyper["lambda_param"] * s + hyper["mu_param"] * 0.5 * v + hyper["nu_param"] * c
    loss.backward()
    numbers.check("vicreg", "loss", loss)
    numbers.check("vicreg", "grad_z_a", z_a.grad)
    numbers.check("vicreg", "grad_z_b", z_b.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_so_many_losses(golden, dtype):
    """(batch, tokens, dim): the statistics are those of each place in the sequence, the loss is the mean over them."""
    numbers = golden.load("lightly_redundancy", dtype)
    z_a, z_b = (z.requires_grad_() for z in numbers.inputs("vicreg_3d").values())
    terms = [torch.stack(vicreg_terms(z_a[:, i], z_b[:, i])) for i in range(z_a.shape[1])]
    s, v, c = torch.stack(terms).mean(dim=0)
    loss = 25 * s + 25 * 0.5 * v + c
    loss.backward()
    numbers.check("vicreg_3d", "loss", loss)
    numbers.check("vicreg_3d", "grad_z_a", z_a.grad)
    numbers.check("vicreg_3d", "grad_z_b", z_b.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_solo_learns_sum_of_the_variance_terms(golden, dtype):
    numbers = golden.load("solo_losses", dtype)
    hyper = numbers.hyper("vicreg")
    z_a, z_b = (z.requires_grad_() for z in numbers.inputs("vicreg").values())
    s, v, c = vicreg_terms(z_a, z_b)
    loss = hyper["sim_loss_weight"] * s + hyper["var_loss_weight"] * v + hyper["cov_loss_weight"] * c
    loss.backward()
    numbers.check("vicreg", "loss", loss)
    numbers.check("vicreg", "grad_z1", z_a.grad)
    numbers.check("vicreg", "grad_z2", z_b.grad)


def test_the_objective_weights_the_terms_as_equation_6_does(harness):
    vicreg = harness.small("vicreg")
    batch = harness.make_exact(vicreg, 6)
    outcome = vicreg(batch, harness.START)
    s, v, c = (outcome.metrics[k] for k in ("invariance", "variance", "covariance"))
    torch.testing.assert_close(outcome.loss.detach(), 25 * s + 25 * v + c)


def test_variance_is_a_hinge_on_the_standard_deviation():
    """Column 1: ±2, unbiased variance 8, beyond γ: 0. Column 2: ±0.3, variance 0.18. Column 3: constant."""
    z = torch.tensor([[2.0, 0.3, 7.0], [-2.0, -0.3, 7.0]], dtype=torch.float64)
    assert variance(z).item() == pytest.approx((0 + (1 - 0.1801**0.5) + (1 - 0.01)) / 3, rel=1e-12)


def test_covariance_counts_both_triangles_over_the_dimensions():
    """Columns x, x and a third at right angles to them: C_12 = C_21 = Σ x² / (N − 1) = 4/3, so (2·16/9) / 3."""
    z = torch.tensor([[1, 1, 1], [1, 1, -1], [-1, -1, 1], [-1, -1, -1]], dtype=torch.float64)
    assert covariance(z).item() == pytest.approx(2 * (4 / 3) ** 2 / 3, rel=1e-12)
    assert covariance(z + 100).item() == pytest.approx(2 * (4 / 3) ** 2 / 3, rel=1e-12)


def test_equal_embeddings_have_no_invariance_loss_and_others_the_mean_square():
    z = torch.randn(5, 4, dtype=torch.float64)
    assert vicreg_terms(z, z).invariance == 0
    assert vicreg_terms(z, z + 3).invariance.item() == pytest.approx(9)
