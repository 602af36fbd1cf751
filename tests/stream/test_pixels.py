"""The CPU's crops against torchvision's functions on float tensors, to the level of 255."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from selfsight.shards import decode_pixels
from selfsight.stream import pixels
from selfsight.stream.draw import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FACTORS,
    FLIP,
    GRAYSCALE,
    HUE,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
)
from selfsight.stream.views import Views
from selfsight.viewspec import CropSpec, ViewSpec

COLOUR = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2}


def params(box, order=(), factors=(1, 1, 1, 0), flip=False, grayscale=False, sigma=0.0, solarize=False):
    """One row of parameters."""
    row = np.zeros(COLUMNS, np.float32)
    row[:4], row[FLIP], row[GRAYSCALE], row[SIGMA], row[SOLARIZE] = box, flip, grayscale, sigma, solarize
    row[ORDER : ORDER + 4] = (*order, *(-1,) * (4 - len(order)))
    row[FACTORS : FACTORS + 4] = factors
    return row


def rendered(image, row, size, taps=13, interpolation="bicubic"):
    out = np.empty((1, 1, 3, size, size), np.uint8)
    pixels.render(image, row[None], taps, interpolation == "bilinear", out, 0)
    return out[0, 0]


def assert_rounded(levels, want, share=2e-4):
    """Levels are `want` rounded: never more than 1 off, and off by 1 for at most `share` of them, where float32's last
    digits decide a tie or, for solarised ones, the side of the threshold."""
    off = np.abs(levels.astype(np.float64) - want)
    assert off.max() < 0.51 + 0.5 * (share > 0)
    assert (off > 0.505).mean() <= share


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [16, 96, 224, 7])
def test_resampling(scenes, torchvision_crop, size, flip, interpolation):
    for image in scenes:
        height, width = image.shape[:2]
        for box in [
            (0, 0, width, height),
            (3, 5, 40, 30),
            (width - 31, height - 57, 31, 57),
            (10, 10, 7, 9),
            (1, 0, 1, height),
            (0, 1, width, 1),
        ]:
            row = params(box, flip=flip)
            want = torchvision_crop(image, row, size, interpolation=interpolation)
            assert_rounded(rendered(image, row, size, interpolation=interpolation), want)


def test_a_crop_of_its_own_size_is_a_copy(scenes):
    out = rendered(scenes[0], params((20, 30, 64, 64)), 64)
    np.testing.assert_array_equal(out, scenes[0][30:94, 20:84].transpose(2, 0, 1))


@pytest.mark.parametrize("op", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
@pytest.mark.parametrize("scene", range(4))
def test_one_colour_operation(scenes, torchvision_crop, op, scene):
    for factor in (-0.5, -0.1, -0.03, 0.0, 0.07, 0.5) if op == HUE else (0.0, 0.2, 0.6137, 1.0, 1.4, 1.93):
        factors = [1.0, 1.0, 1.0, 0.0]
        factors[op] = factor
        row = params((5, 6, 50, 50), (op,), factors)
        assert_rounded(rendered(scenes[scene], row, 48), torchvision_crop(scenes[scene], row, 48))


def test_hue_of_grey_and_pure_colours():
    levels = np.array([0, 1, 127, 128, 254, 255], np.uint8)
    image = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(12, 18, 3)
    image = np.ascontiguousarray(np.pad(image, ((0, 6), (0, 0), (0, 0))))
    tensor = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    for turn in (-0.5, -1 / 3, 0.1, 1 / 6, 0.5):
        want = 255 * functional.adjust_hue(tensor, turn).numpy()
        assert_rounded(rendered(image, params((0, 0, 18, 18), (HUE,), (1, 1, 1, turn)), 18), want, share=0.01)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_all_orders_of_colour_jitter(scenes, torchvision_crop, order):
    row = params((30, 40, 200, 150), order, (1.3, 0.7, 1.2, -0.08), flip=True)
    assert_rounded(rendered(scenes[0], row, 96), torchvision_crop(scenes[0], row, 96))


@pytest.mark.parametrize("taps", [1, 3, 9, 13, 23])
@pytest.mark.parametrize("sigma", [0.1, 0.35, 1.0, 1.37, 2.0, 5.0])
def test_blur(scenes, torchvision_crop, sigma, taps):
    for image, size in ((scenes[0], 96), (scenes[2], 12)):
        row = params((3, 5, 60, 50), sigma=sigma)
        if taps // 2 < size:
            assert_rounded(rendered(image, row, size, taps), torchvision_crop(image, row, size, taps))


@pytest.mark.parametrize("solarize", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 1.2])
@pytest.mark.parametrize("grayscale", [False, True])
def test_everything_together(scenes, torchvision_crop, grayscale, sigma, solarize):
    for image in scenes:
        row = params((2, 3, 60, 55), (2, 3, 0, 1), (1.2, 0.8, 1.15, -0.07), True, grayscale, sigma, solarize)
        assert_rounded(rendered(image, row, 64), torchvision_crop(image, row, 64))


def test_every_level_is_solarised_as_pil_does_it():
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    want = functional.solarize(torch.from_numpy(ramp).permute(2, 0, 1), 128)
    np.testing.assert_array_equal(rendered(ramp, params((0, 0, 16, 16), solarize=True), 16), want)


def test_dinos_crops_of_photographs(photographs, torchvision_crop):
    spec = ViewSpec(
        (
            CropSpec("global", 2, 224, (0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **COLOUR),
            CropSpec("local", 4, 96, (0.05, 0.4), blur=(0.5,) * 4, **COLOUR),
        )
    )
    views = Views(spec, seed=0, canvas=2048)
    staged = {name: np.empty(shape, dtype) for name, (shape, dtype) in views.staging_shapes(1).items()}
    for ordinal, data in enumerate(photographs):
        image = decode_pixels(data)
        got = views(image, ordinal, 0)
        views.stage(image, ordinal, 0, staged, 0)
        for crops in spec.crops:
            for k in range(crops.count):
                assert_rounded(got[crops.name][k], torchvision_crop(image, staged[crops.name][0, k], crops.size))


@pytest.mark.parametrize("size", [(30, 40), (1, 90), (64, 64), (7, 3)])
def test_shrinking_a_whole_image(scenes, size):
    out = np.empty((*size, 3), np.uint8)
    pixels.shrink(scenes[1], out)
    want = functional.resize(
        torch.from_numpy(scenes[1]).permute(2, 0, 1).double(),
        list(size),
        interpolation=functional.InterpolationMode.BICUBIC,
        antialias=True,
    )
    assert_rounded(out.transpose(2, 0, 1), want.clamp(0, 255).numpy())
