"""The device's crops, made on a CPU: against torchvision, and against those that `selfsight.stream.pixels` makes."""

import shutil

import numpy as np
import pytest
import torch

from selfsight.stream import device
from selfsight.stream.draw import SIGMA
from selfsight.stream.views import Views
from selfsight.viewspec import MEAN, STD, CropSpec, NoiseSpec, ViewSpec

COLOUR = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2}
SPEC = ViewSpec(
    (
        CropSpec("global", 2, 96, (0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **COLOUR),
        CropSpec("local", 4, 48, (0.05, 0.4), blur=(0.5,) * 4, **COLOUR),
    ),
    (NoiseSpec("mask", 7),),
)
PLAIN = ViewSpec((CropSpec("crop", 1, 64, (0.2, 1.0)),))
BILINEAR = ViewSpec((CropSpec("crop", 1, 64, (0.2, 1.0), interpolation="bilinear"),))
SMALL = ViewSpec((CropSpec("crop", 2, 16, (0.3, 1.0), blur=(0.5, 0.5), solarize=(0.5, 0.5), **COLOUR),))


def both(spec, images):
    """(staged tensors, the crops that the CPU makes of the same images)."""
    views = Views(spec, seed=5, canvas=512)
    staged = {n: np.full(shape, 99, dtype) for n, (shape, dtype) in views.staging_shapes(len(images)).items()}
    made = {n: np.empty(shape, dtype) for n, (shape, dtype) in views.shapes(len(images)).items()}
    for i, image in enumerate(images):
        views.stage(image, i, 1, staged, i)
        views.into(image, i, 1, made, i)
    return {n: torch.from_numpy(a) for n, a in staged.items()}, made


def levels(crops):
    """Normalised crops (count, B, 3, size, size) back on the scale of 0–255."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    return 255 * (crops.cpu().double() * std + mean).numpy()


@pytest.mark.parametrize("spec", [SPEC, PLAIN, BILINEAR], ids=["dino", "mae", "bilinear"])
def test_agrees_with_the_crops_of_the_cpu(scenes, spec):
    """Which are rounded to whole levels: half a level, and a hundredth for the two ways of adding up."""
    staged, made = both(spec, scenes)
    out = device.render(spec, staged)
    for crops in spec.crops:
        assert out[crops.name].shape == made[crops.name].shape
        assert out[crops.name].dtype == torch.float32
        assert out[crops.name].is_contiguous()
        assert np.abs(levels(out[crops.name]) - made[crops.name]).max() < 0.51


def test_agrees_with_torchvision(scenes, torchvision_crop):
    staged, _ = both(SPEC, scenes)
    out = device.render(SPEC, staged)
    for crops in SPEC.crops:
        ours = levels(out[crops.name])
        for i, image in enumerate(scenes):
            for k, row in enumerate(staged[crops.name][i].numpy()):
                off = np.abs(ours[k, i] - torchvision_crop(image, row, crops.size))
                # Hue is steep where a pixel is nearly grey: there the last digit of float32 shows.
                assert np.quantile(off, 0.9995) < 0.02
                assert off.max() < 0.5


def test_agrees_with_the_cpu_on_photographs(photographs):
    views = Views(SPEC, seed=5)
    images = [views.decode(data) for data in photographs]
    staged, made = both(SPEC, images)
    out = device.render(SPEC, staged, chunk=3)
    for crops in SPEC.crops:
        off = np.abs(levels(out[crops.name]) - made[crops.name])
        assert off.max() < 1.01
        assert (off > 0.51).mean() < 1e-4


def test_bfloat16(scenes):
    """8 bits of mantissa in weights, products and results: on average half a level, nowhere as much as eight."""
    staged, made = both(SPEC, scenes)
    out = device.render(SPEC, staged, dtype=torch.bfloat16)
    for crops in SPEC.crops:
        assert out[crops.name].dtype == torch.bfloat16
        off = np.abs(levels(out[crops.name]) - made[crops.name])
        assert off.mean() < 0.5
        assert np.quantile(off, 0.99) < 2.5
        assert off.max() < 8


def test_chunks_change_nothing(scenes):
    staged, _ = both(SPEC, scenes)
    whole, parts = device.render(SPEC, staged), device.render(SPEC, staged, chunk=3)
    for crops in SPEC.crops:
        torch.testing.assert_close(parts[crops.name], whole[crops.name], atol=1e-4, rtol=0)


def test_noise_and_normalisation_are_passed_on(scenes):
    staged, made = both(SPEC, scenes)
    out = device.render(SPEC, staged, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_array_equal(out["mask"], made["mask"])
    assert -1 <= out["global"].min() < -0.9
    assert 0.9 < out["global"].max() <= 1
    assert set(out) == {"global", "local", "mask"}


def test_the_pixels_beyond_an_image_have_no_part_in_it(scenes):
    staged, _ = both(SPEC, scenes)
    soiled = {name: tensor.clone() for name, tensor in staged.items()}
    for i, (height, width) in enumerate(staged["extent"].tolist()):
        soiled["canvas"][i, height:] = 255
        soiled["canvas"][i, :, width:] = 255
    a, b = device.render(SPEC, staged), device.render(SPEC, soiled)
    assert torch.equal(a["global"], b["global"])


def test_crops_without_blur_are_left_as_they_are(scenes):
    staged, _ = both(SMALL, scenes)
    sharp = torch.rand(4, 2, 3, 16, 16) * 255
    sigma = staged["crop"][..., SIGMA]
    out = device.gaussian_blur(sharp, sigma, 13, torch.bfloat16)
    assert torch.equal(out[sigma == 0], sharp[sigma == 0])
    assert not torch.equal(out[sigma > 0], sharp[sigma > 0])


def test_autocast_changes_nothing(scenes):
    staged, _ = both(SMALL, scenes)
    plain = device.render(SMALL, staged)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(device.render(SMALL, staged)["crop"], plain["crop"])


def test_traces_into_one_graph(scenes):
    staged, _ = both(SMALL, scenes)
    traced = torch.compile(device.render, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(SMALL, staged)["crop"], device.render(SMALL, staged)["crop"])


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiles(scenes):
    staged, _ = both(PLAIN, scenes)
    compiled = torch.compile(device.render, fullgraph=True)
    torch.testing.assert_close(compiled(PLAIN, staged)["crop"], device.render(PLAIN, staged)["crop"], atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(scenes, compiled):
    staged, made = both(SPEC, scenes)
    render = torch.compile(device.render, fullgraph=True) if compiled else device.render
    there = {name: tensor.cuda() for name, tensor in staged.items()}
    torch.cuda.set_sync_debug_mode("error" if not compiled else "default")
    try:
        exact, short = render(SPEC, there), render(SPEC, there, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for crops in SPEC.crops:
        assert np.abs(levels(exact[crops.name]) - made[crops.name]).max() < 1.01
        assert np.abs(levels(short[crops.name]) - made[crops.name]).mean() < 0.5
