"""Image bytes → 8-bit RGB, one rule for every reader of a corpus: first frame, upright, alpha on white, 16 bit scaled.

What Pillow would crash or guess on ends in one exception type, `DecodeError`, with a reason short enough for a list.
"""

from io import BytesIO

import numpy as np
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
