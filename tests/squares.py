"""A folder of pairs in which much is known: coloured squares, and prompts that name the colour."""

import pandas as pd
from PIL import Image

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 30),
    "blue": (30, 30, 200),
    "grey": (128, 128, 128),
}
THINGS = [
    "house",
    "tree",
    "boat",
    "castle",
    "dragon",
    "flower",
    "robot",
    "wizard",
    "garden",
    "bridge",
    "tower",
    "lake",
]


def write(folder, things=THINGS, size=(70, 64)):
    """Write the folder: the thing is in the prompt alone, the colour in both."""
    folder.mkdir(exist_ok=True)
    rows = []
    for thing in things:
        for colour, pixel in COLOURS.items():
            name = f"{thing}-{colour}.png"
            Image.new("RGB", size, pixel).save(folder / name)
            prompt = f"a {colour} {thing}, oil painting by an old master of {thing}s"
            rows.append({"file_name": name, "prompt": prompt})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder
