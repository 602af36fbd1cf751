"""Label-free figures have their known values on features made for it, and agree with the papers' formulas in numpy."""

import math

import numpy as np
import pytest
import torch

from eval_probes.labelfree import alignment, alpha_req, lidar, linear_cka, neighbour_overlap, uniformity


def gaussian(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_alpha_is_that_of_a_spectrum_made_with_it():
    n, d = 400, 128
    left = torch.linalg.qr(gaussian(n, d) - gaussian(n, d).mean(dim=0))[0]
    right = torch.linalg.qr(gaussian(d, d, 1))[0]
    for alpha in (0.5, 1.0, 2.0):
        values = torch.arange(1, d + 1, dtype=torch.float64) ** (-alpha / 2)  # singular values: roots
        X = left.double() * values @ right.double().T
        assert alpha_req(X - X.mean(dim=0)) == pytest.approx(alpha, abs=0.02)  # centring moves the spectrum a little
    assert math.isnan(alpha_req(gaussian(50, 4)))


def test_lidar_counts_the_dimensions_that_tell_images_apart():
    images = torch.zeros(600, 16)
    images[:, :5] = gaussian(600, 5)  # five dimensions differ between images, all of them within one
    views = images[:, None] + 0.01 * gaussian(600 * 8, 16, 1).view(600, 8, 16)
    assert lidar(views, delta=1e-9) == pytest.approx(5, abs=0.2)
    X = views.double().numpy()
    mean = X.mean(axis=1)
    between = np.cov(mean.T)
    inside = (X - mean[:, None]).reshape(-1, 16)
    within = inside.T @ inside / (600 * 7) + 1e-4 * np.eye(16)
    values, vectors = np.linalg.eigh(within)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    p = np.linalg.eigvalsh(whiten @ between @ whiten)
    p = p / p.sum() + 1e-7
    assert lidar(views) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-6)


def test_uniformity_and_alignment():
    X = gaussian(500, 24)
    unit = torch.nn.functional.normalize(X, dim=1)
    distances = torch.pdist(unit).square()
    assert uniformity(X) == pytest.approx(float(torch.exp(-2 * distances).mean().log()), abs=1e-5)
    assert uniformity(torch.ones(10, 3)) == pytest.approx(0, abs=1e-5)
    # On a sphere of many dimensions pairs are orthogonal: the distance is √2 and the value −4.
    assert uniformity(gaussian(400, 4096)) == pytest.approx(-4, abs=0.05)
    assert alignment(X, 3 * X) == pytest.approx(0, abs=1e-6)
    assert alignment(X, -X) == pytest.approx(4, abs=1e-5)


def test_cka_knows_rotations_and_strangers():
    X = gaussian(1000, 20)
    rotation = torch.linalg.qr(gaussian(20, 20, 2))[0]
    assert linear_cka(X, 7 * X @ rotation + 3) == pytest.approx(1, abs=1e-6)
    assert linear_cka(X, gaussian(1000, 20, 3)) < 0.05
    K, L = X.double() @ X.double().T, (X @ rotation[:, :5]).double() @ (X @ rotation[:, :5]).double().T
    H = torch.eye(1000, dtype=torch.float64) - 1 / 1000
    hsic = [(H @ a @ H * b).sum() for a, b in ((K, L), (K, K), (L, L))]  # equation 1, by kernels
    assert linear_cka(X, X @ rotation[:, :5]) == pytest.approx(float(hsic[0] / (hsic[1] * hsic[2]).sqrt()), abs=1e-6)


def test_neighbours_overlap_where_features_agree():
    X = gaussian(300, 8)
    assert neighbour_overlap(X, 2 * X) == 1
    assert neighbour_overlap(X, gaussian(300, 8, 1), k=10) == pytest.approx(10 / 299, abs=0.02)
    twins = X.clone()
    twins[1] = twins[0]
    assert neighbour_overlap(twins, twins) == 1
