import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import functional

from selfsight.stream import photometric

rng = np.random.default_rng(0)
IMAGES = [
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)),
    Image.fromarray(rng.integers(0, 40, (17, 53, 3), dtype=np.uint8)),
    Image.fromarray(np.indices((60, 80)).sum(0).astype(np.uint8)[..., None] // np.array([1, 2, 3], dtype=np.uint8)),
    Image.new("RGB", (5, 5), (255, 255, 255)),
]


@pytest.mark.parametrize("image", IMAGES, ids=["noise", "dark", "ramp", "white"])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_equals_torchvision_to_the_byte(name, image):
    ours, theirs = getattr(photometric, f"adjust_{name}"), getattr(functional, f"adjust_{name}")
    factors = [-0.5, -0.1, -0.03, 0.0, 0.07, 0.5] if name == "hue" else [0.0, 0.2, 0.6137, 1.0, 1.4, 1.93, 3.0]
    for factor in [*factors, *rng.uniform(-0.5 if name == "hue" else 0, 0.5, 10)]:
        np.testing.assert_array_equal(np.asarray(ours(image, factor)), np.asarray(theirs(image, factor)), str(factor))


def test_jitter_applies_the_operations_in_the_order_asked():
    image, factors = IMAGES[0], (1.3, 0.7, 1.1, 0.08)
    want = functional.adjust_contrast(functional.adjust_hue(image, 0.08), 0.7)
    got = photometric.jitter(image, factors, (photometric.HUE, photometric.CONTRAST))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_solarize_equals_pil():
    ramp = np.arange(256, dtype=np.uint8)[None]
    want = np.asarray(ImageOps.solarize(Image.fromarray(ramp), threshold=128))
    np.testing.assert_array_equal(photometric.solarize(ramp), want)
