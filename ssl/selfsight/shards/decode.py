"""Image bytes → 8-bit RGB, one rule for every reader of a corpus: first frame, upright, alpha on white, 16 bit scaled.

`decode_image` is that rule, by Pillow. `decode_pixels` gives the same pixels as an array and takes a shorter way with
plain JPEGs: libjpeg-turbo outside the GIL, at a half, a quarter or an eighth of the size where that is enough. What
either would crash or guess on ends in one exception type, `DecodeError`, with a reason short enough for a list.
`baseline_size` finds the JPEGs that a decoder which knows nothing of this rule reads by it all the same.
"""

from io import BytesIO
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

# Formats that identify themselves by their first bytes and decode in-process (EPS, say, would start Ghostscript).
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "WEBP": "webp",
    "BMP": "bmp",
    "DIB": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "AVIF": "avif",
    "QOI": "qoi",
}
# Pillow's own limit for refusing a decompression bomb: 178,956,970 pixels, half a gigabyte as RGB.
MAX_PIXELS = 2 * (1024 * 1024 * 1024 // 4 // 3)

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """These bytes are no image that can be decoded; the message is the reason."""


def decode_image(data: bytes) -> Image.Image:
    """The image in `data` as RGB, 8 bit: first frame, EXIF orientation applied, alpha composited on white.

    CMYK and palettes are converted, 16-bit channels scaled by 1/257, floats from their own range. Raises DecodeError.
    """
    image = open_image(data)
    load(image)
    return to_rgb(image)


def decode_pixels(data: bytes, short_side: int | None = None) -> np.ndarray:
    """The image in `data` by the rule of `decode_image`, as uint8 (height, width, 3). Raises DecodeError.

    With `short_side` a plain JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and 1 of its size whose shorter side is
    not below it; every other image keeps its size.
    """
    frame = _plain_jpeg(data)
    if frame is None:
        return np.array(decode_image(data))
    if frame.width * frame.height > MAX_PIXELS:
        raise DecodeError(f"more than {MAX_PIXELS} pixels")
    height, width = scaled_size(frame.height, frame.width, short_side)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:  # it is strict with damage that Pillow can mend: Pillow decides
        return np.array(decode_image(data))
    return _upright(pixels, orientation(open_image(data))) if frame.may_be_turned else pixels


def scaled_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """The size at which `decode_pixels` decodes a plain JPEG of this size."""
    scaled = height, width
    if short_side is not None:
        for shrink in (2, 4, 8):
            sides = -(-height // shrink), -(-width // shrink)
            if min(sides) >= short_side:
                scaled = sides
    return scaled


def baseline_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that every decoder reads alike: baseline, in grey or YCbCr, upright, with an end.

    None for everything else, whether it is an image or not.
    """
    frame = _plain_jpeg(data)
    if frame is None or not frame.baseline or not data.endswith(b"\xff\xd9"):
        return None
    if frame.may_be_turned and orientation(open_image(data)) != 1:
        return None
    return frame.height, frame.width


class _Frame(NamedTuple):
    height: int
    width: int
    may_be_turned: bool  # its metadata may hold an orientation other than upright
    baseline: bool  # Huffman-coded in one go, and in grey or YCbCr


def _plain_jpeg(data: bytes) -> _Frame | None:
    """The header of a baseline or progressive JPEG, grey or in three colours of 8 bit; None for anything else."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, size, turned, baseline = 2, None, False, True
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if marker in (0xC0, 0xC1, 0xC2) and size is None and len(segment) > 5:  # start of frame
            size = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            if segment[0] != 8 or segment[5] not in (1, 3) or 0 in size:  # precision, components
                return None
            baseline = baseline and marker == 0xC0 and segment[6::3] != b"RGB"  # what the components are called
        elif marker == 0xDA:  # start of scan: the pixels
            return None if size is None else _Frame(*size, turned, baseline)
        elif marker == 0xE1:  # APP1: EXIF in either byte order, or XMP
            turned = turned or any(tag in segment for tag in (b"\x01\x12", b"\x12\x01", b"rientation"))
        elif marker == 0xEE and segment[:5] == b"Adobe":  # its last byte: 1 for YCbCr
            baseline = baseline and segment[11:12] == b"\x01"
        elif not (0xE0 <= marker <= 0xFE or marker in (0xC4, 0xDB, 0xDD)):  # neither APPn, COM, nor a table
            return None
        at += 2 + length
    return None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What `UPRIGHT` does, to an array (height, width, 3)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    vertical = 1 if orientation not in (3, 4, 7, 8) else -1
    horizontal = 1 if orientation not in (2, 3, 6, 7) else -1
    return np.ascontiguousarray(pixels[::vertical, ::horizontal])


def open_image(data: bytes) -> Image.Image:
    """Header only: format, size, mode. Raises DecodeError for what is no image or more than `MAX_PIXELS`."""
    if not data:
        raise DecodeError("empty file")
    try:
        image = Image.open(BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        raise DecodeError("not an image") from None
    except Image.DecompressionBombError:
        raise DecodeError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as e:  # a hostile header can raise anything
        raise DecodeError(_reason(e)) from None
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(f"more than {MAX_PIXELS} pixels")
    return image


def load(image: Image.Image) -> None:
    """Decodes the pixels of the first frame in place. Raises DecodeError."""
    try:
        image.load()
    except Exception as e:  # as above: decoders raise OSError, SyntaxError, struct.error, EOFError, MemoryError, …
        raise DecodeError(_reason(e)) from None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1–8; 1 where there is none or where it is nonsense."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block is no reason to lose an image that decodes
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as upright 8-bit RGB. Raises DecodeError."""
    turn = UPRIGHT.get(orientation(image))
    try:
        if image.mode.startswith("I") or image.mode == "F":
            image = _deep_to_grey(image)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            layers = image.convert("RGBA")
            white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, layers)
        if image.mode != "RGB":
            image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)
    except Exception as e:
        raise DecodeError(_reason(e)) from None


def _deep_to_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float images: Pillow's own conversion would clip them at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if image.mode.startswith("I") and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    grey = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(grey).astype(np.uint8))


def _formats() -> list[str]:
    Image.init()
    return [name for name in EXTENSIONS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    """The decoder's words without addresses and line breaks, so that two builds write the same list."""
    text = " ".join(str(error).split())
    return text if text and " object at 0x" not in text else f"cannot be decoded ({type(error).__name__})"
