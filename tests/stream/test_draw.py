"""The parameters of crops: numpy's Philox to the bit, torchvision's distributions by Kolmogorov and Smirnov."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop

from selfsight.stream import draw
from selfsight.stream.draw import COLUMNS, FACTORS, FLIP, GRAYSCALE, ORDER, SIGMA, SOLARIZE
from selfsight.viewspec import CropSpec

COLOUR = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2}
GLOBAL = CropSpec("global", 2, 224, (0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **COLOUR)
KEY = np.array([2**63 + 5, 12345678901234567890], dtype=np.uint64)


def numpys(ordinal, visit):
    counter = np.array([0, 0, ordinal, visit], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=KEY, counter=counter))


def drawn(spec, n, width=500, height=375):
    """(n, count, COLUMNS): the parameters for the first n samples."""
    rows, rules = np.empty((n, spec.count, COLUMNS), np.float32), draw.rules(spec)
    for ordinal in range(n):
        draw.draw_crops(rules, KEY, ordinal, 0, width, height, rows[ordinal])
    return rows


def assert_same_distribution(a, b, alpha=1e-4):
    """Two-sample Kolmogorov–Smirnov test; with `alpha`, one in ten thousand right generators would fail it."""
    at = np.sort(np.concatenate([a, b]))
    distance = np.abs(
        np.searchsorted(np.sort(a), at, side="right") / len(a) - np.searchsorted(np.sort(b), at, side="right") / len(b)
    ).max()
    assert distance < math.sqrt(-math.log(alpha / 2) / 2 * (1 / len(a) + 1 / len(b)))


@pytest.mark.parametrize(("ordinal", "visit"), [(0, 0), (7, 2), (2**40, 3), (2**62 + 1, 2**33)])
@pytest.mark.parametrize("length", [1, 8, 13, 196])
def test_noise_is_numpys_philox(ordinal, visit, length):
    out = np.empty(length, np.float32)
    draw.uniform(KEY, ordinal, visit, out)
    np.testing.assert_array_equal(out, numpys(ordinal, visit).random(length, dtype=np.float32))


def test_parameters_are_functions_of_numpys_philox():
    """Sixteen blocks of four numbers for each crop: ten tries of a box, then eleven numbers, of which some are seen."""
    rows = drawn(GLOBAL, 400)
    orders = tuple(permutations(range(4)))
    for ordinal, crops in enumerate(rows):
        for row, u in zip(crops, numpys(ordinal, 0).random((2, 64)), strict=True):
            flip, jitter, brightness, _, _, hue, order, gray, _, sigma, _ = u[40:51]
            assert row[FLIP] == (flip < 0.5)
            assert row[GRAYSCALE] == (gray < 0.2)
            assert tuple(row[ORDER : ORDER + 4]) == (orders[int(order * 24)] if jitter < 0.8 else (-1,) * 4)
            np.testing.assert_allclose(row[FACTORS], 0.6 + 0.8 * brightness, rtol=1e-6)
            np.testing.assert_allclose(row[FACTORS + 3], -0.1 + 0.2 * hue, atol=1e-8)
            assert row[SIGMA] in (0, np.float32(0.1 + 1.9 * sigma))


def test_a_further_crop_changes_none_before_it():
    more = replace(GLOBAL, count=5, blur=(1.0, 0.1, 1, 1, 1), solarize=(0.0, 0.2, 0, 0, 0))
    np.testing.assert_array_equal(drawn(more, 50)[:, :2], drawn(GLOBAL, 50))


@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (60, 45), (32, 32), (1200, 300)])
def test_boxes_are_distributed_as_torchvisions(width, height, scale):
    n = 4000
    plain = replace(GLOBAL, count=1, blur=(), solarize=(), scale=scale)
    ours = drawn(plain, n, width, height)[:, 0, :4].astype(np.float64)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()
    torch.manual_seed(0)
    blank = Image.new("RGB", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    for ours_column, theirs_column in zip(range(4), (1, 0, 3, 2), strict=True):
        assert_same_distribution(ours[:, ours_column], theirs[:, theirs_column])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 3] / theirs[:, 2])


@pytest.mark.parametrize("size", [(100, 10), (10, 100), (12, 10), (1, 1), (1, 5000)])
def test_boxes_that_never_fit_fall_back_to_the_centre(size):
    """Where only a box larger than the image would do, torchvision takes the largest centred one of a fair aspect."""
    never = draw.rules(replace(GLOBAL, count=1, blur=(), solarize=()))
    never[:, :2] = 5.0
    row = np.empty((1, COLUMNS), np.float32)
    draw.draw_crops(never, KEY, 0, 0, *size, row)
    top, left, height, width = RandomResizedCrop.get_params(Image.new("RGB", size), [5.0, 5.0], [3 / 4, 4 / 3])
    assert row[0, :4].tolist() == [left, top, max(width, 1), max(height, 1)]


def test_colour_jitter_is_distributed_as_torchvisions():
    n = 6000
    ours = drawn(GLOBAL, n)[:, 0]
    torch.manual_seed(0)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    theirs = [ColorJitter.get_params(*ranges) for _ in range(n)]
    for op in range(4):
        assert_same_distribution(ours[:, FACTORS + op], np.array([t[1 + op] for t in theirs]))
    assert abs(np.corrcoef(ours[:, FACTORS : FACTORS + 4].T) - np.eye(4)).max() < 4 / math.sqrt(n)
    applied = ours[ours[:, ORDER] >= 0][:, ORDER : ORDER + 4]
    codes, counts = np.unique(applied @ [64, 16, 4, 1], return_counts=True)
    assert len(codes) == 24
    assert abs(counts / len(applied) - 1 / 24).max() < 4.5 * math.sqrt(1 / 24 / len(applied))


def test_probabilities():
    n = 6000
    first, second = drawn(GLOBAL, n).transpose(1, 0, 2)
    for seen, want in [
        (first[:, FLIP], 0.5),
        (first[:, ORDER] >= 0, 0.8),
        (first[:, GRAYSCALE], 0.2),
        (second[:, SIGMA] > 0, 0.1),
        (second[:, SOLARIZE], 0.2),
    ]:
        assert np.mean(seen) == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / n))
    assert not first[:, SOLARIZE].any()
    assert_same_distribution(first[:, SIGMA], np.random.default_rng(0).uniform(0.1, 2.0, n))


def test_operations_of_strength_zero_are_left_out():
    rows = drawn(replace(GLOBAL, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0), 50)
    orders = rows[..., ORDER : ORDER + 4]
    assert set(orders.reshape(-1).tolist()) == {-1, 3}
    assert ((orders == 3).sum(-1) == 1).all()
