"""Barlow Twins' loss against lightly's and solo-learn's numbers and by hand."""

import pytest
import torch

from selfsight.objectives.barlow_twins import barlow_twins_loss, cross_correlation

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("file", "case", "names"),
    [("lightly_redundancy", "barlow_0.005", ("z_a", "z_b")), ("solo_losses", "barlow", ("z1", "z2"))],
)
def test_loss(golden, file, case, names, dtype):
    """solo-learn multiplies the whole loss by 0.025, which the paper does not: AdamW does not see it."""
    numbers = golden.load(file, dtype)
    hyper = numbers.hyper(case)
    z_a, z_b = (z.requires_grad_() for z in numbers.inputs(case).values())
    weight = hyper.get("lambda_param", hyper.get("lamb"))
    loss = hyper.get("scale_loss", 1.0) * barlow_twins_loss(cross_correlation(z_a, z_b), weight)
    loss.backward()
    numbers.check(case, "loss", loss)
    numbers.check(case, f"grad_{names[0]}", z_a.grad)
    numbers.check(case, f"grad_{names[1]}", z_b.grad)


SQUARE = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)  # two columns at right angles


def test_correlations_of_equal_and_of_opposite_embeddings():
    """The identity and its negative, but for the 1e-5 beside the variance of 1; shift and scale do not count."""
    identity = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(cross_correlation(SQUARE, SQUARE), identity / (1 + 1e-5))
    torch.testing.assert_close(cross_correlation(SQUARE, -100 * SQUARE + 7), -identity, atol=1e-5, rtol=0)


def test_loss_of_correlations():
    """The identity scores 0, its negative 2² for each dimension, all ones λ for each of D·(D − 1) others."""
    identity, ones = torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    assert barlow_twins_loss(identity, 0.005) == 0
    assert barlow_twins_loss(-identity, 0.005).item() == pytest.approx(12)
    assert barlow_twins_loss(ones, 0.005).item() == pytest.approx(6 * 0.005)


def test_a_dimension_that_says_the_same_as_another_is_what_lambda_weighs():
    z = SQUARE[:, [0, 0]]
    assert barlow_twins_loss(cross_correlation(z, z), 0.005).item() == pytest.approx(2 * 0.005, rel=1e-4)
