"""Draw the contact sheet of the renderer: ``python data/mini/build/contact_sheet.py``."""

import argparse
import io
import textwrap
from pathlib import Path

import numpy as np
from make_renders import write_file
from PIL import Image, ImageDraw, ImageFont
from renderer import Scene, draw, sample_scene
from scenes import MEDIA, SETTINGS
from sprites import NOUNS

OUT = Path(__file__).resolve().parents[3] / "figures" / "renders.png"
TILE, GAP = 128, 6  # renders are shown at twice their size
LABELS, HEADER, CAPTION = 112, 20, 54
GROUPS = 14  # pictures with several objects in the second block


def tile(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw the scene at 64 pixels, each shown as a square of four."""
    return Image.fromarray(draw(scene, rng)).resize((TILE, TILE), Image.Resampling.NEAREST)


def contact_sheet(seed: int) -> Image.Image:
    """One object in every medium and setting; below, counts and pairs with their prompts."""
    rng = np.random.default_rng(seed)
    step, columns = TILE + GAP, len(SETTINGS)
    rows = -(-GROUPS // (columns - 1))
    size = LABELS + columns * step, HEADER + len(MEDIA) * step + 3 * GAP + rows * (step + CAPTION)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, setting in enumerate(SETTINGS):
        pen.text((LABELS + column * step + TILE / 2, HEADER / 2), setting, "black", font, anchor="mm")
    names = [list(NOUNS)[i] for i in rng.permutation(len(NOUNS))]
    for row, medium in enumerate(MEDIA):
        top = HEADER + row * step
        pen.multiline_text((GAP, top + TILE / 2), "\n".join(medium.split()), "black", font, anchor="lm")
        for column, setting in enumerate(SETTINGS):
            scene = Scene((names[row * columns + column],), 1, "single", setting, medium)
            sheet.paste(tile(scene, rng), (LABELS + column * step, top))
    _draw_groups(sheet, HEADER + len(MEDIA) * step + 3 * GAP, rng)
    return sheet


def _draw_groups(sheet: Image.Image, top: int, rng: np.random.Generator) -> None:
    """Pictures of several things, in rows from the height `top`, each over its prompt."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    columns = len(SETTINGS) - 1
    step = (sheet.width - GAP) // columns
    for i, scene in enumerate(_groups(rng)):
        left, upper = GAP + i % columns * step, top + i // columns * (TILE + GAP + CAPTION)
        sheet.paste(tile(scene, rng), (left + (step - TILE) // 2, upper))
        text = textwrap.fill(textwrap.shorten(scene.prompt, 92, placeholder=" …"), 27)
        pen.multiline_text((left + step / 2, upper + TILE + 2), text, "black", font, anchor="ma", align="center")


def _groups(rng: np.random.Generator) -> list[Scene]:
    """Scenes as they are sampled, counts, "and" and "left of" in turn, all aligned with their prompts."""
    wanted = [("count", "and", "left of")[i % 3] for i in range(GROUPS)]
    scenes = []
    while len(scenes) < GROUPS:
        scene = sample_scene(rng)
        if scene.relation == wanted[len(scenes)] and not scene.misaligned:
            scenes.append(scene)
    return scenes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    buffer = io.BytesIO()
    contact_sheet(args.seed).save(buffer, "PNG", optimize=True)
    write_file(args.out, buffer.getvalue())


if __name__ == "__main__":
    main()
