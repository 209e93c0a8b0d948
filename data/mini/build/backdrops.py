"""The eight settings, drawn procedurally: sky, ground, and what tells a place without colour.

All positions are fractions of the picture's side, so that a backdrop looks the same at any size.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = Iterable[tuple[float, float]]


class Backdrop(NamedTuple):
    """An empty place.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB, square.
    floor : float or None
        Height (fraction from the top) on which things stand; None where everything floats.
    light : tuple of float
        Factors on red, green and blue of whatever is put there.
    """

    image: Image.Image
    floor: float | None
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)


class Brush:
    """Draws on a square picture in fractions of its side; every colour is jittered a little."""

    def __init__(self, image: Image.Image, rng: np.random.Generator):
        self.image, self.rng, self.side = image, rng, image.width
        self.draw = ImageDraw.Draw(image)

    def tone(self, colour: Colour, spread: float = 8) -> Colour:
        """Return `colour` with a brightness and a hue jitter of about `spread` of 255."""
        shift = self.rng.normal(0, spread) + self.rng.normal(0, spread / 2, 3)
        return tuple(int(c) for c in np.clip(np.add(colour, shift), 0, 255))

    def disc(self, x: float, y: float, radius: float, colour: Colour, squash: float = 1.0) -> None:
        """Fill a disc, or with `squash` below 1 a flat ellipse."""
        self.draw.ellipse(self._box(x, y, radius, squash), colour)

    def ring(
        self, x: float, y: float, radius: float, colour: Colour, width: float, squash: float = 1.0
    ) -> None:
        """Draw the outline of a disc or a flat ellipse."""
        self.draw.ellipse(
            self._box(x, y, radius, squash), outline=colour, width=max(1, round(self.side * width))
        )

    def _box(self, x: float, y: float, radius: float, squash: float) -> list[float]:
        high = radius * squash
        return [self.side * edge for edge in (x - radius, y - high, x + radius, y + high)]

    def polygon(self, points: Points, colour: Colour) -> None:
        """Fill a polygon."""
        self.draw.polygon([(self.side * x, self.side * y) for x, y in points], colour)

    def line(self, points: Points, colour: Colour, width: float) -> None:
        """Draw a line through all points."""
        self.draw.line(
            [(self.side * x, self.side * y) for x, y in points],
            colour,
            max(1, round(self.side * width)),
        )

    def ridge(self, height: float, swell: float, colour: Colour, waves: float = 1.0) -> None:
        """Fill everything below a wavy line at about `height`, `swell` up and down."""
        x = np.linspace(0, 1, 25)
        phase = self.rng.uniform(0, 2 * np.pi, 2)
        y = height + swell * (
            0.7 * np.sin(waves * 5 * x + phase[0]) + 0.3 * np.sin(waves * 12 * x + phase[1])
        )
        self.polygon([(0, 1), *zip(x, y, strict=True), (1, 1)], colour)

    def dots(
        self, number: int, low: float, high: float, radius: tuple[float, float], colour: Colour
    ) -> None:
        """Draw `number` small discs between the heights `low` and `high`."""
        for x, y, r in self.rng.random((number, 3)).tolist():
            self.disc(x, low + (high - low) * y, radius[0] + (radius[1] - radius[0]) * r**2, colour)


def sky(rng: np.random.Generator, size: int, *colours: Colour) -> Brush:
    """Start a picture with a vertical gradient through `colours`, evenly spaced from the top."""
    at = np.linspace(0, size - 1, len(colours))
    jittered = np.clip(np.array(colours, float) + rng.normal(0, 7, 3) + rng.normal(0, 6), 0, 255)
    column = np.stack(
        [np.interp(np.arange(size), at, jittered[:, c]) for c in range(3)], axis=1
    )  # (size, 3)
    return Brush(
        Image.fromarray(np.broadcast_to(column[:, None].astype(np.uint8), (size, size, 3)).copy()),
        rng,
    )


def beach(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw sand, a shore with foam, the sea and a sunny sky."""
    brush = sky(rng, size, (84, 170, 238), (168, 218, 250), (214, 240, 252))
    horizon, shore = rng.uniform(0.34, 0.44), rng.uniform(0.6, 0.68)
    brush.disc(rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.18), 0.08, (255, 244, 170))
    _cloud(brush, rng.uniform(0, 1), rng.uniform(0.1, 0.26))
    brush.polygon([(0, horizon), (1, horizon), (1, 1), (0, 1)], brush.tone((28, 122, 190)))
    for y in np.linspace(horizon + 0.05, shore, 4):
        brush.ridge(y, 0.006, brush.tone((38, 150, 205)), waves=3)
        x = rng.random()
        brush.line([(x, y - 0.02), (x + rng.uniform(0.1, 0.25), y - 0.02)], (190, 232, 245), 0.008)
    state = rng.integers(2**32)
    foam, wet, dry = (244, 252, 255), brush.tone((206, 172, 118)), brush.tone((240, 212, 154))
    for offset, colour in ((0.0, foam), (0.03, wet), (0.06, dry)):
        wave = Brush(brush.image, np.random.default_rng(state))  # the same wavy line thrice
        wave.ridge(shore + offset, 0.022, colour)
    brush.dots(30, shore + 0.12, 1.0, (0.004, 0.008), (208, 174, 118))
    return Backdrop(brush.image, 0.86)


def forest(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw three rows of trees, the nearest the darkest, behind a meadow."""
    brush = sky(rng, size, (126, 178, 112), (196, 226, 152), (206, 226, 150))
    ground = rng.uniform(0.6, 0.7)
    for depth, number in ((0.0, 7), (0.5, 5), (1.0, 3)):
        bark = brush.tone(_mix((138, 166, 104), (88, 58, 38), depth))
        for x in rng.permutation(np.arange(number) + 0.5) / number + rng.normal(0, 0.05, number):
            half, foot = (
                (0.014 + 0.024 * depth) * rng.uniform(0.8, 1.3),
                ground + 0.02 + 0.05 * depth,
            )
            brush.polygon(
                [(x - half * 0.7, 0), (x + half * 0.7, 0), (x + half, foot), (x - half, foot)], bark
            )
            brush.disc(x, foot, half * 1.8, bark, 0.3)
        for x in rng.random(6 + number):
            leaves = brush.tone(_mix((122, 176, 92), (36, 104, 46), depth))
            brush.disc(
                x, rng.uniform(-0.04, 0.16) - 0.07 * depth, rng.uniform(0.09, 0.15), leaves, 0.8
            )
        if depth < 1:
            brush.ridge(
                ground - 0.03 + 0.04 * depth,
                0.015,
                brush.tone(_mix((130, 172, 84), (96, 146, 64), depth)),
                2,
            )
    brush.ridge(ground + 0.06, 0.015, brush.tone((74, 122, 50)))
    for x, y in zip(rng.random(26), rng.uniform(ground + 0.1, 1, 26), strict=True):
        brush.line(
            [(x - 0.012, y - 0.03), (x, y), (x + 0.014, y - 0.026)], brush.tone((48, 92, 38)), 0.01
        )
    return Backdrop(brush.image, 0.86)


def night(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw stars and a crescent above dark hills."""
    brush = sky(rng, size, (10, 14, 52), (24, 34, 92), (58, 66, 132))
    brush.dots(55, 0.0, 0.68, (0.003, 0.009), (245, 242, 220))
    x, y, r = (
        rng.uniform(0.1, 0.3) + 0.6 * rng.integers(2),
        rng.uniform(0.12, 0.22),
        rng.uniform(0.085, 0.11),
    )
    brush.disc(x, y, r * 1.25, (50, 58, 112))
    brush.disc(x, y, r, (252, 246, 206))
    brush.disc(x + r * 0.45, y - r * 0.2, r * 0.85, (38, 46, 104))
    brush.ridge(rng.uniform(0.56, 0.64), 0.05, brush.tone((26, 36, 84)), 1.2)
    brush.ridge(rng.uniform(0.7, 0.74), 0.025, brush.tone((34, 62, 82)))
    return Backdrop(brush.image, 0.87, (0.88, 0.9, 1.0))


def snow(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw snowy pines between white slopes."""
    brush = sky(rng, size, (150, 184, 214), (196, 218, 236), (226, 236, 246))
    ground = rng.uniform(0.58, 0.66)
    brush.ridge(ground - 0.06, 0.05, brush.tone((206, 220, 236)))
    for x in rng.random(6):
        _snowy_pine(brush, x, ground + rng.uniform(0.0, 0.06), rng.uniform(0.24, 0.4))
    brush.ridge(ground + 0.04, 0.025, brush.tone((232, 240, 248), 4))
    brush.ridge(ground + 0.18, 0.02, brush.tone((248, 251, 254), 2))
    return Backdrop(brush.image, 0.86, (0.97, 0.98, 1.0))


def sunset(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a big low sun and its mirror image in the sea."""
    brush = sky(
        rng, size, (78, 36, 108), (208, 62, 96), (252, 140, 58), (255, 204, 96), (255, 214, 120)
    )
    horizon, x, r = rng.uniform(0.6, 0.68), rng.uniform(0.25, 0.75), rng.uniform(0.2, 0.27)
    brush.disc(x, horizon - 0.06, r * 1.18, brush.tone((255, 176, 84), 4))
    brush.disc(x, horizon - 0.06, r, brush.tone((255, 238, 150), 4))
    for y in rng.uniform(0.1, horizon - 0.12, 4):
        left = rng.uniform(-0.1, 0.8)
        brush.line(
            [(left, y), (left + rng.uniform(0.2, 0.5), y)], brush.tone((240, 110, 86)), 0.018
        )
    brush.ridge(horizon, 0.012, brush.tone((112, 40, 84)))
    for y in np.linspace(horizon + 0.05, 0.97, 6):  # the sun mirrored in the water
        half = r * rng.uniform(0.3, 0.9)
        brush.line([(x - half, y), (x + half, y)], brush.tone((250, 160, 88)), 0.014)
    return Backdrop(brush.image, 0.87, (1.0, 0.86, 0.78))


def under_the_sea(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw shafts of light, seaweed and the sea bed."""
    brush = sky(rng, size, (92, 214, 232), (26, 142, 196), (12, 74, 142))
    for x in rng.uniform(-0.1, 1.0, 4):  # shafts of light
        shaft = Image.new("L", brush.image.size)
        Brush(shaft, rng).polygon([(x, 0), (x + 0.08, 0), (x + 0.02, 0.85), (x - 0.26, 0.85)], 46)
        brush.image.paste((190, 246, 250), mask=shaft)
    for x in rng.random(7):
        _seaweed(brush, x, rng.uniform(0.16, 0.4))
    brush.ridge(rng.uniform(0.8, 0.86), 0.02, brush.tone((196, 186, 132)))
    brush.dots(14, 0.9, 1.0, (0.008, 0.02), (150, 148, 118))
    return Backdrop(brush.image, 0.9, (0.84, 0.97, 1.0))


def desert(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw dunes before table mountains."""
    brush = sky(rng, size, (92, 166, 226), (186, 214, 226), (252, 226, 176))
    brush.disc(
        rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.2), rng.uniform(0.06, 0.08), (255, 250, 214)
    )
    top = rng.uniform(0.36, 0.44)
    for x, half in zip(
        rng.uniform(0, 1, 2), rng.uniform(0.07, 0.13, 2), strict=True
    ):  # table mountains
        peak, foot, rock = top - rng.uniform(0.0, 0.08), half * 1.5, brush.tone((196, 124, 82))
        brush.polygon([(x - half, peak), (x + half, peak), (x + foot, 0.6), (x - foot, 0.6)], rock)
    for layer, colour in enumerate(((222, 160, 96), (236, 178, 108), (246, 196, 124))):
        _dune(brush, rng.uniform(0.1, 0.9), top + 0.09 + 0.13 * layer, colour)
    return Backdrop(brush.image, 0.86, (1.0, 0.98, 0.92))


def outer_space(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw stars, a violet nebula and one or two planets."""
    nebula = rng.uniform(0, 1, (5, 5, 1)) ** 2 * rng.uniform(
        (50, 10, 60), (140, 50, 150)
    )  # (5, 5, 3) violet
    haze = Image.fromarray(np.add(nebula, (12, 8, 30)).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    brush = Brush(haze, rng)
    brush.dots(75, 0.0, 1.0, (0.003, 0.009), (250, 248, 240))
    for left in rng.permutation(2)[: rng.integers(1, 3)]:
        x, y = rng.uniform(0.06, 0.2), rng.uniform(0.1, 0.27)
        _planet(brush, *((x, y) if left else (1 - x, 1 - y)), rng.uniform(0.11, 0.18))
    return Backdrop(brush.image, None)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


def _cloud(brush: Brush, x: float, y: float) -> None:
    for dx, r in ((-0.1, 0.05), (-0.03, 0.07), (0.05, 0.06), (0.11, 0.04)):
        brush.disc(x + dx, y, r, (250, 253, 255), 0.6)


def _snowy_pine(brush: Brush, x: float, foot: float, height: float) -> None:
    green = brush.tone((58, 98, 92))
    for tier in (0.0, 0.3, 0.6):
        half, low, high = (
            height * (0.34 - 0.3 * tier),
            foot - height * tier,
            foot - height * (tier + 0.48),
        )
        brush.polygon([(x - half, low), (x, high), (x + half, low)], green)
        left, right = (x - half * 0.6, low - 0.19 * height), (x + half * 0.5, low - 0.22 * height)
        brush.polygon([left, (x, high), right], (240, 246, 252))


def _seaweed(brush: Brush, x: float, height: float) -> None:
    y = np.linspace(0, 1, 9)
    bend = x + 0.025 * np.sin(7 * y + brush.rng.uniform(0, 6)) * (0.3 + y)
    brush.line(list(zip(bend, 0.92 - height * y, strict=True)), brush.tone((24, 122, 88)), 0.03)


def _dune(brush: Brush, x: float, top: float, colour: Colour) -> None:
    """Draw a dune with its crest at `x`, one flank in the light, the other in the shade."""
    lit, shade = brush.tone(colour, 5), brush.tone(_mix(colour, (150, 84, 48), 0.35), 5)
    brush.ridge(top + 0.1, 0.015, lit)
    t = np.linspace(0, 1, 10)
    down = top + 0.15 * t**1.2
    reaches = 0.06 * np.sin(4 * t), -0.6 * t, 0.45 * t
    crest, left, right = (list(zip(x + reach, down, strict=True)) for reach in reaches)
    brush.polygon([*left, *reversed(right)], lit)
    brush.polygon([*crest, *reversed(right)], shade)


def _planet(brush: Brush, x: float, y: float, radius: float) -> None:
    palette = ((226, 138, 84), (112, 156, 226), (196, 120, 200), (222, 196, 132))
    colour = brush.tone(palette[brush.rng.integers(len(palette))], 12)
    brush.disc(x, y, radius, _mix(colour, (20, 10, 40), 0.45))
    brush.disc(x - radius * 0.1, y - radius * 0.1, radius * 0.88, colour)
    if brush.rng.random() < 0.6:
        brush.ring(x, y, radius * 1.7, _mix(colour, (255, 255, 255), 0.5), 0.016, squash=0.3)
    else:
        for dx, dy, r in ((-0.4, -0.3, 0.2), (0.25, 0.2, 0.26), (0.1, -0.5, 0.13)):
            brush.disc(
                x + dx * radius, y + dy * radius, r * radius, _mix(colour, (20, 10, 40), 0.25)
            )


BACKDROPS: dict[str, Callable[[np.random.Generator, int], Backdrop]] = {
    "beach": beach,
    "forest": forest,
    "night": night,
    "snow": snow,
    "sunset": sunset,
    "under the sea": under_the_sea,
    "desert": desert,
    "outer space": outer_space,
}


def foreground(image: Image.Image, setting: str, rng: np.random.Generator) -> None:
    """Draw in place what floats before the things: snowflakes or bubbles."""
    brush = Brush(image, rng)
    if setting == "snow":
        brush.dots(26, 0.0, 1.0, (0.006, 0.014), (255, 255, 255))
    elif setting == "under the sea":
        for x, y, r in zip(rng.random(9), rng.random(9), rng.uniform(0.014, 0.034, 9), strict=True):
            brush.ring(x, y, r, (220, 250, 255), 0.012)
