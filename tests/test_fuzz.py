"""Damaged files of every kind that is read: a result of the right types, or a named error."""

import io
import json
import resource
import tarfile
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
from broken import encode, photo
from PIL import PngImagePlugin

from rsdlib import data
from rsdlib.errors import RsdError

PROMPTS = ("a red fox, oil painting", 'a "quoted" cat', "two, three; four | five")
INFOTEXT = "a fox, (snow:1.2)\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Seed: 1"
TIMES = 25  # damages of each kind
SECONDS, MEGABYTES = 5, 1000


def pictures():
    return {f"{number}.png": encode(photo(16, 12, number)) for number in range(3)}


def rows(**more):
    return [{"file_name": f"{n}.png", "prompt": p, **more} for n, p in enumerate(PROMPTS)]


def csv():
    return pd.DataFrame(rows(seed=1)).to_csv(index=False).encode()


def jsonl():
    return "".join(json.dumps(row) + "\n" for row in rows(seed=2)).encode()


def parquet(frame):
    stream = io.BytesIO()
    pd.DataFrame(frame).to_parquet(stream, index=False)
    return stream.getvalue()


def held():
    return [{"prompt": prompt, "image": encode(photo(16, 12))} for prompt in PROMPTS]


def part():
    told = {f"{n}.png": {"p": p, "se": n, "c": 7.0, "st": 50} for n, p in enumerate(PROMPTS)}
    return zipped(pictures() | {"part-000001.json": json.dumps(told).encode()})


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tar():
    stream = io.BytesIO()
    members = pictures() | {f"{n}.txt": prompt.encode() for n, prompt in enumerate(PROMPTS)}
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def told(format="PNG"):
    if format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", INFOTEXT)
        text.add_text("prompt", json.dumps({"3": {"class_type": "KSampler", "inputs": {}}}))
        return encode(photo(16, 12), pnginfo=text)
    image = photo(16, 12)
    exif = image.getexif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + INFOTEXT.encode("utf-16-be")
    return encode(image, format, exif=exif)


# What is damaged, and what lies whole beside it.
KINDS = {
    "CSV": ("metadata.csv", csv, pictures),
    "JSON lines": ("metadata.jsonl", jsonl, pictures),
    "table as Parquet": ("metadata.parquet", lambda: parquet(rows()), pictures),
    "part": ("part-000001.zip", part, dict),
    "tar": ("0.tar", tar, dict),
    "images in Parquet": ("0.parquet", lambda: parquet(held()), dict),
    "PNG with its prompt": ("a.png", told, pictures),
    "JPEG with its prompt": ("a.jpg", lambda: told("JPEG"), dict),
    "WebP with its prompt": ("a.webp", lambda: told("WEBP"), dict),
}
SPECIAL = (b"\0", b"\n", b'"', b",", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"[" * 3000, b"9" * 400)


def damaged(content, rng):
    """Return content with a few damages of one kind each."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(content) + 1))
        length = int(rng.integers(1, 1 + max(len(content) // 4, 1)))
        kind = rng.integers(5)
        if kind == 0 and content:
            content[min(place, len(content) - 1)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = content[place : place + length]
        elif kind == 3:
            content[place:place] = SPECIAL[rng.integers(len(SPECIAL))]
        else:
            del content[place:]
    return bytes(content)


def attempt(read, *given):
    """Return what was read, and the named error that ended it."""
    try:
        return read(*given), ""
    except RsdError as error:
        return None, str(error)


def read_all(folder, on_bad):
    """Read a folder and its pictures; return how many pairs there are."""
    pairs = data.load_pairs(folder, on_bad=on_bad)
    assert pairs["id"].map(type).eq(str).all()
    assert pairs["id"].is_unique
    assert pairs["prompt"].dropna().map(type).eq(str).all()
    for locator in pairs["image"]:
        image, error = attempt(data.open_image, locator)
        assert error or image.mode == "RGB"
        found = data.read_prompt(locator)
        assert isinstance(found.prompt, str | None)
        assert found.prompt or found.reason
    return len(pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_damages_end_in_named_errors(tmp_path, kind):
    name, make, beside = KINDS[kind]
    whole, around = make(), beside()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(TIMES):
        rng = np.random.default_rng([sum(kind.encode()), number])
        folder = tmp_path / str(number)
        folder.mkdir()
        for other, content in {**around, name: damaged(whole, rng) if number else whole}.items():
            (folder / other).write_bytes(content)
        for on_bad in ("error", "skip"):
            start = time.process_time()
            count, error = attempt(read_all, folder, on_bad)
            assert time.process_time() - start < SECONDS, f"damage {number} takes long"
            assert count or error
            assert number or count, f"what is whole is refused: {error}"
            assert len(error) < 2000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEGABYTES * 1024
