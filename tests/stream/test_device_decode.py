"""JPEGs that travel as they are and are decoded where training runs: the steps of a GPU, made on a CPU by libjpeg."""

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.errors import UserError
from selfsight.shards.decode import baseline_size
from selfsight.stream import device_decode, pixels
from selfsight.stream.loader import StepLoader, to_device
from selfsight.stream.mixture import Mixture, Part
from selfsight.stream.quarantine import Quarantine
from selfsight.stream.views import Jpeg, Views
from selfsight.viewspec import STD, CropSpec, NoiseSpec, ViewSpec

CPU = torch.device("cpu")
SPEC = ViewSpec((CropSpec("crop", 2, 64, (0.25, 1.0)),), (NoiseSpec("mask", 4),))  # shorter side 128, canvas 192
UPRIGHT, TURNED = Image.Exif(), Image.Exif()
UPRIGHT[0x0112], TURNED[0x0112] = 1, 6


def saved(pixels, kind="JPEG", mode="RGB", **options):
    Image.fromarray(pixels).convert(mode).save(file := BytesIO(), kind, **{"quality": 90, **options})
    return file.getvalue()


def scene(scenes, height, width):
    return np.asarray(Image.fromarray(scenes[0]).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def encoded(scenes):
    """Those that a device is given: as they are, shrunk to the canvas, decoded at a half of their size here."""
    small = scene(scenes, 110, 150)
    return {
        "small": saved(small),
        "grey": saved(small, mode="L"),
        "full chroma": saved(small, subsampling=0),
        "with an orientation": saved(small, exif=UPRIGHT),
        "larger than the canvas": saved(scene(scenes, 180, 240)),
        "of twice the canvas": saved(scene(scenes, 340, 260)),
    }


@pytest.fixture(scope="module")
def kept(scenes):
    """Those that are decoded here."""
    small = scene(scenes, 110, 150)
    return {
        "progressive": saved(small, progressive=True),
        "cmyk": saved(small, mode="CMYK"),
        "rgb": saved(small, keep_rgb=True),
        "turned": saved(small, exif=TURNED),
        "png": saved(small, "PNG"),
        "gigantic": saved(scene(scenes, 100, 800)),
        "of more bytes than the canvas": saved(small) + b"\0" * 3 * 192**2 + b"\xff\xd9",
    }


def batch_of(files, *, encoded, views=None, pinned=False):
    views = views or Views(SPEC, seed=5)
    shapes = views.staging_shapes(len(files), encoded=encoded)
    out = {n: np.full(shape, 99, dtype) for n, (shape, dtype) in shapes.items()}
    for i, data in enumerate(files):
        views.stage(views.decode_later(data) if encoded else views.decode(data), i, 1, out, i)
    batch = {n: torch.from_numpy(a) for n, a in out.items()}
    batch |= {"ordinal": torch.arange(len(files)), "part": torch.zeros(len(files), dtype=torch.int64)}
    return {n: t.pin_memory() for n, t in batch.items()} if pinned else batch


def assert_same_images(got, want, mean, most):
    """All but the pixels are equal; those of each image lie within so many levels of 255."""
    assert got.keys() == want.keys()
    for name in want.keys() - {"canvas"}:
        assert torch.equal(got[name], want[name]), name
    for i, (height, width) in enumerate(want["extent"].tolist()):
        a, b = (x["canvas"][i, :height, :width].cpu().float() for x in (got, want))
        assert (a - b).abs().mean() <= mean
        assert (a - b).abs().max() <= most


def test_which_images_a_device_is_given(encoded, kept):
    views = Views(SPEC, seed=5)
    for data in encoded.values():
        later = views.decode_later(data)
        assert isinstance(later, Jpeg)
        assert later.data == data
        assert later.shape == views.decode(data).shape[:2]
    for data in kept.values():
        np.testing.assert_array_equal(views.decode_later(data), views.decode(data))
    own = Views(SPEC, seed=5, decode=lambda data: Image.open(BytesIO(data)))
    assert isinstance(own.decode_later(encoded["small"]), np.ndarray)


def test_a_jpeg_without_its_end_is_none_to_be_given(encoded):
    data = encoded["small"]
    assert baseline_size(data) == (110, 150)
    for cut in range(0, len(data), 97):
        assert baseline_size(data[:cut]) is None


def test_decodes_to_what_is_decoded_here(encoded, kept):
    """To the bit where nothing is shrunk. A shrunk image differs in its roundings; at a half of its size libjpeg
    averages squares of pixels where this path resamples, which shows at edges."""
    same = [data for name, data in encoded.items() if "canvas" not in name] + list(kept.values())
    for files, bounds in (
        (same, (0, 0)),
        ([encoded["larger than the canvas"]], (0.1, 1)),
        ([encoded["of twice the canvas"]], (1.5, 64)),
    ):
        got = device_decode.decode(batch_of(files, encoded=True), CPU)
        assert_same_images(got, batch_of(files, encoded=False), *bounds)


def test_chunks_change_nothing(encoded, kept):
    files = [*encoded.values(), *kept.values()]
    whole = device_decode.decode(batch_of(files, encoded=True), CPU)
    assert_same_images(device_decode.decode(batch_of(files, encoded=True), CPU, chunk=2), whole, 0, 0)


def test_shrinks_as_the_cpu_does(scenes):
    """To the rounding of a whole level."""
    for image, size in ((scenes[0], (96, 128)), (scenes[1], (192, 128)), (scenes[1], (10, 7)), (scenes[2], (64, 64))):
        want = np.empty((*size, 3), np.uint8)
        pixels.shrink(image, want)
        got = device_decode.shrink(torch.from_numpy(image).permute(2, 0, 1), *size).permute(1, 2, 0).numpy()
        assert np.abs(got.astype(int) - want).max() <= 1


def test_what_the_device_does_not_decode_is_decoded_here(encoded, monkeypatch):
    import torchvision

    decode_jpeg = torchvision.io.decode_jpeg

    def particular(files, **options):
        if any(len(file) == len(encoded["grey"]) for file in files):
            raise RuntimeError("Error while decoding JPEG images")
        return decode_jpeg(files, **options)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", particular)
    files = [encoded["small"], encoded["grey"], encoded["full chroma"]]
    got = device_decode.decode(batch_of(files, encoded=True), CPU)
    assert_same_images(got, batch_of(files, encoded=False), 0, 0)


def test_a_torchvision_without_nvjpeg_is_said_to_be_one(encoded, monkeypatch):
    import torchvision

    def lacking(*_, **__):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", lacking)
    with pytest.raises(UserError, match=r"set stream.decode=cpu$"):
        device_decode.decode(batch_of([encoded["small"]], encoded=True), CPU)


def test_what_nothing_decodes_is_named(encoded):
    table = encoded["small"].index(b"\xff\xc4") + 5  # how many Huffman codes there are of each length: too many
    damaged = encoded["small"][:table] + b"\xff" * 16 + encoded["small"][table + 16 :]
    with pytest.raises(UserError, match=r"^sample 0+1 of corpus 0 decodes neither on the device nor here: set "):
        device_decode.decode(batch_of([encoded["small"], damaged], encoded=True), CPU)


class Photos:
    """A corpus of JPEGs in memory."""

    def __init__(self, images, files, cut=()):
        self._of, self.files, self.cut = images([4] * 10), files, cut
        self.path, self.is_far, self.chunks, self.n, self.id = "corpus", False, self._of.chunks, 40, "0" * 64
        self.whereabouts = self._of.whereabouts

    def sample(self, ordinal):
        data = self.files[ordinal % len(self.files)]
        return SimpleNamespace(data=data[:900] if ordinal in self.cut else data)


def steps_of(corpus, **more):
    mixture = Mixture([Part(corpus)], batch_size=8, lanes=4, window=2, seed=1)
    return list(StepLoader(mixture, Views(SPEC, seed=1), total_steps=5, accumulation=2, **more))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_encoded_batches_shows_the_same_crops(images, encoded, kept, workers):
    """And one that has a damaged image puts the same other in its place."""
    corpus = Photos(images, [data for n, data in encoded.items() if "canvas" not in n] + list(kept.values()), cut=(7,))
    lists = [Quarantine(limit=1), Quarantine(limit=1)]
    got = steps_of(corpus, encoded=True, workers=workers, quarantine=lists[0])
    want = steps_of(corpus, staged=True, workers=workers, quarantine=lists[1])
    assert len(lists[0]) == len(lists[1]) == 1
    assert sum(int((batch["encoded"] > 0).sum()) for step in got for batch in step) > 10
    for step, other in zip(got, want, strict=True):
        for batch, made in zip(step, other, strict=True):
            a, b = to_device(batch, "cpu", SPEC), to_device(made, "cpu", SPEC)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu(encoded, kept):
    """nvJPEG repeats the chroma that it enlarges: where libjpeg does so, these images move by 2 levels on average;
    twice that may be. Work that is queued keeps its memory: torchvision's decoder would write over what was freed."""
    files = [*encoded.values(), *kept.values()] * 20
    want = batch_of(files, encoded=False)
    batch = batch_of(files, encoded=True, pinned=True)
    large = torch.rand(4096, 4096, device="cuda")
    freed = [torch.ones(3, 110, 150, dtype=torch.uint8, device="cuda") for _ in range(1000)]
    torch.cuda.synchronize()
    for _ in range(50):
        large = large @ large / 2048
    sums = [x.sum() for x in freed]
    del freed
    got = device_decode.decode(batch, torch.device("cuda", torch.cuda.current_device()))
    assert got["canvas"].is_cuda
    assert_same_images(got, want, mean=4, most=255)
    assert all(int(x) == 3 * 110 * 150 for x in sums)
    made, here = to_device(batch, "cuda", SPEC), to_device(want, "cpu", SPEC)
    assert ((made["crop"].cpu() - here["crop"]).abs() * 255 * torch.tensor(STD).view(3, 1, 1)).mean() < 4
