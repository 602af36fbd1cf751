"""Which images are shown, and what their patches look like."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from eval_probes.report import pictures
from selfsight import encoders
from selfsight.recipe import EncoderConfig


def test_images_are_spread_over_the_classes():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 40 + [3])
    chosen = pictures.choose(len(labels), labels, 8)
    assert sorted(labels[chosen[:4]]) == [0, 1, 2, 3]
    assert sorted(labels[chosen[4:7]]) == [0, 1, 2]
    assert len(set(chosen.tolist())) == 8


@pytest.mark.parametrize("labels", [None, np.zeros(3, dtype=np.int64)])
def test_no_more_images_than_there_are(labels):
    assert sorted(pictures.choose(3, labels, 8)) == [0, 1, 2]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb"])
def test_patch_maps_are_finer_than_the_training_grid(name):
    config = EncoderConfig(name, 16, args={"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3})
    torch.manual_seed(0)
    encoder = encoders.build(config, drop_path=False).eval()
    images = [Image.effect_mandelbrot((30, 20), (-2, -1.5, 1, 1.5), 60).convert("RGB")] * 2
    maps = pictures.patch_maps(encoder, images, img_size=16)
    assert maps.size == 64
    assert maps.patches.shape == (2, 16, 16, 24)
    assert maps.attention is not None
    assert maps.attention.shape == (2, 3, 16, 16)
    np.testing.assert_allclose(maps.attention.sum(axis=(2, 3)), 1, rtol=1e-5)
    np.testing.assert_array_equal(maps.patches[0], maps.patches[1])
    # The class token's own row of the attention, patches only, in the image's order.
    pixels = pictures.normalised(pictures.square(images[0], 64))[None]
    expected = encoder.last_attention(pixels)[0, 1, 0, encoder.num_prefix :].detach().reshape(16, 16)
    np.testing.assert_allclose(maps.attention[0, 1], expected / expected.sum(), rtol=1e-5)


def test_principal_colours_find_the_directions_that_vary():
    generator = np.random.default_rng(0)
    patches = generator.normal(0, 1e-3, (2, 6, 6, 10)).astype(np.float32)
    patches[0, :, :3, 4] += 10  # left half of the first image
    colours, shown = pictures.principal_colours(patches)
    assert colours.shape == (2, 6, 6, 3)
    assert shown > 0.99
    assert (colours[0, :, :3, 0] > 250).all()
    assert (colours[0, :, 3:, 0] < 5).all()
    assert (colours[1, :, :, 0] < 5).all()


def test_colours_of_identical_or_thin_features():
    colours, shown = pictures.principal_colours(np.ones((1, 2, 2, 2), dtype=np.float32))
    assert colours.shape == (1, 2, 2, 3)
    assert shown == 0


def test_thumbnail_is_square_and_never_enlarged():
    for size, expected in (((400, 300), 112), ((40, 30), 30)):
        held = base64.b64decode(pictures.thumbnail(Image.new("RGB", size, "red")).partition(",")[2])
        assert Image.open(io.BytesIO(held)).size == (expected, expected)


def test_heat_rises_in_lightness():
    shown = np.asarray(pictures.heat(np.linspace(0, 1, 64).reshape(8, 8)).convert("L"), dtype=int).ravel()
    assert (np.diff(shown) >= 0).all()
    assert shown[-1] - shown[0] > 200
