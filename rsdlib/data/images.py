"""Images from bytes to pixels: decoded under limits, laid on white, cut square."""

import contextlib
import io
import os
import re
import threading
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from rsdlib import files
from rsdlib.data.parts import BROKEN, open_part
from rsdlib.errors import BadImageError, refusing

FULL_PIXELS = 2**24  # of one image; larger ones are read at a half or a quarter of their size
MAX_PIXELS = 110_000_000  # while it is decoded: 440 MB, one image at a time
MAX_CHUNKS = 100_000  # of a PNG
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS += ("AVIF",) if "avif" in features.modules and features.check("avif") else ()
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
SUFFIXES |= {".mpo"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
# What Pillow is known to raise on broken files: the list of its own fuzz tests, and what ours met.
_BROKEN_IMAGE = (*BROKEN, SyntaxError, OverflowError, AssertionError)
_BROKEN_IMAGE += (Image.DecompressionBombError, Image.DecompressionBombWarning)
_STRIP = 512  # rows
_one_large = threading.Lock()


def open_image(image):
    """Open one image, safely: the same picture however it is given.

    Parameters
    ----------
    image : str, path-like, bytes or PIL image
        A locator from the column ``image`` of `load_pairs`, the path of any image file, what such
        a file holds, or an image that Pillow opened. Pillow's counts as its file until it is
        loaded, then as the pixels and the EXIF orientation that it has.

    Returns
    -------
    PIL.Image.Image
        RGB, 8 bits, turned upright by its EXIF orientation. Transparent images are laid on white;
        16-bit grey values are divided by 257, not clipped; colour profiles are ignored, and so are
        broken metadata. Images above `FULL_PIXELS` have half the width and height, from 64
        megapixels on a quarter (JPEG while it is decoded, others by means of squares).

    Raises
    ------
    BadImageError
        The image is absent, damaged, larger than `MAX_PIXELS`, animated (no frame is *the* image),
        of a format outside `FORMATS`, or holds 32-bit values, whose range is not known.
    BadArchiveError
        The archive that holds it is damaged or hostile.
    """
    return decode_image(*read_file(image))


def read_file(image):
    """Return the bytes of an image's file, its name and where it lies; see `open_image`.

    Of a PIL image that is loaded there are no bytes, but itself.
    """
    if not isinstance(image, bytes | Image.Image):
        place, name = split_locator(image)
        with open_part(files.resolve_path(place)) as part:
            return part.read(name), name, part.where
    if getattr(image, "fp", None) is not None:  # None once the pixels are in memory
        with refusing(BROKEN, BadImageError, "image", "memory", "its file cannot be read ({})"):
            image.fp.seek(0)  # Pillow finds its place by itself
            image = image.fp.read()
    return image, "image", "memory"


_archived = re.compile(r"(.+?\.(?:zip|tar|parquet))::(.*)", re.S).fullmatch


def split_locator(locator):
    """Return a locator's archive or folder, and the name inside."""
    archived = _archived(str(locator))
    return archived.groups() if archived else os.path.split(locator)


def decode_image(data, id="image", part="memory"):
    """Decode the bytes of one image as `open_image` does.

    Parameters
    ----------
    data : bytes, or a PIL image that is loaded
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
    formats = f"it is none of {', '.join(FORMATS)}, or the header is damaged"
    unknown = refusing(UnidentifiedImageError, BadImageError, id, part, formats)
    damaged = refusing(_BROKEN_IMAGE, BadImageError, id, part, "cut short, damaged or unsafe ({})")
    with damaged, unknown:
        image = data
        if isinstance(data, bytes):  # of which this reads the header
            image = Image.open(io.BytesIO(_without_metadata(data)), formats=FORMATS)
        if reason := _why_refused(image):
            raise BadImageError(id, part, reason)
        rgb = _to_rgb(image) if image.width * image.height <= FULL_PIXELS else _shrunk(image)
        rgb.info = dict(image.info)  # with the EXIF
        with contextlib.suppress(Exception):  # what Pillow raises on broken EXIF is in no list
            ImageOps.exif_transpose(rgb, in_place=True)
        rgb.info = {}
        return rgb


def png_chunks(data):
    """Yield the chunks of a PNG, each with its length and checksum; a last one may be cut short."""
    end = 8
    for _ in range(MAX_CHUNKS):
        start, end = end, end + 12 + int.from_bytes(data[end : end + 4])
        yield data[start:end]
        if data[start + 4 : start + 8] in (b"IEND", b""):
            return
    raise ValueError(f"more than {MAX_CHUNKS:,} chunks")


# Of a PNG: what its pixels depend on, and what may say which way up it is.
_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT")
_UPRIGHT = (b"eXIf", b"iTXtXML:com.adobe.xmp\0\0", b"tEXtRaw profile type exif\0")


def _without_metadata(data):
    """Return an image file without what its pixels do not depend on, which may be broken."""
    if data.startswith(b"\xff\xd8"):  # Pillow looks for these names alone
        return data.replace(b"ICC_PROFILE\0", b"-" * 12).replace(b"Photoshop 3.0\0", b"-" * 14)
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept = [data[:8]]
    for chunk in png_chunks(data):
        right = len(chunk) > 11 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if not right and (len(chunk) < 12 or chunk.startswith(_CHUNKS, 4)):
            raise ValueError(f"the chunk {chunk[4:8]} is damaged")
        if right and chunk.startswith(_CHUNKS + _UPRIGHT, 4):
            kept.append(chunk)
    return b"".join(kept)


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
    """Return an image as RGB, without what could be seen through."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32)  # (h, w)
        grey = ((values + 128) // 257).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _shrunk(image):
    """Return a large image as RGB at a half or a quarter of its size; a copy of it needs none."""
    factor = 2 if image.width * image.height < 64_000_000 else 4
    with _one_large:
        if image.draft(None, (image.width // factor, image.height // factor)):
            return _to_rgb(image)
        width, height = image.size
        small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        for top in range(0, height, _STRIP):
            strip = image.crop((0, top, width, min(top + _STRIP, height)))
            small.paste(_to_rgb(strip).reduce(factor), (0, top // factor))
    return small


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
