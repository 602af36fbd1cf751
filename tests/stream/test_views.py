import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from selfsight.shards import decode_image
from selfsight.stream.views import Crop, Views, draw, draw_box, render
from selfsight.viewspec import CropSpec, NoiseSpec, ViewSpec

COLOUR = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2}
GLOBAL = CropSpec("global", 2, 32, (0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **COLOUR)
LOCAL = CropSpec("local", 3, 16, (0.05, 0.4), blur=(0.5,) * 3, **COLOUR)
SPEC = ViewSpec((GLOBAL, LOCAL), (NoiseSpec("mask", 12),))
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8))


def views(spec=SPEC, seed=3):
    return Views(spec, seed=seed, decode=decode_image)


def draws(spec, n, k=0, width=500, height=375):
    rng = np.random.default_rng(1)
    return [draw(spec, k, rng.random(64).tolist(), width, height) for _ in range(n)]


def assert_same(a, b, names=("global", "local", "mask")):
    for name in names:
        np.testing.assert_array_equal(a[name], b[name])


def test_shapes_and_types():
    out = views()(IMAGE, 7, 0)
    assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
        "global": ((2, 3, 32, 32), np.uint8),
        "local": ((3, 3, 16, 16), np.uint8),
        "mask": ((12,), np.float32),
    }
    assert out["mask"].min() >= 0
    assert out["mask"].max() < 1


def test_pixels_are_a_function_of_seed_sample_and_visit():
    first = views()(IMAGE, 7, 2)
    used = views()
    used(IMAGE, 1, 1)
    assert_same(used(IMAGE, 7, 2), first)
    for other in (views()(IMAGE, 7, 3), views()(IMAGE, 8, 2), views(seed=4)(IMAGE, 7, 2)):
        assert all(not np.array_equal(other[k], first[k]) for k in first)


def test_entries_draw_from_streams_of_their_own():
    first = views()(IMAGE, 7, 2)
    more = replace(LOCAL, count=5, blur=(0.5,) * 5)
    grown = views(ViewSpec((CropSpec("third", 1, 8, (0.2, 1.0)), more, GLOBAL)))(IMAGE, 7, 2)
    assert_same(grown, first, ["global"])
    np.testing.assert_array_equal(grown["local"][:3], first["local"])
    assert_same(views(ViewSpec((), SPEC.noise))(IMAGE, 7, 2), first, ["mask"])


def test_large_ordinals_and_seeds():
    v = views(seed=2**63 + 5)
    assert not np.array_equal(v(IMAGE, 2**40, 1)["mask"], v(IMAGE, 2**40 + 1, 1)["mask"])


@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize("solarize", [False, True])
@pytest.mark.parametrize("blur", [None, 1.37])
@pytest.mark.parametrize("box", [(3, 5, 40, 30), (0, 0, 60, 45), (10, 10, 17, 19)])
def test_render_equals_torchvision(box, blur, solarize, grayscale):
    order, factors = (2, 3, 0, 1), (1.2, 0.8, 1.15, -0.07)
    out = np.empty((3, 32, 32), dtype=np.uint8)
    render(IMAGE, Crop(box, 32, True, order, factors, grayscale, blur, solarize), out)
    left, top, right, bottom = box
    want = functional.resized_crop(IMAGE, top, left, bottom - top, right - left, [32, 32], InterpolationMode.BICUBIC)
    want = functional.hflip(want)
    for op in order:
        name = ("brightness", "contrast", "saturation", "hue")[op]
        want = getattr(functional, f"adjust_{name}")(want, factors[op])
    if grayscale:
        want = functional.to_grayscale(want, 3)
    if blur:
        want = want.filter(ImageFilter.GaussianBlur(blur))
    if solarize:
        want = ImageOps.solarize(want)
    np.testing.assert_array_equal(out, functional.pil_to_tensor(want).numpy())


def test_without_augmentation_the_crop_is_plain():
    spec = ViewSpec((CropSpec("crop", 1, 45, (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),))
    square = IMAGE.crop((0, 0, 45, 45))
    np.testing.assert_array_equal(views(spec)(square, 0, 0)["crop"][0], np.asarray(square).transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (60, 45), (32, 32), (1200, 300)])
def test_boxes_are_distributed_as_torchvisions(width, height):
    scale, ratio, n = (0.05, 0.4), (3 / 4, 4 / 3), 4000
    rng = np.random.default_rng(0)
    ours = np.array([draw_box(rng.random(40).tolist(), width, height, scale, ratio) for _ in range(n)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2] <= width).all()
    assert (ours[:, 3] <= height).all()
    torch.manual_seed(0)
    blank = Image.new("RGB", (width, height))
    ijhw = np.array([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(n)])
    theirs = np.stack([ijhw[:, 1], ijhw[:, 0], ijhw[:, 1] + ijhw[:, 3], ijhw[:, 0] + ijhw[:, 2]], axis=1)
    levels = np.linspace(0.05, 0.95, 10)
    for of in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] - b[:, 0], lambda b: b[:, 3] - b[:, 1]):
        spread = 0.06 * max(np.ptp(of(theirs)), 20)  # some 4 standard errors of a quantile of 4,000 draws
        np.testing.assert_allclose(np.quantile(of(ours), levels), np.quantile(of(theirs), levels), atol=spread)


@pytest.mark.parametrize(
    ("size", "box"), [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56)), ((12, 10), (0, 0, 12, 10))]
)
def test_boxes_that_never_fit_fall_back_to_the_centre(size, box):
    assert draw_box([0.5] * 40, *size, scale=(5.0, 5.0), ratio=(3 / 4, 4 / 3)) == box


def test_parameters_follow_the_published_distributions():
    crops = draws(GLOBAL, 6000)
    share = {
        "flip": np.mean([c.flip for c in crops]),
        "jitter": np.mean([bool(c.jitter_order) for c in crops]),
        "gray": np.mean([c.grayscale for c in crops]),
    }
    for name, want in {"flip": 0.5, "jitter": 0.8, "gray": 0.2}.items():
        assert share[name] == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / 6000)), name
    orders = [c.jitter_order for c in crops if c.jitter_order]
    assert len(set(orders)) == 24
    factors = np.array([c.jitter_factors for c in crops])
    np.testing.assert_allclose(factors.min(0), [0.6, 0.6, 0.8, -0.1], atol=0.005)
    np.testing.assert_allclose(factors.max(0), [1.4, 1.4, 1.2, 0.1], atol=0.005)
    np.testing.assert_allclose(factors.mean(0), [1, 1, 1, 0], atol=0.015)
    assert abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.06
    radii = np.array([c.blur_radius for c in crops])
    assert radii.min() == pytest.approx(0.1, abs=0.01)
    assert radii.max() == pytest.approx(2.0, abs=0.01)
    assert not any(c.solarize for c in crops)
    second = draws(GLOBAL, 6000, k=1)
    assert np.mean([c.blur_radius is not None for c in second]) == pytest.approx(0.1, abs=0.02)
    assert np.mean([c.solarize for c in second]) == pytest.approx(0.2, abs=0.025)


def test_operations_of_strength_zero_are_left_out():
    only_hue = replace(GLOBAL, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0)
    assert {c.jitter_order for c in draws(only_hue, 50)} == {(3,)}


def test_contradictions_in_a_spec_are_named():
    with pytest.raises(ValueError, match="names of views must differ"):
        views(ViewSpec((GLOBAL,), (NoiseSpec("global", 3),)))
    with pytest.raises(ValueError, match="blur needs one probability"):
        views(ViewSpec((replace(GLOBAL, blur=(0.5,)),)))
