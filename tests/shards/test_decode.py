"""Whatever the file's mode, what comes out is upright 8-bit RGB of the right colours; what is no image has a reason."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfsight.shards import DecodeError, decode_image, decode_pixels
from selfsight.shards import decode as decoding
from selfsight.shards.decode import MAX_PIXELS, UPRIGHT

RED = (200, 30, 40)
IMAGENET = Path(__file__).parents[3] / "shared/corpora/imagenet-sample-320.tar"


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


# decode_pixels: the same pixels by a shorter way. The comparisons are to the byte, or to the letter of the reason.


def photo(height: int = 97, width: int = 131) -> Image.Image:
    """Colours and edges enough that no two ways of upsampling or rounding would agree by chance."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([128 + 100 * np.sin(x / 9 + y / 17), 128 + 90 * np.cos(y / 7), x + y], axis=-1)
    return Image.fromarray((pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))


def outcome(decode, data: bytes) -> np.ndarray | str:
    try:
        return np.asarray(decode(data))
    except DecodeError as e:
        return str(e)


def assert_same(data: bytes) -> None:
    fast, rule = outcome(decode_pixels, data), outcome(decode_image, data)
    assert type(fast) is type(rule), (fast, rule)
    np.testing.assert_array_equal(fast, rule)


def forbid_pillow(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "decode_image", lambda data: pytest.fail("took the long way"))


JPEGS = {
    f"{name}{' progressive' if progressive else ''}": dict(options, progressive=progressive)
    for progressive in (False, True)
    for name, options in {
        "4:4:4": {"subsampling": 0},
        "4:2:2": {"subsampling": 1},
        "4:2:0": {"subsampling": 2},
        "4:1:1": {"subsampling": "4:1:1"},
        "restarts": {"restart_marker_rows": 1},
        "poor": {"quality": 5},
        "RGB": {"keep_rgb": True},
        "metadata": {"comment": b"hello", "dpi": (72, 72), "icc_profile": b"profile" * 20000},
    }.items()
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpegs_have_the_pixels_of_pillow(mode, options, monkeypatch):
    if mode == "L":
        options = {k: v for k, v in options.items() if k not in ("subsampling", "keep_rgb")}
    data = saved(photo().convert(mode), "JPEG", **options)
    want = np.asarray(decode_image(data))
    forbid_pillow(monkeypatch)
    pixels = decode_pixels(data)
    assert (pixels.shape, pixels.dtype) == ((97, 131, 3), np.uint8)
    np.testing.assert_array_equal(pixels, want)


def test_photographs_have_the_pixels_of_pillow():
    if not IMAGENET.exists():
        pytest.skip(f"no {IMAGENET}: the sample of ImageNet lies beside the checkout in some places only")
    with tarfile.open(IMAGENET) as tar:
        for member in list(tar)[::10]:
            assert_same(tar.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 65535])
def test_jpegs_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_same(saved(photo(), "JPEG", exif=exif))
    turned = decode_pixels(saved(photo(), "JPEG", exif=exif), short_side=40)
    assert turned.shape == ((66, 49, 3) if orientation in (5, 6, 7, 8) else (49, 66, 3))


def test_an_orientation_in_xmp_counts():
    data = saved(photo(), "JPEG", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>')
    assert decode_pixels(data).shape == np.asarray(decode_image(data)).shape
    assert_same(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_other_formats_go_by_the_rule(kind):
    assert_same(saved(photo(), kind))
    assert_same(saved(photo().convert("L"), kind))
    assert decode_pixels(saved(photo(), kind), short_side=10).shape == (97, 131, 3)


def test_odd_jpegs_go_by_the_rule():
    assert_same(saved(photo().convert("CMYK"), "JPEG"))
    assert_same(saved(photo(), "MPO", save_all=True, append_images=[photo(50, 60)]))
    data = saved(photo(), "JPEG")
    assert_same(data + b"more bytes after the end")
    assert_same(data[:2] + b"\xff" * 3 + data[2:])  # padding before a marker
    assert_same(data[:-2])  # no end of image


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_loses_no_jpeg():
    assert_same(saved(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff \x12\x01 garbage"))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused_or_whole_as_by_the_rule(progressive):
    data = saved(photo(48, 64), "JPEG", progressive=progressive)
    assert_same(data)
    for end in [*range(0, len(data) - 16, 5), *range(len(data) - 16, len(data))]:
        assert_same(data[:end])
    with pytest.raises(DecodeError, match=r"(?i)truncated"):
        decode_pixels(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_ends_as_by_the_rule(progressive):
    rng = np.random.default_rng(0)
    data = saved(photo(48, 64), "JPEG", progressive=progressive)
    for trial in range(600):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data) if trial % 2 else 700, 2):
            damaged[at] = rng.integers(0, 256)
        assert_same(bytes(damaged))


def test_garbage_is_refused():
    rng = np.random.default_rng(0)
    for start in (b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\x00\x10JFIF", b"\xff\xd8\xff\xc0\x00\x11\x08"):
        for length in (0, 1, 2, 5, 50, 5000):
            with pytest.raises(DecodeError):
                decode_pixels(start + rng.bytes(length))


def test_a_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    data = saved(photo(401, 600), "JPEG", quality=95)
    forbid_pillow(monkeypatch)
    sides = {short: decode_pixels(data, short).shape[:2] for short in (402, 401, 202, 201, 101, 51, 1)}
    assert sides == {
        402: (401, 600),
        401: (401, 600),
        202: (401, 600),
        201: (201, 300),
        101: (101, 150),
        51: (51, 75),
        1: (51, 75),
    }
    off = decode_pixels(data, 201).astype(int) - np.asarray(photo(401, 600).resize((300, 201), Image.Resampling.BOX))
    off = off[..., :2]  # the third channel is clipped, which does not commute with shrinking
    assert np.abs(off.mean((0, 1))).max() < 0.75
    assert np.abs(off).mean() < 6  # the grain, which every way of shrinking keeps a little differently


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    """A JPEG whose header says 65,000 × 65,000 and holds next to nothing."""
    data = saved(Image.new("L", (16, 16)), "JPEG")
    frame = data.index(b"\xff\xc0")
    bomb = data[: frame + 5] + b"\xfd\xe8\xfd\xe8" + data[frame + 9 :]
    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", lambda *a, **k: pytest.fail("decoded a bomb"))
    with pytest.raises(DecodeError, match=f"more than {MAX_PIXELS} pixels"):
        decode_pixels(bomb)
