"""Colour operations on 8-bit RGB PIL images, equal to the byte to torchvision's functional ones on PIL images.

They are written out because on images of 32 pixels torchvision and PIL.ImageEnhance spend most of their time around the
pixels; the arithmetic is PIL's own in both.
"""

import numpy as np
from PIL import Image, ImageFilter

# The four operations of torchvision.transforms.ColorJitter in its numbering; it applies them in a random order.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blends with black; factor 1 changes nothing."""
    return Image.blend(Image.new("RGB", image.size), image, factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the rounded mean of the grey image."""
    grey = np.frombuffer(image.convert("L").tobytes(), dtype=np.uint8)
    mean = int(int(grey.sum(dtype=np.int64)) / grey.size + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the grey image."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def adjust_hue(image: Image.Image, factor: float) -> Image.Image:
    """Turns the hue by `factor` of a full circle, in [-0.5, 0.5]. PIL keeps hue in 256 levels, which wrap."""
    hsv = image.convert("HSV")
    pixels = np.frombuffer(bytearray(hsv.tobytes()), dtype=np.uint8)
    pixels[::3] += np.uint8(int(factor * 255) % 256)
    return Image.frombuffer("HSV", image.size, pixels, "raw", "HSV", 0, 1).convert("RGB")


def jitter(image: Image.Image, factors: tuple[float, float, float, float], order: tuple[int, ...]) -> Image.Image:
    """Colour jitter: the operations named in `order`, one after the other, each with its factor."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for operation in order:
        image = operations[operation](image, factors[operation])
    return image


def gaussian_blur(image: Image.Image, radius: float) -> Image.Image:
    """PIL's approximation by extended box filters, as DINO uses it; `radius` is the standard deviation in pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def solarize(pixels: np.ndarray) -> np.ndarray:
    """Inverts the values from 128 on, of a uint8 array: a value is less than its inverse below 128 only."""
    return np.minimum(pixels, ~pixels)
