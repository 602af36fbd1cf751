"""Whatever the file's mode, what comes out is upright 8-bit RGB of the right colours; what is no image has a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from selfsight.shards import DecodeError, decode_image
from selfsight.shards.decode import MAX_PIXELS, UPRIGHT

RED = (200, 30, 40)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def close(image: Image.Image, colour: tuple[int, int, int], tolerance: int = 12) -> bool:
    assert image.mode == "RGB"
    return bool((np.abs(np.asarray(image).astype(int) - np.array(colour)) <= tolerance).all())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_formats(kind):
    assert close(decode_image(saved(Image.new("RGB", (20, 10), RED), kind)), RED)


def test_cmyk():
    cyan = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    assert close(decode_image(cyan), (0, 255, 255))


def test_palette():
    assert close(decode_image(saved(Image.new("RGB", (8, 8), RED).quantize(4), "PNG")), RED)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_on_white(mode):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    data = saved(clear.quantize(2) if mode == "P" else clear.convert(mode), "PNG")
    assert close(decode_image(data), (255, 255, 255), 0)


def test_transparent_colour_of_an_opaque_mode():
    data = saved(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)
    assert close(decode_image(data), (255, 255, 255), 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_is_scaled_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    out = np.asarray(decode_image(saved(Image.fromarray(ramp), kind)))
    assert (out == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all()


def test_float_tiff():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    out = np.asarray(decode_image(saved(Image.fromarray(ramp), "TIFF")))
    assert (out == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8))
    undo = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    turn = UPRIGHT.get(orientation)
    stored = upright.transpose(undo.get(turn, turn)) if turn is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = decode_image(saved(stored, "PNG", exif=exif))
    assert (np.asarray(out) == np.asarray(upright)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_loses_no_image():
    data = saved(Image.new("RGB", (16, 16), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert close(decode_image(data), RED)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, (0, 200, 0), (0, 0, 200))]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert close(decode_image(data), RED)


def test_reasons():
    jpeg = saved(Image.effect_noise((64, 64), 60), "JPEG")
    for data, reason in [
        (b"", "empty file"),
        (b"hello, world", "not an image"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (saved(Image.effect_noise((64, 64), 60), "PNG")[:500], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ]:
        with pytest.raises(DecodeError, match=reason):
            decode_image(data)


def test_a_decompression_bomb_is_refused_by_its_header():
    side = int(MAX_PIXELS**0.5) + 1
    bomb = saved(Image.new("1", (side, side)), "PNG")
    assert len(bomb) < 200_000
    with pytest.raises(DecodeError, match="pixels"):
        decode_image(bomb)
