"""Build the book of a profile's executed notebooks: python book/build.py --profile mini."""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from rsdlib import cli, files

HERE = Path(__file__).parent
MARK = ".rsd-book"  # lies in what may be built anew
ROOMS = ("data", "models", "training", "ensemble", "analysis")
OTHERS = ("experiment", "predict", "config", "weights", "files", "runtime", "errors", "cli")


def build(executed, out):
    """Build the book of the executed notebooks in a folder; return the front page."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        sys.exit(f"{out} holds something else than a book: choose another folder by --out")
    paths = sorted(executed.glob("[0-9][0-9]_*.ipynb"))
    notebooks = {path.name: nbformat.read(path, 4) for path in paths}
    for name in [name for name, notebook in notebooks.items() if not cli.ran_whole(notebook)]:
        print(f"left out, it did not run to its end: {name}", file=sys.stderr)
        del notebooks[name]
    if not notebooks:
        sys.exit(f"no executed notebook is in {executed}: run them first, make reproduce")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as made:
        work, site = Path(made, "sources"), Path(made, "site")
        (work / "notebooks").mkdir(parents=True)
        for name in ("conf.py", "book.css", "book.js"):
            shutil.copy(HERE / name, work)
        for name, notebook in notebooks.items():
            nbformat.write(prepared(notebook, notebooks), work / "notebooks" / name)
        _write_pages(work, [Path(name).stem for name in notebooks])
        command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-j", "2"]
        command += ["-d", str(work / "doctrees"), str(work), str(site)]
        if subprocess.run(command).returncode:
            sys.exit("Sphinx could not build the book")
        (site / MARK).touch()
        shutil.rmtree(out, ignore_errors=True)
        site.rename(out)
    return out / "index.html"


def prepared(notebook, known):
    """Return a notebook as the book shows it: code folded, figures with a text, pages alive."""
    notebook.metadata.pop("widgets", None)
    said = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _linked(cell.source, known)
            said = _first_sentence(cell.source) or said
            continue
        tags = set(cell.metadata.get("tags", []))
        cell.metadata["tags"] = sorted(
            (tags - {"parameters", "injected-parameters"}) | {"hide-input"}
        )
        cell.metadata["mystnb"] = {"image": {"alt": said, "width": "100%"}}
    return notebook


def _linked(text, known):
    """Return Markdown whose links lead to pages of the book or outside; others are text."""

    def link(match):
        there = match[2] in known or match[2].startswith(("#", "http"))
        return match[0] if there else match[1]

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)]*)\)", link, text)


def _first_sentence(text):
    """Return the first sentence of a Markdown cell, without its marks."""
    lines = [line for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if not line.startswith("#")), lines[0] if lines else "")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line)
    return re.split(r"(?<=[.?!])\s+(?=[A-Z])", re.sub(r"[*_`$#\\]", "", plain).strip())[0][:200]


def _write_pages(work, names):
    """Write the front page, and one for each room of the package."""
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"!\[[^\]]*\]\((?!http)([^)]*)\)", readme):
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE.parent / path, work / path)
    front = _linked(readme, {f"notebooks/{name}.ipynb" for name in names})
    toc = "\n\n```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```\n"
    pages = [f"notebooks/{name}" for name in names]
    rooms = [f"package/{room}" for room in (*ROOMS, *OTHERS)]
    front += toc % ("Notebooks", "\n".join(pages)) + toc % ("The package", "\n".join(rooms))
    (work / "index.md").write_text(front, encoding="utf-8")
    (work / "package").mkdir()
    for room in (*ROOMS, *OTHERS):
        inner = ":imported-members:" if room in ROOMS else ":no-imported-members:"
        text = f"# rsdlib.{room}\n\n```{{eval-rst}}\n.. automodule:: rsdlib.{room}\n   :members:\n"
        (work / "package" / f"{room}.md").write_text(f"{text}   {inner}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--out", type=Path, default=files.root() / "runs" / "book")
    asked = parser.parse_args()
    print(build(files.root() / "runs" / asked.profile / "notebooks", asked.out.absolute()))
