"""The encoded images of a staged batch, decoded where training runs: by nvJPEG, through torchvision, on a GPU.

Into go the canvases that `Views.stage` filled, some with pixels, some with the bytes of a JPEG; out come canvases of
pixels on the device. JPEGs are decoded at their full size, and shrunk there to the size that `Views.decode` gives them.
On a CPU the same steps run with libjpeg-turbo. nvJPEG's colours differ a little from libjpeg's: it does not smooth the
chroma that it enlarges.
"""

from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from selfsight.errors import UserError
from selfsight.shards.corpus import key_of
from selfsight.shards.decode import DecodeError, decode_pixels
from selfsight.stream.views import CANVAS, ENCODED, EXTENT

NO_DECODER = "this torchvision decodes no JPEGs on the device: set stream.decode=cpu"


def decode(batch: dict[str, Tensor], device: torch.device, chunk: int = 64) -> dict[str, Tensor]:
    """A batch of `Views.staging_shapes(…, encoded=True)` in host memory → the same without "encoded", and with
    "canvas" uint8 (b, S, S, 3) of pixels on the device; those beyond an image are undefined.

    Waits for the decoder, but not for what else the device has to do. `chunk` images at a time, to bound the memory at
    full size. What the device refuses is decoded here. Raises UserError naming an image that is refused here, too.
    """
    canvas, lengths, sizes = batch[CANVAS], batch[ENCODED].tolist(), batch[EXTENT].tolist()
    coded = [i for i, length in enumerate(lengths) if length]
    side = _stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(side) if side else nullcontext():
        pixels = torch.empty(canvas.shape, dtype=torch.uint8, device=device)
        for i, length in enumerate(lengths):
            if not length:
                pixels[i].copy_(canvas[i], non_blocking=True)
        for at in range(0, len(coded), chunk):
            places = coded[at : at + chunk]
            if side:
                # torchvision decodes in a stream of its own that heeds no other: also into memory that was freed while
                # kernels that read it were still queued (pytorch/vision#9606). So that memory belongs to a stream of
                # ours, which is waited for; there is nothing in it but these copies, and no step of the training.
                side.synchronize()
            images = _images([canvas[i].view(-1)[: lengths[i]] for i in places], device)
            for i, image in zip(places, images, strict=True):
                if image is None:
                    key, part = key_of(int(batch["ordinal"][i])), int(batch["part"][i])
                    raise UserError(
                        f"sample {key} of corpus {part} decodes neither on the device nor here: set stream.decode=cpu, "
                        "which puts another in its place"
                    )
                height, width = sizes[i]
                pixels[i, :height, :width] = shrink(image, height, width).permute(1, 2, 0)
    if side:
        training = torch.cuda.current_stream(device)
        training.wait_stream(side)
        pixels.record_stream(training)
    return {name: tensor for name, tensor in batch.items() if name != ENCODED} | {CANVAS: pixels}


def shrink(image: Tensor, height: int, width: int) -> Tensor:
    """`image` uint8 (3, H, W) at another size, by the antialiased bicubic of `selfsight.stream.pixels.shrink`."""
    if image.shape[1:] == (height, width):
        return image
    small = interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    return small.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _images(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """RGB uint8 (3, H, W) on the device of each file, uint8 (bytes,) in host memory; None where that cannot be."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        return [*decode_jpeg(files, mode=ImageReadMode.RGB, device=device)]
    except ImportError as e:  # of a torchvision that has left this to torchcodec
        raise UserError(NO_DECODER) from e
    except RuntimeError as e:
        if "nvJPEG support" in str(e):  # of a build without it
            raise UserError(NO_DECODER) from e
        if len(files) > 1:  # it does not say which
            return [image for file in files for image in _images([file], device)]
    try:
        return [torch.from_numpy(decode_pixels(files[0].numpy().tobytes())).permute(2, 0, 1).to(device)]
    except DecodeError:
        return [None]


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
