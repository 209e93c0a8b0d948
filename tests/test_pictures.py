"""Pictures as people have them: in every form, large, with broken metadata, in any folder."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import broken
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, features
from torch import nn

from rsdlib import data, predict, runtime
from rsdlib.data import images
from rsdlib.errors import BadImageError, ConfigError
from rsdlib.models import PromptRegressor

TESTS = Path(__file__).parent
HAS_AVIF = "avif" in features.modules and features.check("avif")


class Encoder(nn.Module):
    """The mean colours of the quarters of an image: a picture's own pixels, and no more."""

    features, image_size = 12, 8

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def predictor(size=6):
    torch.manual_seed(0)
    return predict.Predictor(PromptRegressor(Encoder(), "separate", 0, size), device="cpu")


# --- one picture, one prediction ------------------------------------------------------------------


def alpha():
    image = broken.photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def turned(orientation, format, **size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return broken.encode(broken.photo(**size), format, exif=exif)


def grey16():
    values = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 34
    return Image.fromarray(values)


def rgb16():
    rows = b"".join(b"\0" + struct.pack(">9H", *range(row, 60_000, 6_700)) for row in range(3))
    return broken.png(3, 3, 16, 2, rows)


def transparent_palette():
    image = broken.photo().quantize(16)
    return broken.encode(image, transparency=bytes(range(0, 256, 16)))


def profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


FORMS = {
    "plain": lambda: broken.encode(broken.photo()),
    "alpha": lambda: broken.encode(alpha()),
    "alpha, WebP": lambda: broken.encode(alpha(), "WEBP"),
    "palette, transparent": transparent_palette,
    "palette, a transparent colour": lambda: broken.encode(broken.photo().quantize(8), "GIF"),
    "RGB, a transparent colour": lambda: broken.encode(broken.photo(), transparency=(9, 9, 9)),
    "16 bits, grey": lambda: broken.encode(grey16()),
    "16 bits, grey TIFF": lambda: broken.encode(grey16(), "TIFF"),
    "16 bits, RGB": rgb16,
    "CMYK": lambda: broken.encode(broken.photo().convert("CMYK"), "JPEG"),
    "grey with alpha": lambda: broken.encode(alpha().convert("LA")),
    "grey": lambda: broken.encode(broken.photo().convert("L"), "JPEG"),
    "1 bit": lambda: broken.encode(broken.photo().convert("1")),
    "a profile": lambda: broken.encode(broken.photo(), "JPEG", icc_profile=profile()),
    "progressive": lambda: broken.encode(broken.photo(), "JPEG", progressive=True),
    "MPO": lambda: broken._animation("MPO"),
    **{f"turned {o}": lambda o=o: turned(o, "JPEG") for o in range(2, 9)},
    "turned PNG": lambda: turned(6, "PNG"),
    "turned WebP": lambda: turned(6, "WEBP"),
    "turned TIFF": lambda: turned(6, "TIFF"),
    **({"AVIF": lambda: broken.encode(broken.photo(), "AVIF")} if HAS_AVIF else {}),
    **({"turned AVIF": lambda: turned(6, "AVIF")} if HAS_AVIF else {}),
    "large PNG": lambda: broken.encode(alpha().resize((131, 97))),
    "large JPEG": lambda: turned(6, "JPEG", width=131, height=97),
    "64 megapixels": lambda: broken.encode(Image.new("L", (8000, 8000), 77), "JPEG"),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_picture_is_one_prediction(form, tmp_path, monkeypatch):
    """By path, bytes and Pillow's image, whether its pixels were loaded before or not."""
    if form.startswith("large"):
        monkeypatch.setattr(images, "FULL_PIXELS", 131 * 97 - 1)
    content = FORMS[form]()
    (tmp_path / "x.png").write_bytes(content)
    given = [tmp_path / "x.png", content, Image.open(tmp_path / "x.png")]
    given += [Image.open(io.BytesIO(content)), Image.open(tmp_path / "x.png")]
    if form not in ("large JPEG", "64 megapixels"):  # Pillow decodes them at full size
        given[-1].load()
    seen = predictor().predict([*given, given[2]]).embeddings
    assert np.ptp(seen, axis=0).max() == 0
    pictures = [data.open_image(image) for image in given]
    assert all(picture == pictures[0] for picture in pictures)
    one_by_one = data.Pictures(given, 8)
    assert (one_by_one.batch(range(len(given))) == data.resize(pictures[0], 8)).all()
    assert data.open_image(pictures[0]) == pictures[0]


def test_pillows_image_stays_as_it_was():
    content = turned(6, "PNG")
    image = Image.open(io.BytesIO(content))
    upright = data.open_image(image)
    assert (upright.size, image.size) == ((40, 48), (48, 40))
    assert (np.asarray(ImageOps.exif_transpose(image)) == np.asarray(upright)).all()
    again = data.open_image(image)  # loaded by now
    assert again == upright
    assert image.size == (48, 40)
    assert image.getexif()[0x0112] == 6
    assert data.open_image(ImageOps.exif_transpose(image)) == upright


def test_changed_pixels_count():
    image = Image.open(io.BytesIO(broken.encode(broken.photo())))
    image.paste("white", (0, 0, 48, 40))
    assert np.asarray(data.open_image(image)).min() == 255
    assert np.asarray(data.open_image(image.resize((4, 4)))).min() == 255


@pytest.mark.parametrize("mode", ["LAB", "HSV", "I", "F"])
def test_modes_without_an_agreed_range_are_refused(mode):
    with pytest.raises(BadImageError, match=f"mode {mode}"):
        data.open_image(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_no_picture(format, tmp_path):
    content = broken._animation(format)
    (tmp_path / "x").write_bytes(content)
    for given in (tmp_path / "x", content, Image.open(tmp_path / "x")):
        with pytest.raises(BadImageError, match="several pages"):
            data.open_image(given)


def test_a_closed_or_broken_image_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(broken.encode(broken.photo()))
    with Image.open(tmp_path / "x.png") as closed:
        pass
    stream = io.BytesIO(broken.encode(broken.photo()))
    gone = Image.open(stream)
    stream.close()
    cut = Image.open(io.BytesIO(broken.BROKEN_IMAGES["JPEG cut at 0.99"]()))
    for image in (closed, gone, cut):
        with pytest.raises(BadImageError):
            data.open_image(image)


# --- large pictures -------------------------------------------------------------------------------


def test_a_usual_size_is_read_as_it_is():
    for size in ((700, 500), (4096, 8)):
        picture = broken.photo(*size)
        assert data.open_image(broken.encode(picture, compress_level=0)) == picture
    assert data.open_image(Image.new("L", (4096, 4096))).size == (4096, 4096)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "I;16"])
def test_large_pictures_are_means_of_squares(mode, monkeypatch):
    """In strips: as if the whole had been shrunk, but without a second copy of it."""
    monkeypatch.setattr(images, "FULL_PIXELS", 100)
    monkeypatch.setattr(images, "_STRIP", 8)
    image = grey16() if mode == "I;16" else alpha().convert("RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        image = alpha().convert(mode)
    small = data.open_image(broken.encode(image))
    monkeypatch.undo()
    whole = data.open_image(broken.encode(image))
    assert small.size == (24, 20)
    assert small == whole.reduce(2)


def test_a_large_jpeg_is_read_at_a_half(monkeypatch):
    monkeypatch.setattr(images, "FULL_PIXELS", 100)
    picture = broken.photo(200, 101)
    small = data.open_image(broken.encode(picture, "JPEG", quality=95))
    assert small.size == (100, 51)
    difference = np.asarray(small, int) - np.asarray(picture.reduce(2), int)
    assert np.abs(difference).mean() < 5


LARGE = """
import resource, sys
from rsdlib import data

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sys.argv[1:]:
    before = peak()
    print(data.open_image(path).size, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts in kilobytes")
def test_64_megapixels_take_little_memory(tmp_path):
    Image.new("RGB", (8000, 8000), "red").save(tmp_path / "x.jpg")
    (tmp_path / "x.png").write_bytes(broken.png(8000, 8000, 8, 0, bytes(8001 * 8000)))
    command = [sys.executable, "-c", LARGE, tmp_path / "x.jpg", tmp_path / "x.png"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=True)
    jpeg, png = done.stdout.splitlines()
    assert jpeg.startswith(shown := "(2000, 2000) ")
    assert png.startswith(shown)
    assert int(jpeg.removeprefix(shown)) < 60
    assert int(png.removeprefix(shown)) < 150


# --- metadata never condemn pixels ----------------------------------------------------------------


def with_chunks(*chunks, behind=False):
    """Return the photo as PNG with chunks in front of its pixels, or behind them."""
    content = broken.encode(broken.photo())
    place = content.index(b"IEND") - 4 if behind else 33
    return content[:place] + b"".join(chunks) + content[place:]


def packed(size):
    return zlib.compress(bytes(size))


def with_segment(marker, body):
    content = broken.encode(broken.photo(), "JPEG")
    return (
        content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + content[2:]
    )


def with_exif(format, exif):
    return broken.encode(broken.photo(), format, exif=exif)


LARGE_TEXT = broken.chunk(b"tEXt", b"note\0" + bytes(3_000_000))
PNG_METADATA = {
    "a profile of 2 MB": [broken.chunk(b"iCCP", b"icc\0\0" + packed(2_000_000))],
    "a profile that is none": [broken.chunk(b"iCCP", b"icc\0\0not packed")],
    "iTXt of 2 MB": [broken.chunk(b"iTXt", b"note\0\1\0\0\0" + packed(2_000_000))],
    "zTXt of 2 MB": [broken.chunk(b"zTXt", b"note\0\0" + packed(2_000_000))],
    "zTXt, packed by another way": [broken.chunk(b"zTXt", b"note\0\7" + packed(9))],
    "75 MB of text": [LARGE_TEXT] * 25,
    "EXIF that is none": [broken.chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")],
    "EXIF of one byte": [broken.chunk(b"eXIf", b"M")],
    "raw EXIF that is none": [broken.chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nzz")],
    "XMP that is none": [broken.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x\xff tiff:Orien")],
    "a checksum of text": [broken.chunk(b"tEXt", b"a\0b")[:-1] + b"!"],
    "a checksum of EXIF": [broken.chunk(b"eXIf", b"MM\0*")[:-1] + b"!"],
    "empty chunks": [broken.chunk(kind) for kind in (b"pHYs", b"gAMA", b"cHRM", b"tIME", b"sRGB")],
    "a header of physics cut short": [broken.chunk(b"pHYs", b"\0")],
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", PNG_METADATA)
def test_what_a_png_says_beside_its_pixels_is_ignored(name, behind):
    content = with_chunks(*PNG_METADATA[name], behind=behind)
    assert data.decode_image(content) == broken.photo()


JPEG_METADATA = {
    "a profile cut short": (0xE2, b"ICC_PROFILE\0"),
    "a profile's second part": (0xE2, b"ICC_PROFILE\0\2\2"),
    "EXIF that is none": (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "EXIF of one byte": (0xE1, b"Exif\0\0M"),
    "EXIF cut short": (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03"),
    "previews that are none": (0xE2, b"MPF\0MM\0*\0\0\0\x08\0"),
    "Photoshop's": (0xED, b"Photoshop 3.0\0008BIM\x04\x04"),
    "XMP that is none": (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='"),
    "a comment that is no text": (0xFE, b"\xff\xfe\0"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", JPEG_METADATA)
def test_what_a_jpeg_says_beside_its_pixels_is_ignored(name):
    expected = data.decode_image(broken.encode(broken.photo(), "JPEG"))
    assert data.decode_image(with_segment(*JPEG_METADATA[name])) == expected


@pytest.mark.parametrize(
    "exif", [b"II*\0\xff\xff\xff\xff", b"M", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01"]
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_turns_nothing(exif, format):
    expected = data.decode_image(broken.encode(broken.photo(), format))
    assert data.decode_image(with_exif(format, exif)) == expected


def test_what_pixels_depend_on_is_still_checked():
    content = broken.encode(broken.photo().quantize(16), transparency=0)
    for kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
        damaged = broken.flip(content, content.index(kind) + 4)
        with pytest.raises(BadImageError):
            data.decode_image(damaged)


def test_chunks_without_end_are_refused_soon():
    content = with_chunks(broken.chunk(b"teXt") * 200_000)
    with pytest.raises(BadImageError, match="more than 100,000 chunks"):
        data.decode_image(content)


# --- folders as people keep them ------------------------------------------------------------------


def test_a_folder_gives_its_pictures_and_names_the_rest(tmp_path, capsys):
    taken = ["a.png", "b.JFIF", "c.gif", "d.mpo", "e.webp", "deep/f.jpe", "deep/g.tiff", "h.bmp"]
    taken += ["i.avif"] if HAS_AVIF else []
    hidden = ["._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "@eaDir/a.png"]
    hidden += ["deep/.thumbnails/f.jpe", "#recycle/a.png", "$RECYCLE.BIN/a.png", ".DS_Store"]
    others = ["x.heic", "y.heic", "notes.txt", "deep/README", "z.psd"]
    for name in taken + hidden + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found = data.find_images(tmp_path)
    assert found == sorted(tmp_path / name for name in taken)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("1 without suffix, 2 .heic, 1 .psd, 1 .txt")
    assert data.find_images(tmp_path / "._a.png") == [tmp_path / "._a.png"]
    inside = tmp_path / ".hidden"
    inside.mkdir()
    with pytest.raises(ConfigError, match="nor an image"):
        data.find_images(inside)
    (inside / "a.png").write_bytes(b"")
    assert data.find_images(inside) == [inside / "a.png"]


@pytest.mark.parametrize("format", [f for f in images.FORMATS if f != "MPO"])
def test_every_format_is_found_and_read(format, tmp_path):
    suffixes = [s for s, f in Image.registered_extensions().items() if f == format]
    for number, suffix in enumerate(suffixes):
        (tmp_path / f"{number}{suffix}").write_bytes(broken.encode(broken.photo(), format))
    found = data.find_images(tmp_path)
    assert len(found) == len(suffixes)
    assert {data.open_image(path).size for path in found} == {(48, 40)}


# --- names that the output cannot show ------------------------------------------------------------


def test_a_line_never_fails_on_a_name(monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    for encoding in ("ascii", "cp1252", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
        runtime.log(f"{name}: a 🐈 ≥ two")
        sys.stdout.flush()
        shown = raw.getvalue().decode(encoding)
        assert "\\udce9" in shown
        assert ("🐈" in shown) == (encoding == "utf-8")


def test_a_picture_may_have_a_name_that_is_no_text(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    try:
        with open(path, "wb") as stream:
            stream.write(broken.encode(broken.photo()))
    except OSError:
        pytest.skip("the file system takes no such name")
    [found] = data.find_images(tmp_path)
    assert data.open_image(found) == broken.photo()
    assert data.open_image(str(found)) == broken.photo()
