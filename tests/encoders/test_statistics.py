"""Rank and spread on features whose values are known."""

import math

import pytest
import torch

from selfsight.encoders import feature_spread, rankme


def test_rankme_of_equal_singular_values_is_their_number():
    q = torch.linalg.qr(torch.randn(64, 16, dtype=torch.float64)).Q
    assert rankme(q).item() == pytest.approx(16, rel=1e-4)


def test_rankme_of_one_direction_is_one():
    assert rankme(torch.outer(torch.randn(50), torch.randn(8))).item() == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(4, 3)).item() == pytest.approx(1, abs=1e-3)


def test_rankme_is_the_papers_formula():
    features = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(features).item() == pytest.approx(math.exp(entropy), rel=1e-5)
    assert rankme(7 * features).item() == pytest.approx(rankme(features).item())


def test_spread_is_one_everywhere_and_zero_in_collapse():
    generator = torch.Generator().manual_seed(0)
    assert feature_spread(torch.randn(20000, 32, generator=generator)).item() == pytest.approx(1, abs=0.01)
    assert feature_spread(torch.ones(100, 32)).item() == pytest.approx(0, abs=1e-6)
    lengths = torch.rand(100, 1, generator=generator) + 0.5
    assert feature_spread(lengths * torch.ones(100, 32)).item() == pytest.approx(0, abs=1e-6)  # direction, not length
    assert feature_spread(torch.randn(1, 32)).item() == 0


def test_low_precision_and_shapes():
    features = torch.randn(40, 8)
    assert rankme(features.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="should be"):
        rankme(torch.randn(2, 3, 4))
