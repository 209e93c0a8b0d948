"""The seven media: transforms that turn a scene into a painting, a drawing or a photograph.

Every filter takes the scene ``(size, size, 3)``, the coverage of its objects ``(size, size)`` and a
generator, both arrays float32 in [0, 1], and returns a picture of the scene's shape. `size` is
twice the size of the final picture.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

GREY = np.array([0.299, 0.587, 0.114], np.float32)


def blur(array: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of values in [0, 1], (h, w) or (h, w, 3), wide ones at half the resolution."""
    pixels = Image.fromarray((array * 255).astype(np.uint8))
    if radius < 2.5:
        pixels = pixels.filter(ImageFilter.GaussianBlur(radius))
    else:
        small = pixels.reduce(2).filter(ImageFilter.GaussianBlur(radius / 2))
        pixels = small.resize(pixels.size, Image.Resampling.BILINEAR)
    return np.asarray(pixels, np.float32) / 255


def brightest(array: np.ndarray) -> np.ndarray:
    """Largest of three channels, (h, w, 3) -> (h, w); much faster than over the short axis."""
    return np.maximum(np.maximum(array[..., 0], array[..., 1]), array[..., 2])


def outline(array: np.ndarray) -> np.ndarray:
    """Strength of edges, (h, w) or (h, w, 3) -> (h, w): the largest step across or down.

    The largest over all channels.
    """
    steps = np.zeros_like(array)
    steps[:, 1:-1] = np.abs(array[:, 2:] - array[:, :-2])
    steps[1:-1] = np.maximum(steps[1:-1], np.abs(array[2:] - array[:-2]))
    return brightest(steps) if array.ndim == 3 else steps


def noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in [0, 1], (size, size), with about `cells` bumps along a side."""
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def vignette(size: int) -> np.ndarray:
    """Squared distance from the centre, (size, size, 1): 0 there, 1 in the corners."""
    axis = np.linspace(-1, 1, size, dtype=np.float32) ** 2
    return ((axis + axis[:, None]) / 2)[..., None]


def render_3d(scene: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft studio look: the background out of focus, light from the upper left, darker corners."""
    size = len(mask)
    focus = blur(mask, size / 64)[..., None]
    scene = scene * (1 + 0.12 * mask[..., None])
    light = np.linspace(1.12, 0.9, size, dtype=np.float32)[:, None, None] - 0.18 * vignette(size)
    soft = blur(scene, size / 50)
    return (soft + (scene - soft) * np.clip(focus * 1.6, 0, 1)) * light


def cartoon(scene: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flat bright colours and a black line around every object."""
    flat = np.round(scene * 7) / 7
    grey = (flat @ GREY)[..., None]
    line = np.clip(outline(blur(mask, len(mask) / 110)) * 2.4 - 0.5, 0, 1)[..., None]
    return np.clip(grey + (flat - grey) * 1.35, 0, 1) * (1 - line)


def pencil_sketch(scene: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Graphite on paper: contours, hatching where it is dark, objects drawn with more pressure."""
    size = len(mask)
    grey = scene @ GREY
    tone = grey * mask + (0.45 + 0.55 * grey) * (1 - mask)
    lines = np.clip(outline(blur(grey, size / 180)) * (1.3 + 1.5 * mask), 0, 0.9)
    lines = np.maximum(lines, np.clip(outline(blur(mask, size / 160)) * 1.6, 0, 0.95))
    across = np.arange(size, dtype=np.float32) * (128 / size)
    hatch = 0.5 + 0.5 * np.sin(
        (across + across[:, None]) * rng.uniform(0.62, 0.8) + 5 * noise(rng, size, 6)
    )
    shade = np.clip(0.95 - tone, 0, 1) ** 1.2 * (0.6 + 0.35 * hatch)
    paper = 0.97 - 0.05 * noise(rng, size, size // 2)
    graphite = paper * (1 - np.clip(np.maximum(lines, 0.85 * shade), 0, 1))
    return graphite[..., None] * np.array([1.0, 0.985, 0.96], np.float32)


def pixel_art(scene: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hard squares at a quarter of the resolution, 32 vivid colours, objects with a dark rim."""
    size = len(mask)
    rim = np.clip(outline(blur(mask, size / 100)) * 1.3 - 0.2, 0, 0.8)[..., None]
    vivid = (
        scene
        + (scene - (scene @ GREY)[..., None]) * 0.25
        + (scene - 0.4) * (0.25 * mask[..., None])
    )
    small = Image.fromarray((np.clip(vivid * (1 - rim), 0, 1) * 255).astype(np.uint8)).reduce(4)
    few = small.quantize(32, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB")
    return np.asarray(few.resize((size, size), Image.Resampling.NEAREST), np.float32) / 255


def watercolor(scene: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bleeding light washes on grained paper, darker at their rims, fading towards the margin."""
    size = len(mask)
    shift = ((np.stack([noise(rng, size, 14), noise(rng, size, 14)]) - 0.5) * size / 20).astype(int)
    rows, columns = np.clip(np.indices((size, size)) + shift, 0, size - 1)
    wash = blur(scene[rows, columns], size / 140)
    cover = blur(mask[rows, columns], size / 140)[..., None]
    rim = outline(wash)[..., None] * (0.4 + 0.8 * cover)
    density = (0.62 + 0.3 * cover) * (0.82 + 0.36 * noise(rng, size, 7)[..., None])
    paint = 1 - (1 - wash) * density - 0.45 * rim * (1 - 0.5 * wash)
    margin = np.clip((vignette(size) + 0.5 * noise(rng, size, 9)[..., None] - 0.62) * 4, 0, 1) * (
        1 - cover
    )
    paper = 0.985 - 0.05 * noise(rng, size, size // 2)[..., None]
    return (paint + (1 - paint) * margin) * paper


def neon(scene: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glowing tubes along the objects' contours before a dim, violet night view of the place."""
    size = len(mask)
    vivid = scene / (brightest(scene) + 0.05)[..., None]
    vivid = np.clip(vivid + (vivid - (vivid @ GREY)[..., None]) * 0.8, 0.12, 1)
    inner = outline(blur(scene, size / 150)) * 1.5 * mask
    contour = outline(blur(mask, size / 90)) * 2.2
    place = outline(blur(scene, size / 128)) * 0.8 * (1 - mask)
    tube = np.clip(np.maximum(np.maximum(inner, contour), place), 0, 1)[..., None] * vivid
    glow = blur(np.clip(tube, 0, 1), size / 28) * 1.5
    dim = scene * (0.10 + 0.28 * mask[..., None]) + np.array([0.035, 0.0, 0.075], np.float32)
    core = np.clip(contour - 0.8, 0, 0.5)[..., None]
    return dim + tube + glow + core


def sepia_photograph(scene: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brown tones, soft contrast, film grain and a vignette; at times a pale frame."""
    size = len(mask)
    grey = blur(scene, size / 200) @ GREY
    thing = np.clip(grey + 0.5 * (grey - 0.45) + 0.5 * (grey - blur(grey, size / 20)), 0.03, 1)
    place = np.clip(
        0.1 + 0.8 * blur(grey, size / 100) + 0.6 * (grey - blur(grey, size / 10)), 0.03, 1
    )
    halo = blur(mask, size / 20)
    gap = np.average(thing, weights=mask + 1e-6) - np.average(
        place, weights=halo * (1 - mask) + 1e-6
    )
    place -= np.copysign(max(0.0, 0.35 - abs(gap)), gap) * np.minimum(
        1.6 * halo, 1
    )  # part them where they would merge
    grey = thing * mask + place * (1 - mask)
    grey += rng.normal(0, 0.03, mask.shape).astype(np.float32)
    tone = np.clip(0.08 + 0.9 * grey, 0, 1)[..., None] - 0.25 * vignette(size)
    photo = np.clip(tone, 0, 1) ** np.array([0.78, 1.0, 1.42], np.float32)
    if rng.random() < 0.4:
        edge = round(size * 0.04)
        frame = np.ones_like(photo, dtype=bool)
        frame[edge:-edge, edge:-edge] = False
        photo = np.where(frame, np.array([0.93, 0.88, 0.77], np.float32), photo)
    return photo


FILTERS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "3d render": render_3d,
    "cartoon": cartoon,
    "pencil sketch": pencil_sketch,
    "pixel art": pixel_art,
    "watercolor": watercolor,
    "neon": neon,
    "sepia photograph": sepia_photograph,
}
