"""Write the page that ``make lab`` opens: what is here, what is computed, a picture and a map.

Nothing is trained or imported that takes long: the page is a notebook whose outputs are there.
"""

import base64
import os
import re
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rsdlib import cli, files

ROOT = Path(__file__).parents[1]
PICTURE, MAP = "01_vit_neighbours.png", "06_map.html"
HELLO = """# Reverse Stable Diffusion: start here

*What prompt was used to generate this image?* Open a notebook by its name; it runs on its own, from
the top (*Run > Run All Cells*), and makes what it needs and does not find. Its second cell holds
the parameters. `profile = "smoke"` is for a quick look, `"mini"` for a laptop, `"desk"` for real
pictures.

| notebook | question | minutes | computed here |
|---|---|---|---|
"""


def notebooks(readme):
    """Return name, question and minutes of each notebook, as the README's table has them."""
    row = re.compile(r"^\| \[(\d\d_\w+)\]\([^)]*\) \| (.*?) \| (.*?) \|$", re.M)
    return row.findall(readme)


def computed(name, runs):
    """Return links to the executed notebooks of a name, the newest first."""
    found = sorted(runs.glob(f"*/notebooks/{name}.ipynb"), key=lambda p: -p.stat().st_mtime)
    found = [path for path in found if cli.ran_whole(nbformat.read(path, 4))]
    when = {
        path: time.strftime("%d %b %H:%M", time.localtime(path.stat().st_mtime)) for path in found
    }
    return ", ".join(f"[{p.parts[-3]}]({p.relative_to(runs).as_posix()}), {when[p]}" for p in found)


def shipped(name, kind, runs):
    """Return the content of a figure: as it ships, else the newest that was made here."""
    paths = [ROOT / "figures" / name]
    paths += sorted(runs.glob(f"*/figures-*/{name}"), key=lambda p: -p.stat().st_mtime)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    content = path.read_bytes()
    return content.decode() if kind == "text/html" else base64.b64encode(content).decode()


def page(runs):
    """Return the start page as a notebook."""
    rows = notebooks((ROOT / "README.md").read_text(encoding="utf-8"))
    to = Path(os.path.relpath(files.root() / "notebooks", runs)).as_posix()
    table = "".join(
        f"| [{name}]({to}/{name}.ipynb) | {question} | {minutes} | {computed(name, runs)} |\n"
        for name, question, minutes in rows
    )
    cells = [new_markdown_cell(HELLO + table)]
    shows = [
        ("Test images, their true prompts, and the nearest training prompts", PICTURE, "image/png"),
        ("The map of the test prompts: point, colour, draw a line around some", MAP, "text/html"),
    ]
    for title, name, kind in shows:
        content = shipped(name, kind, runs)
        if content is not None:
            output = new_output("display_data", {kind: content, "text/plain": title})
            source = f"# {title}: figures/{name}"
            cells += [new_code_cell(source, outputs=[output], execution_count=len(cells))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def main():
    """Write the start page, trusted, so that its map is alive when it opens."""
    runs = files.root() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    notebook = page(runs)
    temporary = runs / ".start.ipynb.tmp"
    nbformat.write(notebook, temporary)
    temporary.replace(runs / "start.ipynb")
    cli.trust(nbformat.read(runs / "start.ipynb", 4))


if __name__ == "__main__":
    main()
