"""The other side of benchmarks/stream.py: each library as its documentation says, with the papers' transforms.

A function (job, images, corpus, work, batch, cores) returns the work of one epoch over all images, which is how many
came out. `images` is a folder of classes, `corpus` ours, whose shards are WebDataset's; `work` is where a library may
keep its own format. Worker processes live on from epoch to epoch, so that starting them is not measured.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness import Absent
from benchmarks.jobs import Transform, torchvision_transform
from selfsight.viewspec import MEAN, STD

Work = Callable[[], int]


@contextmanager
def installed(package: str) -> Iterator[None]:
    """Absent where the import inside fails."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as e:
        missing = isinstance(e, ModuleNotFoundError) and e.name == package
        raise Absent("not installed" if missing else f"does not import: {str(e).splitlines()[0][:120]}") from None


def rgb(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


class Decoded:
    """Image bytes → what `transform` makes of the image."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, data: bytes) -> Any:
        return self.transform(rgb(data))


def counted(batches: Iterable) -> Work:
    """How many images came out of `batches`: of tensors, of lists of tensors (crops), or with a label beside."""

    def size(batch: Any) -> int:
        return size(batch[0]) if isinstance(batch, (list, tuple)) else len(batch)

    return lambda: sum(size(batch) for batch in batches)


def loader(dataset: Any, batch: int, cores: int, **more: Any) -> Iterable:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=batch, num_workers=cores, persistent_workers=True, **more)


def webdataset(
    job: str, images: Path, corpus: Path, work: Path, batch: int, cores: int, *, uint8: bool = False
) -> Work:
    with installed("webdataset"):
        import webdataset as wds

    shards = [str(p) for p in sorted((corpus / "shards").glob("*.tar"))]
    dataset = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pilrgb").to_tuple("jpg")
    dataset = dataset.map_tuple(torchvision_transform(job, normalise=not uint8))
    return counted(loader(dataset, batch, cores))


def image_folder(job: str, images: Path, corpus: Path, work: Path, batch: int, cores: int) -> Work:
    from torchvision.datasets import ImageFolder

    return counted(loader(ImageFolder(str(images), torchvision_transform(job)), batch, cores, shuffle=True))


def litdata(job: str, images: Path, corpus: Path, work: Path, batch: int, cores: int) -> Work:
    with installed("litdata"):
        import litdata as ld

    folder = work / "litdata"
    if not folder.exists():
        files = [str(p) for p in sorted(images.rglob("*.jpg"))]
        ld.optimize(_read, files, output_dir=str(folder), chunk_bytes="16MB", num_workers=1, verbose=False)

    # Its workers may be spawned: what they take along has to be picklable.
    transform = Decoded(torchvision_transform(job))
    dataset = ld.StreamingDataset(str(folder), shuffle=True, drop_last=False, transform=transform)
    return counted(ld.StreamingDataLoader(dataset, batch_size=batch, num_workers=cores, persistent_workers=True))


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def mosaic(job: str, images: Path, corpus: Path, work: Path, batch: int, cores: int) -> Work:
    with installed("streaming"):
        import streaming

    streaming.base.util.clean_stale_shared_memory()
    folder = work / "mds"
    if not folder.exists():
        with streaming.MDSWriter(out=str(folder), columns={"image": "bytes"}) as out:
            for path in sorted(images.rglob("*.jpg")):
                out.write({"image": path.read_bytes()})

    class Images(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return transform(super().__getitem__(at)["image"])

    transform = Decoded(torchvision_transform(job))
    return counted(loader(Images(local=str(folder), shuffle=True, batch_size=batch), batch, cores))


def spdl(job: str, images: Path, corpus: Path, work: Path, batch: int, cores: int) -> Work:
    """Threads and FFmpeg, which also resizes where no random crop is asked for."""
    with installed("spdl"):
        import spdl.io
        from spdl.pipeline import PipelineBuilder

        files = [str(p) for p in sorted(images.rglob("*.jpg"))]
        spdl.io.load_image(files[0])  # finds FFmpeg or raises
    import random

    import torch
    from torch.utils.data import default_collate

    centre = "scale=w='if(lt(iw,ih),256,-2)':h='if(lt(iw,ih),-2,256)':flags=bicubic,crop=224:224,format=pix_fmts=rgb24"
    transform = torchvision_transform(job)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))

    def make(path: str) -> Any:
        if job == "resize":
            frame = spdl.io.to_torch(spdl.io.load_image(path, filter_desc=centre))
            return frame.permute(2, 0, 1).float().div_(255).sub_(mean).div_(std)
        return transform(Image.fromarray(spdl.io.to_numpy(spdl.io.load_image(path))))

    def epoch() -> int:
        builder = PipelineBuilder().add_source(random.sample(files, len(files))).pipe(make, concurrency=cores)
        pipeline = builder.aggregate(batch).pipe(default_collate).add_sink(2).build(num_threads=cores)
        with pipeline.auto_stop():
            return counted(pipeline.get_iterator())()

    torch.set_num_threads(1)
    return epoch


def dali(job: str, images: Path, corpus: Path, work: Path, batch: int, cores: int) -> Work:
    """DALI's CPU operators. Its blur and hue are its own; it has no solarise, which is written out."""
    with installed("nvidia"):
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.base_iterator import LastBatchPolicy
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

    def chance(p: float) -> Any:
        return fn.random.coin_flip(probability=p, dtype=types.BOOL)

    def between(low: float, high: float) -> Any:
        return fn.random.uniform(range=(low, high))

    end = {"dtype": types.FLOAT, "mean": [255 * m for m in MEAN], "std": [255 * s for s in STD]}
    resized = {"interp_type": types.INTERP_CUBIC, "antialias": True}

    def crop(image: Any, size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
        view = fn.random_resized_crop(
            image, size=size, random_area=scale, random_aspect_ratio=(3 / 4, 4 / 3), **resized
        )
        if chance(0.8):
            strengths = {"brightness": between(0.6, 1.4), "contrast": between(0.6, 1.4)}
            view = fn.color_twist(view, saturation=between(0.8, 1.2), hue=between(-36.0, 36.0), **strengths)
        if chance(0.2):
            view = fn.hsv(view, saturation=0.0)
        if chance(blur):
            view = fn.gaussian_blur(view, sigma=between(0.1, 2.0))
        if solarize > 0 and chance(solarize):
            view = fn.cast(view + (view >= 128) * (255 - 2 * fn.cast(view, dtype=types.INT16)), dtype=types.UINT8)
        return fn.crop_mirror_normalize(view, mirror=fn.random.coin_flip(), **end)

    @pipeline_def(batch_size=batch, num_threads=cores, device_id=None, seed=0, enable_conditionals=True)
    def pipeline() -> Any:
        data, _ = fn.readers.file(file_root=str(images), random_shuffle=True, name="reader")
        image = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        if job == "resize":
            view = fn.resize(image, resize_shorter=256, **resized)
            return fn.crop_mirror_normalize(view, crop=(224, 224), **end)
        if job == "mae":
            view = fn.random_resized_crop(image, size=224, random_area=(0.2, 1.0), **resized)
            return fn.crop_mirror_normalize(view, mirror=fn.random.coin_flip(), **end)
        views = [crop(image, 224, (0.4, 1.0), 1.0, 0.0), crop(image, 224, (0.4, 1.0), 0.1, 0.2)]
        return (*views, *(crop(image, 96, (0.05, 0.4), 0.5, 0.0) for _ in range(8)))

    names = [f"view{i}" for i in range(10 if job == "dino" else 1)]
    policy = {"last_batch_policy": LastBatchPolicy.PARTIAL, "auto_reset": True}
    batches = DALIGenericIterator(pipeline(), names, reader_name="reader", **policy)
    return lambda: sum(len(part["view0"]) for step in batches for part in step)


def ffcv(job: str, images: Path, corpus: Path, work: Path, batch: int, cores: int) -> Work:
    """FFCV's own format with JPEGs of quality 90, decoded and cropped by its own code, in compiled threads."""
    with installed("ffcv"):
        from ffcv.fields import RGBImageField
        from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
        from ffcv.writer import DatasetWriter
    import numpy as np

    if job == "dino":
        raise Absent("makes one view per image, without blur and hue")
    file = work / "ffcv.beton"
    if not file.exists():
        field = RGBImageField(write_mode="jpg", jpeg_quality=90)
        DatasetWriter(str(file), {"image": field}, num_workers=1).from_indexed_dataset(_Pictures(images))
    crop = (
        [CenterCropRGBImageDecoder((224, 224), ratio=224 / 256)]
        if job == "resize"
        else [RandomResizedCropRGBImageDecoder((224, 224), scale=(0.2, 1.0)), RandomHorizontalFlip()]
    )
    mean, std = (255 * np.array(x) for x in (MEAN, STD))
    steps = [*crop, NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]
    more = {"num_workers": cores, "order": OrderOption.RANDOM, "drop_last": False, "pipelines": {"image": steps}}
    return counted(Loader(str(file), batch_size=batch, **more))


class _Pictures:
    def __init__(self, images: Path) -> None:
        self.paths = sorted(images.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Image.Image]:
        return (rgb(self.paths[i].read_bytes()),)


PEERS: dict[str, Callable[..., Work]] = {
    "webdataset + torchvision": webdataset,
    "webdataset + torchvision, left in uint8": partial(webdataset, uint8=True),
    "ImageFolder + torchvision": image_folder,
    "litData + torchvision": litdata,
    "MosaicML streaming + torchvision": mosaic,
    "SPDL + torchvision": spdl,
    "DALI (CPU)": dali,
    "FFCV": ffcv,
}
PACKAGES = ("torchvision", "pillow", "simplejpeg", "webdataset", "litdata", "mosaicml-streaming", "spdl", "ffcv")
