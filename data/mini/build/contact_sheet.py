"""Draw the contact sheets: ``python data/mini/build/contact_sheet.py``.

``figures/renders.png`` shows what the models learn from, ``figures/samples.png`` what the mini
Stable Diffusion makes of the same scenes, ``figures/reconstructions.png`` what the autoencoder
keeps of renders it has not seen.
"""

import io
import textwrap

import common
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from renderer import Scene, draw, sample_scene
from sample_dataset import HOW, MODEL
from scenes import MEDIA, SETTINGS, caption
from sprites import NOUNS

from rsdlib import files, models, runtime

OUT = files.root() / "figures"
TILE, GAP = 128, 6  # pictures are shown at twice their size
LABELS, HEADER, CAPTION = 112, 20, 54
GROUPS = 14  # pictures with several objects in the second block


def tile(picture):
    """Show each pixel as a square of four."""
    return Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST)


def scenes_of(rng):
    """Return one object in every medium and setting, then counts, "and" and "left of".

    All pictures agree with their prompts.
    """
    names = [list(NOUNS)[i] for i in rng.permutation(len(NOUNS))]
    places = [(medium, setting) for medium in MEDIA for setting in SETTINGS]
    singles = [
        Scene(
            (noun := names[i % len(names)],),
            1,
            "single",
            setting,
            medium,
            prompt=caption([noun], 1, setting, medium),
        )
        for i, (medium, setting) in enumerate(places)
    ]
    wanted, groups = ("count", "and", "left of"), []
    while len(groups) < GROUPS:
        scene = sample_scene(rng, misaligned=0)
        if scene.relation == wanted[len(groups) % len(wanted)]:
            groups.append(scene)
    return singles, groups


def sheet(singles, groups, pictures):
    """Lay out the pictures of both lists of scenes.

    A grid of media and settings, below it rows with their prompts.
    """
    step, columns = TILE + GAP, len(SETTINGS)
    rows = -(-GROUPS // (columns - 1))
    page = Image.new(
        "RGB",
        (LABELS + columns * step, HEADER + len(MEDIA) * step + 3 * GAP + rows * (step + CAPTION)),
        "white",
    )
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(13), ImageFont.load_default(10)
    for column, setting in enumerate(SETTINGS):
        pen.text(
            (LABELS + column * step + TILE / 2, HEADER / 2), setting, "black", font, anchor="mm"
        )
    for row, medium in enumerate(MEDIA):
        place = GAP, HEADER + row * step + TILE / 2
        pen.multiline_text(place, "\n".join(medium.split()), "black", font, anchor="lm")
    for i, picture in enumerate(pictures[: len(singles)]):
        page.paste(tile(picture), (LABELS + i % columns * step, HEADER + i // columns * step))
    top, wide = HEADER + len(MEDIA) * step + 3 * GAP, (page.width - GAP) // (columns - 1)
    for i, (scene, picture) in enumerate(zip(groups, pictures[len(singles) :], strict=True)):
        left, upper = GAP + i % (columns - 1) * wide, top + i // (columns - 1) * (step + CAPTION)
        page.paste(tile(picture), (left + (wide - TILE) // 2, upper))
        text = textwrap.fill(textwrap.shorten(scene.prompt, 92, placeholder=" …"), 27)
        pen.multiline_text(
            (left + wide / 2, upper + TILE + 2), text, "black", small, anchor="ma", align="center"
        )
    return page


def reconstructions(vae, pictures):
    """Lay out renders above what the autoencoder makes of them, a column for each setting."""
    pixels = (torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2)).float() - 127.5) / 127.5
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    made = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    columns, step = len(SETTINGS), TILE + GAP
    page = Image.new(
        "RGB", (columns * step, len(pictures) // columns * (2 * TILE + 3 * GAP)), "white"
    )
    for i, pair in enumerate(zip(pictures, made, strict=True)):
        for below, picture in enumerate(pair):
            page.paste(
                tile(picture),
                (i % columns * step, i // columns * (2 * TILE + 3 * GAP) + below * TILE),
            )
    return page


def save(page, name):
    """Write a sheet as PNG."""
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    with files.atomic_path(OUT / name) as temporary:
        temporary.write_bytes(buffer.getvalue())
    runtime.log(f"written: {files.relative(OUT / name)}")


def main():
    """Draw the renders; the other two if there is a model."""
    chosen = common.options(__doc__, epochs=None, renders=None)
    rng = np.random.default_rng(chosen.seed)
    singles, groups = scenes_of(rng)
    scenes = singles + groups
    drawn = [draw(scene, rng) for scene in scenes]
    save(sheet(singles, groups, drawn), "renders.png")
    if not (MODEL / "model_index.json").exists():
        return
    pipe = models.open_pipeline(MODEL, chosen.device, torch.float32)
    save(reconstructions(pipe.vae, drawn[: len(singles)]), "reconstructions.png")
    made = models.sample(pipe, [scene.prompt for scene in scenes], range(len(scenes)), **HOW)
    save(sheet(singles, groups, list(made)), "samples.png")


if __name__ == "__main__":
    main()
