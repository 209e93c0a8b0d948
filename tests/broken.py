"""Makers of good and broken inputs.

Each entry of a table is a name and a function, so that collecting tests costs nothing.
"""

import gzip
import io
import json
import stat
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pandas as pd
from PIL import Image

# --- images ---------------------------------------------------------------------------------------


def photo(width=48, height=40, seed=0):
    """Return an image with gradients and noise, so that its files do not compress to nothing."""
    y, x = np.mgrid[:height, :width]
    planes = np.stack(
        [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1
    )  # (h, w, 3)
    noise = np.random.default_rng(seed).integers(-30, 30, planes.shape)
    return Image.fromarray((planes + noise).clip(0, 255).astype(np.uint8))


def encode(image, format="PNG", **options):
    """Return the bytes of `image` saved in `format`."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind, data=b""):
    """Return one PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, rows, *extra):
    """Return a PNG made by hand: `colour` 0 grey, 2 RGB; `rows` filtered; `extra` chunks."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows)) if rows is not None else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + data + chunk(b"IEND")


def flip(data, position, bits=0xFF):
    """Return `data` with some bits of one byte inverted."""
    data = bytearray(data)
    data[position] ^= bits
    return bytes(data)


def _cut(format, share):
    return lambda: (data := encode(photo(), format))[: int(len(data) * share)]


def _animation(format):
    frames = [photo(seed=1), photo(seed=2)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:])


def _compressed_text(kind, fields):
    return png(
        1, 1, 8, 0, b"\0\0", chunk(kind, b"note\0" + fields + zlib.compress(b" " * 3_000_000))
    )


def _uncompressed_flip():
    """Flip a pixel's byte in data that zlib only stores: only the chunk's checksum can tell."""
    data = encode(photo(), "PNG", compress_level=0)
    return flip(data, data.index(b"IDAT") + 400)


BROKEN_IMAGES = {
    **{
        f"{format} cut at {share}": _cut(format, share)
        for format in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
        for share in (0.25, 0.5, 0.99)
    },
    "GIF cut at 0.5": _cut("GIF", 0.5),
    "PNG, checksum of the data": lambda: flip(data := encode(photo()), data.index(b"IEND") - 6),
    "PNG, checksum of the header": lambda: flip(encode(photo()), 30),
    "PNG, a data byte": lambda: flip(data := encode(photo()), data.index(b"IDAT") + 300),
    "PNG, a stored data byte": _uncompressed_flip,
    "PNG without data": lambda: png(4, 4, 8, 0, None),
    "PNG of no width": lambda: png(0, 4, 8, 0, b""),
    "PNG of 3 bits": lambda: png(4, 4, 3, 0, bytes(12)),
    "PNG signature alone": lambda: encode(photo())[:8],
    "JPEG marker alone": lambda: b"\xff\xd8\xff",
    "WebP header alone": lambda: encode(photo(), "WEBP")[:16],
    "zero bytes": lambda: b"",
    "one byte": lambda: b"\x89",
    "NULs": lambda: bytes(4096),
    "noise": lambda: np.random.default_rng(0).bytes(4096),
    "text": lambda: b"the quick brown fox",
    "HTML error page": lambda: b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "PPM, a format not allowed": lambda: encode(photo(), "PPM"),
    "ICO, a format not allowed": lambda: encode(photo(), "ICO"),
    "zip": lambda: zip_bytes({"a.png": encode(photo())}),
    "animated GIF": lambda: _animation("GIF"),
    "animated WebP": lambda: _animation("WEBP"),
    "animated PNG": lambda: _animation("PNG"),
    "two-page TIFF": lambda: _animation("TIFF"),
    "float TIFF": lambda: encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "32-bit TIFF": lambda: encode(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"),
    "LAB TIFF": lambda: encode(Image.new("LAB", (4, 4)), "TIFF"),
    "bomb, 1-bit PNG": lambda: png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)),
    "bomb, 110 megapixels": lambda: png(10_500, 10_500, 1, 0, bytes(1314 * 10_500)),
    "bomb, GIF's extents": lambda: (
        (data := encode(photo(), "GIF"))[:6] + b"\xff\xff\xff\xff" + data[10:]
    ),
    "bomb, BMP's extents": lambda: (
        (data := encode(photo(), "BMP"))[:18] + struct.pack("<II", 60_000, 60_000) + data[26:]
    ),
}


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))  # left half; the upper half once turned
    return encode(image, "PNG", exif=exif)


def _palette(alpha):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encode(image, "PNG", **({"transparency": alpha} if alpha is not None else {}))


def _grey16(value, *extra):
    return png(4, 4, 16, 0, (b"\0" + struct.pack(">4H", *[value] * 4)) * 4, *extra)


_WHITE = (255, 255, 255)
# name: (bytes, size, colour of the pixel at the top left, tolerance)
GOOD_IMAGES = {
    "L": (lambda: encode(Image.new("L", (4, 4), 100)), (4, 4), (100,) * 3, 0),
    "LA, transparent": (lambda: encode(Image.new("LA", (4, 4), (0, 0))), (4, 4), _WHITE, 0),
    "P": (lambda: _palette(None), (4, 4), (200, 100, 50), 0),
    "P, transparent colour": (lambda: _palette(1), (4, 4), _WHITE, 0),
    "P, alpha a colour": (lambda: _palette(b"\xff\x00"), (4, 4), _WHITE, 0),
    "RGB": (lambda: encode(Image.new("RGB", (4, 4), (1, 2, 3))), (4, 4), (1, 2, 3), 0),
    "RGB, transparent colour": (
        lambda: encode(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7)),
        (4, 4),
        _WHITE,
        0,
    ),
    "RGBA, transparent red": (
        lambda: encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0))),
        (4, 4),
        _WHITE,
        0,
    ),
    "RGBA, half": (
        lambda: encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128))),
        (4, 4),
        (255, 127, 127),
        0,
    ),
    "RGBA, opaque WebP": (
        lambda: encode(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), "WEBP", lossless=True),
        (4, 4),
        (9, 8, 7),
        0,
    ),
    "1": (lambda: encode(Image.new("1", (4, 4), 1)), (4, 4), _WHITE, 0),
    "16-bit grey": (lambda: _grey16(40_000), (4, 4), (156,) * 3, 0),
    "16-bit grey, white": (lambda: _grey16(65_535), (4, 4), _WHITE, 0),
    "16-bit grey, transparent": (
        lambda: _grey16(500, chunk(b"tRNS", struct.pack(">H", 500))),
        (4, 4),
        _WHITE,
        0,
    ),
    "16-bit grey TIFF": (
        lambda: encode(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "TIFF"),
        (4, 4),
        (156,) * 3,
        0,
    ),
    "16-bit RGB": (
        lambda: png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 40_000, 0, 65_535)),
        (1, 1),
        (156, 0, 255),
        0,
    ),
    "CMYK JPEG": (
        lambda: encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),
        (8, 8),
        (255, 0, 0),
        3,
    ),
    "CMYK TIFF": (
        lambda: encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"),
        (4, 4),
        (255, 0, 0),
        0,
    ),
    "YCbCr TIFF": (
        lambda: encode(Image.new("RGB", (4, 4), "red").convert("YCbCr"), "TIFF"),
        (4, 4),
        (255, 0, 0),
        3,
    ),
    "lossless WebP": (
        lambda: encode(Image.new("RGB", (4, 4), (1, 2, 3)), "WEBP", lossless=True),
        (4, 4),
        (1, 2, 3),
        0,
    ),
    "still GIF": (lambda: encode(Image.new("RGB", (4, 4), "red"), "GIF"), (4, 4), (255, 0, 0), 0),
    "BMP": (lambda: encode(Image.new("RGB", (4, 4), (1, 2, 3)), "BMP"), (4, 4), (1, 2, 3), 0),
    "camera's JPEG with a preview": (lambda: _animation("MPO"), (48, 40), (10, 10, 10), 50),
    "turned by EXIF": (_turned, (10, 20), _WHITE, 0),
    "bomb of text, iTXt": (lambda: _compressed_text(b"iTXt", b"\1\0\0\0"), (1, 1), (0, 0, 0), 0),
    "bomb of text, zTXt": (lambda: _compressed_text(b"zTXt", b"\0"), (1, 1), (0, 0, 0), 0),
    "1 x 1": (lambda: encode(Image.new("RGB", (1, 1), "red")), (1, 1), (255, 0, 0), 0),
    "1 x 10,000": (
        lambda: encode(Image.new("RGB", (1, 10_000), "red")),
        (1, 10_000),
        (255, 0, 0),
        0,
    ),
    "10,000 x 1": (
        lambda: encode(Image.new("RGB", (10_000, 1), "red")),
        (10_000, 1),
        (255, 0, 0),
        0,
    ),
}

# --- zips -----------------------------------------------------------------------------------------


def zip_bytes(members, method=zipfile.ZIP_STORED, links=()):
    """Return a zip of name -> bytes, under any names; those in `links` are symbolic links."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name.replace("\0", "~"))  # `ZipInfo` cuts a name at its NUL
            entry.compress_type = method
            entry.external_attr = (
                stat.S_IFLNK | 0o777 if name in links else stat.S_IFREG | 0o644
            ) << 16
            archive.writestr(entry, data)
    packed = stream.getvalue()
    for name in members:
        packed = packed.replace(name.replace("\0", "~").encode(), name.encode())
    return packed


def patch_entry(data, offset, form, value):
    """Return a zip with one field of its first directory entry replaced."""
    data = bytearray(data)
    struct.pack_into(form, data, data.index(b"PK\1\2") + offset, value)
    return bytes(data)


UNSAFE_NAMES = (
    "../../x.png",
    "..",
    "a/../../x.png",
    "a/..",
    "./x.png",
    "/abs/x.png",
    "//srv/share/x.png",
    "a//x.png",
    "C:\\x.png",
    "C:/x.png",
    "C:x.png",
    "\\\\srv\\share\\x.png",
    "\\x.png",
    "a\\..\\b.png",
    "..\\x.png",
    "x.png\0.txt",
)

_GOOD = {"a.png": encode(photo(8, 8)), "b.png": encode(photo(8, 8, 1))}
_SPACES = {"a.png": b" " * 3_000_000}


def _twice():
    return zip_bytes({"a.png": b"1", "b.png": b"2"}).replace(b"b.png", b"a.png")


BROKEN_ZIPS = {
    **{
        f"name {name!r}": (lambda name=name: zip_bytes({"ok.png": b"", name: b""}))
        for name in UNSAFE_NAMES
    },
    "empty file": lambda: b"",
    "HTML": lambda: BROKEN_IMAGES["HTML error page"](),
    "cut in half": lambda: (data := zip_bytes(_GOOD))[: len(data) // 2],
    "cut by one byte": lambda: zip_bytes(_GOOD)[:-1],
    "directory gone": lambda: zip_bytes(_GOOD).replace(b"PK\1\2", b"PK\0\0"),
    "encrypted member": lambda: patch_entry(zip_bytes(_GOOD), 8, "<H", 1),
    "unknown compression": lambda: patch_entry(zip_bytes(_GOOD), 10, "<H", 99),
    "LZMA": lambda: zip_bytes(_GOOD, zipfile.ZIP_LZMA),
    "symlink": lambda: zip_bytes({"a.png": b"/etc/passwd"}, links=("a.png",)),
    "member twice": _twice,
    "bomb by ratio": lambda: zip_bytes(_SPACES, zipfile.ZIP_DEFLATED),
    "bomb by size": lambda: patch_entry(zip_bytes(_GOOD), 24, "<I", 65 * 2**20),
    "too many members": lambda: zip_bytes(
        {f"{i:04d}.png": b"" for i in range(60)}
    ),  # the test lowers the limit
}
# The zip is sound but for its first member, a.png, which alone is refused.
BROKEN_MEMBERS = {
    "flipped byte": lambda: flip(data := zip_bytes(_GOOD), data.index(b"IDAT") + 20),
    "flipped deflated byte": lambda: flip(zip_bytes(_GOOD, zipfile.ZIP_DEFLATED), 80),
    "local header gone": lambda: flip(zip_bytes(_GOOD), 0),
    "other name in the local header": lambda: flip(zip_bytes(_GOOD), 30, 2),
    "more than it states": lambda: patch_entry(
        zip_bytes({**_GOOD, **_SPACES}, zipfile.ZIP_DEFLATED), 24, "<I", 1000
    ),
    "less than it states": lambda: patch_entry(zip_bytes(_GOOD), 24, "<I", 60_000),
    "zip in the zip": lambda: zip_bytes({"a.png": zip_bytes(_GOOD), "b.png": _GOOD["b.png"]}),
}

# --- tars -----------------------------------------------------------------------------------------


def tar_bytes(*members, **fields):
    """Return a tar of (name, bytes), under any names; `fields` are the first entry's."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo("x")
            entry.size, entry.pax_headers = len(data), {"path": name}
            for field, value in fields.items():
                setattr(entry, field, value)
            fields = {}
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def _good_tar():
    return tar_bytes(*_GOOD.items(), ("a.txt", b"x"))


def _tar_of_large_header():
    """Return a tar whose first entry claims 65 MiB of attributes."""
    data = bytearray(_good_tar())
    data[124:136] = b"%011o\0" % (65 * 2**20)
    data[148:156] = b"%06o\0 " % (256 + sum(data[:148]) + sum(data[156:512]))
    return bytes(data)


BROKEN_TARS = {
    **{
        f"name {name!r}": (lambda name=name: tar_bytes(("ok.png", b""), (name, b"")))
        for name in UNSAFE_NAMES
    },
    "empty file": lambda: b"",
    "HTML": lambda: BROKEN_IMAGES["HTML error page"](),
    "gzipped": lambda: gzip.compress(_good_tar()),
    "cut in half": lambda: _good_tar()[: 512 * 4],
    "cut between two entries": lambda: _good_tar()[: _good_tar().index(b"path=b.png") - 519 - 512],
    "no end": lambda: _good_tar().rstrip(b"\0"),
    "a header flipped": lambda: flip(data := _good_tar(), data.index(b"path=b.png") - 512),
    "something behind its end": lambda: _good_tar() + b"x",
    "symlink": lambda: tar_bytes(("ok.png", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": lambda: tar_bytes(("ok.png", b""), type=tarfile.LNKTYPE, linkname="b.png"),
    "named pipe": lambda: tar_bytes(("ok.png", b""), type=tarfile.FIFOTYPE),
    "member twice": lambda: tar_bytes(("ok.png", b"1"), ("ok.png", b"2")),
    "member of 65 MiB": lambda: tar_bytes(("ok.png", bytes(65 * 2**20))),
    "attributes of 65 MiB": _tar_of_large_header,
    "too many members": lambda: tar_bytes(*((f"{i:04d}.png", b"") for i in range(60))),
}

# --- Parquet files with images --------------------------------------------------------------------


def parquet_bytes(table, **options):
    """Return a table of columns as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table(table), stream, **options)
    return stream.getvalue()


def _good_parquet():
    return parquet_bytes({"caption": ["x", "y"], "jpg_0": [*_GOOD.values()]})


BROKEN_PARQUETS = {
    "empty file": lambda: b"",
    "HTML": lambda: BROKEN_IMAGES["HTML error page"](),
    "cut in half": lambda: (data := _good_parquet())[: len(data) // 2],
    "cut by one byte": lambda: _good_parquet()[:-1],
    "bomb by size": lambda: parquet_bytes(
        {"caption": ["x"], "jpg_0": [b" " * 3_000_000]}, compression="zstd"
    ),
    "too many images": lambda: parquet_bytes({"caption": ["x"] * 60, "jpg_0": [b""] * 60}),
}

# --- folders --------------------------------------------------------------------------------------


def diffusiondb(
    folder, parts=2, images=5, *, table=True, jsons=True, extracted=False, format="PNG"
):
    """Write a sound folder in DiffusionDB's layout; return its table."""
    rows = []
    for part in range(1, parts + 1):
        members, listed = {}, {}
        for i in range(images):
            seed = 1000 * part + i
            name = f"{zlib.crc32(b'%d' % seed):08x}-{seed}.{format.lower()}"
            members[name] = encode(photo(40 + i, 48, seed), format)
            listed[name] = {
                "p": f"a photo of the number {seed}",
                "se": seed,
                "c": 7.0,
                "st": 50,
                "sa": "k_lms",
            }
            rows.append(
                {
                    "image_name": name,
                    "prompt": listed[name]["p"],
                    "part_id": part,
                    "seed": seed,
                    "image_nsfw": 0.1,
                }
            )
        if jsons:
            members[f"part-{part:06d}.json"] = json.dumps(listed).encode()
        write_part(folder, part, members, extracted)
    frame = pd.DataFrame(rows)
    if table:
        frame.to_parquet(folder / "metadata.parquet")
    return frame


def write_part(folder, part, members, extracted=False):
    """Write one part, a zip or a folder."""
    target = folder / "images" / f"part-{part:06d}"
    if not extracted:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".zip").write_bytes(zip_bytes(members))
        return
    target.mkdir(parents=True)
    for name, data in members.items():
        (target / name).write_bytes(data)


def read_part(folder, part):
    """Return the members of one zipped part."""
    with zipfile.ZipFile(folder / "images" / f"part-{part:06d}.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}
