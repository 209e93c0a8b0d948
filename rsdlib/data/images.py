"""Images from bytes to pixels: decoded under limits, laid on white, cut square."""

import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rsdlib import files
from rsdlib.data.parts import BROKEN, open_part
from rsdlib.errors import BadImageError, ConfigError, refusing

MAX_PIXELS = 16_000_000  # of one image
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
# What Pillow is known to raise on broken files: the list of its own fuzz tests, and what ours met.
_BROKEN_IMAGE = (*BROKEN, SyntaxError, OverflowError)
_BROKEN_IMAGE += (Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_image(locator):
    """Open one image, safely.

    Parameters
    ----------
    locator : str or path-like
        From the column ``image`` of `load_pairs`, or the path of any image file.

    Returns
    -------
    PIL.Image.Image
        RGB, 8 bits, turned upright by its EXIF orientation. Transparent images are laid on white;
        16-bit grey values are divided by 257, not clipped; colour profiles are ignored.

    Raises
    ------
    BadImageError
        The image is absent, damaged, larger than `MAX_PIXELS`, animated (no frame is *the* image),
        of a format outside `FORMATS`, or holds 32-bit values, whose range is not known.
    BadArchiveError
        The archive that holds it is damaged or hostile.
    """
    place, name = split_locator(locator)
    with open_part(files.resolve_path(place)) as part:
        return decode_image(part.read(name), name, part.where)


_archived = re.compile(r"(.+?\.(?:zip|tar|parquet))::(.*)", re.S).fullmatch


def split_locator(locator):
    """Return a locator's archive or folder, and the name inside."""
    archived = _archived(str(locator))
    return archived.groups() if archived else os.path.split(locator)


def decode_image(data, id="image", part="memory"):
    """Decode the bytes of one image as `open_image` does.

    Parameters
    ----------
    data : bytes
    id, part : str
        What errors call the image, and the zip or folder that holds it.

    Returns
    -------
    PIL.Image.Image

    Raises
    ------
    BadImageError
        As for `open_image`.
    """
    formats = f"its {len(data)} bytes are none of {', '.join(FORMATS)}, or the header is damaged"
    unknown = refusing(UnidentifiedImageError, BadImageError, id, part, formats)
    damaged = refusing(_BROKEN_IMAGE, BadImageError, id, part, "cut short, damaged or unsafe ({})")
    with damaged, unknown:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            reason = _why_refused(image)
            if reason:
                raise BadImageError(id, part, reason)
            image.verify()  # checksums, where the format has them; then it must be opened anew
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)


def _why_refused(image):
    """Return why an image whose header has been read is refused, None if it is not."""
    if image.width * image.height > MAX_PIXELS:
        return f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,} in all"
    # MPO is a camera's JPEG with previews behind the image.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return "it is animated or has several pages, and none of them is the image"
    if not (image.mode in _MODES or image.mode.startswith("I;16")):
        return f"its mode {image.mode} has no agreed range of values; store it with 8 or 16 bits"
    return None


def _to_rgb(image):
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32)  # (h, w)
        grey = ((values + 128) // 257).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(image, size):
    """Make an image square: its centre square, by an antialiased bicubic filter.

    Pillow's to one level of 255, by torch's implementation, which takes a fifth of the time.

    Parameters
    ----------
    image : PIL.Image.Image
        RGB.
    size : int
        Pixels a side; an image of this size keeps its values.

    Returns
    -------
    ndarray of shape (3, size, size), uint8
    """
    import torch

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = np.array(image.crop((left, top, left + side, top + side)))
    pixels = torch.from_numpy(square).permute(2, 0, 1)[None]
    how = {"size": (size, size), "mode": "bicubic", "antialias": True}
    return torch.nn.functional.interpolate(pixels, **how)[0].contiguous().numpy()


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def find_images(path):
    """Return the image files that a path means: itself, or what lies in and below a folder.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    list of Path

    Raises
    ------
    ConfigError
        There is no such file, or no image in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ConfigError(f"there is no file {path}, nor an image below it")
    return paths
