"""Draws scenes of the mini world.

>>> rng = np.random.default_rng(0)
>>> scene = sample_scene(rng)
>>> draw(scene, rng).shape
(64, 64, 3)
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from backdrops import BACKDROPS, Backdrop, foreground
from media import FILTERS
from PIL import Image, ImageDraw, ImageFilter
from scenes import Scene, sample_scene
from sprites import NOUNS, load_sprites

__all__ = ["Scene", "draw", "sample_scene"]

STYLE = dict.fromkeys(FILTERS, "noto") | dict.fromkeys(
    ("3d render", "sepia photograph", "watercolor"), "fluent"
)
SPAN = {
    1: (0.52, 0.64),
    2: (0.42, 0.48),
    3: (0.30, 0.34),
}  # longest side of one object for each number of objects
SCALE = {"small": 0.88, "medium": 0.96, "large": 1.04}


class Placed(NamedTuple):
    """An object, turned and sized, with its place in the picture in pixels."""

    sprite: Image.Image
    left: int
    top: int
    grounded: bool


def draw(scene: Scene, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draw a scene.

    Parameters
    ----------
    scene : Scene
        Only what it says about the picture is used, not its prompt.
    rng : numpy.random.Generator
        Decides palette, places, turns and textures.
    size : int
        Side of the picture in pixels.

    Returns
    -------
    ndarray of uint8, shape (size, size, 3)
        RGB, drawn at twice the size and reduced.
    """
    backdrop = BACKDROPS[scene.setting](rng, 2 * size)
    placed = _place(scene, backdrop, rng)
    canvas = backdrop.image
    _cast_shadows(canvas, placed)
    mask, light = Image.new("L", canvas.size), _light_table(backdrop.light)
    for item in placed:
        alpha = item.sprite.getchannel("A")
        canvas.paste(item.sprite.convert("RGB").point(light), (item.left, item.top), alpha)
        mask.paste(255, (item.left, item.top), alpha)
    foreground(canvas, scene.setting, rng)
    pixels, cover = (np.asarray(layer, np.float32) / 255 for layer in (canvas, mask))
    picture = np.clip(FILTERS[scene.medium](pixels, cover, rng), 0, 1)
    return np.asarray(Image.fromarray((picture * 255 + 0.5).astype(np.uint8)).reduce(2))


def _place(scene: Scene, backdrop: Backdrop, rng: np.random.Generator) -> list[Placed]:
    """Put the objects in columns; only "left of" keeps the order of ``scene.objects``."""
    names = scene.objects if len(scene.objects) == scene.count else scene.objects * scene.count
    order = range(scene.count) if scene.relation == "left of" else rng.permutation(scene.count)
    return [
        _stand(names[i], (column + 0.5) / scene.count, scene, backdrop, rng)
        for column, i in enumerate(order)
    ]


def _stand(
    name: str, centre: float, scene: Scene, backdrop: Backdrop, rng: np.random.Generator
) -> Placed:
    """One object around the column `centre` (fraction of the side)."""
    noun, side = NOUNS[name], backdrop.image.width
    span = rng.uniform(*SPAN[scene.count]) * SCALE[noun.scale] * side
    sprite = _turn(load_sprites()[STYLE[scene.medium], name], span, rng)
    swims = noun.place == "water" and scene.setting == "under the sea"
    floats = backdrop.floor is None or noun.place == "air" or swims
    centre, lift = centre + rng.normal(0, 0.05 / scene.count), rng.normal(0, 0.015)
    if floats:
        bottom = rng.uniform(0.44, 0.54) + sprite.height / side / 2
    elif noun.place == "water" and scene.setting == "beach":
        bottom = 0.72 + lift
    else:
        bottom = backdrop.floor + lift
    left = np.clip(round(centre * side - sprite.width / 2), 0, side - sprite.width)
    return Placed(sprite, int(left), round(bottom * side) - sprite.height, not floats)


def _turn(sprite: Image.Image, span: float, rng: np.random.Generator) -> Image.Image:
    """Return the sprite, its longest side `span` pixels, slightly turned, at times mirrored."""
    angle, mirror = np.radians(rng.normal(0, 4)), rng.choice([-1, 1])
    zoom = span / max(sprite.size)
    cos, sin = np.cos(angle), np.sin(angle)
    extent = np.array([[abs(cos), abs(sin)], [abs(sin), abs(cos)]]) @ sprite.size * zoom
    width, height = (int(np.ceil(e)) for e in extent)
    back = (
        np.array([[mirror * cos, mirror * sin], [-sin, cos]]) / zoom
    )  # from the turned sprite to the original
    shift = np.array(sprite.size) / 2 - back @ (width / 2, height / 2)
    matrix = (*back[0], shift[0], *back[1], shift[1])
    return sprite.transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )


@cache
def _light_table(light: tuple[float, float, float]) -> list[int]:
    """Lookup table, 3 * 256 values, for `Image.point`."""
    return [min(255, round(value * factor)) for factor in light for value in range(256)]


def _cast_shadows(canvas: Image.Image, placed: list[Placed]) -> None:
    """Darken in place the ground below whatever stands on it."""
    shadow, side = Image.new("L", canvas.size), canvas.width
    pen = ImageDraw.Draw(shadow)
    for item in placed:
        if item.grounded:
            bottom, width = item.top + item.sprite.height, item.sprite.width
            left, right = item.left + 0.06 * width, item.left + 0.94 * width
            pen.ellipse((left, bottom - 0.05 * side, right, bottom + 0.02 * side), 130)
    canvas.paste((20, 16, 30), mask=shadow.filter(ImageFilter.GaussianBlur(side / 50)))
