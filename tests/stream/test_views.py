import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from selfsight.errors import UserError
from selfsight.shards import DecodeError, decode_image, decode_pixels
from selfsight.stream import draw
from selfsight.stream.views import Views
from selfsight.viewspec import CropSpec, NoiseSpec, ViewSpec

COLOUR = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2}
GLOBAL = CropSpec("global", 2, 32, (0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **COLOUR)
LOCAL = CropSpec("local", 3, 16, (0.05, 0.4), blur=(0.5,) * 3, **COLOUR)
SPEC = ViewSpec((GLOBAL, LOCAL), (NoiseSpec("mask", 12),))
IMAGE = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)


def views(spec=SPEC, seed=3, **more):
    return Views(spec, seed=seed, **more)


def assert_same(a, b, names=("global", "local", "mask")):
    for name in names:
        np.testing.assert_array_equal(a[name], b[name])


def filled(shapes, fill=77):
    return {name: np.full(shape, fill, dtype) for name, (shape, dtype) in shapes.items()}


def jpeg(height, width):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 120 * np.sin(x / 40), 127 + 120 * np.cos(y / 30), (x + y) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


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


def test_threads_make_the_same_pixels():
    v = views()
    alone = [v(IMAGE, ordinal, 0) for ordinal in range(64)]
    out = filled(v.shapes(64))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: v.into(IMAGE, i, 0, out, i), range(64)))
    for i, want in enumerate(alone):
        assert_same({"global": out["global"][:, i], "local": out["local"][:, i], "mask": out["mask"][i]}, want)


def test_entries_draw_from_streams_of_their_own():
    first = views()(IMAGE, 7, 2)
    more = replace(LOCAL, count=5, blur=(0.5,) * 5)
    grown = views(ViewSpec((CropSpec("third", 1, 8, (0.2, 1.0)), more, GLOBAL)))(IMAGE, 7, 2)
    assert_same(grown, first, ["global"])
    np.testing.assert_array_equal(grown["local"][:3], first["local"])
    assert_same(views(ViewSpec((), SPEC.noise))(IMAGE, 7, 2), first, ["mask"])


def test_crops_like_others_have_their_boxes_and_flips():
    plain = CropSpec("global", 2, 32, (0.4, 1.0))
    larger = CropSpec("gram", 2, 32, (0.4, 1.0), like="global")
    out = views(ViewSpec((plain, larger)))(IMAGE, 7, 2)
    np.testing.assert_array_equal(out["gram"], out["global"])
    distorted = views(ViewSpec((GLOBAL, larger)))(IMAGE, 7, 2)
    np.testing.assert_array_equal(distorted["gram"], out["gram"])
    with pytest.raises(ValueError, match="none of that name"):
        views(ViewSpec((larger,)))


def test_large_ordinals_and_seeds():
    v = views(seed=2**63 + 5)
    assert not np.array_equal(v(IMAGE, 2**40, 1)["mask"], v(IMAGE, 2**40 + 1, 1)["mask"])


def test_only_the_place_that_is_asked_for_is_written():
    v = views()
    out = filled(v.shapes(3))
    v.into(IMAGE, 7, 2, out, 1)
    assert_same({"global": out["global"][:, 1], "local": out["local"][:, 1], "mask": out["mask"][1]}, v(IMAGE, 7, 2))
    for place in (0, 2):
        assert (out["global"][:, place] == 77).all()
        assert (out["mask"][place] == 77).all()


def test_pixels_that_cannot_be_written_or_lie_otherwise_are_the_same():
    frozen = IMAGE.copy()
    frozen.flags.writeable = False
    for image in (frozen, np.asfortranarray(IMAGE), Image.fromarray(IMAGE)):
        assert_same(views()(image, 7, 2), views()(IMAGE, 7, 2))  # pyright: ignore[reportArgumentType]


def test_without_augmentation_the_crop_is_plain():
    spec = ViewSpec((CropSpec("crop", 1, 45, (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),))
    square = np.ascontiguousarray(IMAGE[:, :45])
    np.testing.assert_array_equal(views(spec)(square, 0, 0)["crop"][0], square.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_the_smallest_images_have_views(size):
    image = np.full((*size, 3), 200, np.uint8)
    plain = ViewSpec((CropSpec("crop", 4, 32, (0.05, 1.0)),))
    assert (views(plain)(image, 0, 0)["crop"] == 200).all()
    views()(image, 0, 0)


def test_decoding_is_as_fine_as_the_crops_need():
    spec = ViewSpec((CropSpec("crop", 1, 64, (0.25, 1.0)),))  # 64 / √0.25 = 128
    v = views(spec)
    assert (v.short_side, v.canvas) == (128, 192)
    assert v.decode(jpeg(100, 130)).shape == (100, 130, 3)  # small enough
    assert v.decode(jpeg(250, 190)).shape == (192, 146, 3)  # its half would be too small: shrunk to the canvas
    assert v.decode(jpeg(256, 280)).shape == (128, 140, 3)  # its half will do
    assert v.decode(jpeg(1100, 1300)).shape == (138, 163, 3)  # its eighth
    assert v.decode(jpeg(60, 1900)).shape == (6, 192, 3)
    assert views(spec, canvas=100).decode(jpeg(256, 280)).shape == (91, 100, 3)


def test_what_is_decoded_small_is_the_image():
    v = views(ViewSpec((CropSpec("crop", 1, 64, (0.25, 1.0)),)))
    for data in (jpeg(280, 256), jpeg(250, 190), jpeg(1000, 1300)):
        small = v.decode(data)
        want = decode_image(data).resize((small.shape[1], small.shape[0]), Image.Resampling.BOX)
        assert np.abs(small.astype(int) - np.asarray(want))[2:-2, 2:-2, :2].mean() < 3


def test_a_reader_of_ones_own():
    assert views(decode=lambda _: Image.new("RGB", (200, 100))).canvas == 128
    assert views(decode=lambda _: Image.new("RGB", (200, 100))).decode(b"").shape == (64, 128, 3)
    assert views(decode=decode_image).decode(jpeg(30, 40)).shape == (30, 40, 3)
    with pytest.raises(DecodeError):
        views().decode(b"no image")


def test_staged_images_and_parameters():
    v = views()
    assert {k: (shape, np.dtype(dtype)) for k, (shape, dtype) in v.staging_shapes(5).items()} == {
        "canvas": ((5, 128, 128, 3), np.uint8),
        "extent": ((5, 2), np.int32),
        "global": ((5, 2, draw.COLUMNS), np.float32),
        "local": ((5, 3, draw.COLUMNS), np.float32),
        "mask": ((5, 12), np.float32),
    }
    out = filled(v.staging_shapes(5))
    v.stage(IMAGE, 7, 2, out, 3)
    np.testing.assert_array_equal(out["canvas"][3, :45, :60], IMAGE)
    assert not out["canvas"][3, 45:].any()
    assert not out["canvas"][3, :, 60:].any()
    assert out["extent"][3].tolist() == [45, 60]
    assert (out["canvas"][2] == 77).all()
    np.testing.assert_array_equal(out["mask"][3], v(IMAGE, 7, 2)["mask"])


def test_contradictions_in_a_spec_are_named():
    with pytest.raises(ValueError, match="names of views must differ"):
        views(ViewSpec((GLOBAL,), (NoiseSpec("global", 3),)))
    for taken in ("canvas", "part"):
        with pytest.raises(ValueError, match=taken):
            views(ViewSpec((), (NoiseSpec(taken, 3),)))
    with pytest.raises(ValueError, match="blur needs one probability"):
        views(ViewSpec((replace(GLOBAL, blur=(0.5,)),)))
    with pytest.raises(UserError, match="blur_taps of the global crops is 4"):
        replace(GLOBAL, blur_taps=4)
    with pytest.raises(UserError, match="cannot be 'nearest'"):
        replace(GLOBAL, interpolation="nearest")
    with pytest.raises(UserError, match="turn their blur off"):
        replace(GLOBAL, size=6)
    with pytest.raises(UserError, match="blur_sigma of the global crops"):
        replace(GLOBAL, blur_sigma=(2.0, 1.0))


def test_a_photograph_is_decoded_once_and_whole(photographs):
    """ImageNet's usual size is what DINO's local crops need: 96 / √0.05 = 430 pixels of canvas 512."""
    v = views(ViewSpec((replace(GLOBAL, size=224), replace(LOCAL, size=96))))
    assert (v.short_side, v.canvas) == (430, 512)
    for data in photographs:
        whole = decode_pixels(data)
        if max(whole.shape) <= 512:
            np.testing.assert_array_equal(v.decode(data), whole)
