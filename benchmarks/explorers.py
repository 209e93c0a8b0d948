"""Explorers of executed notebooks: time from a move until its answer is painted, and saved size.

    python benchmarks/explorers.py                   # of runs/mini, half a minute
    python benchmarks/explorers.py --profile smoke

Each explorer is taken out of its executed notebook and opened in Chromium. A move is an event of
the page itself (a click, a key, a slider, the pointer); the clock is the page's, and stops after
the next frame is painted. A median above 100 ms, or more than 2 MB saved, ends the run with an
error.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import nbformat

from rsdlib import files

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import browser, watched  # isort: skip

NOTEBOOKS = {
    "pairs": "05_curriculum",
    "dakl": "06_ensemble_dakl",
    "map": "06_ensemble_dakl",
    "swap": "07_unet_swap",
    "readers": "08_captioning",
}
# What is done at the k-th time, in the page: `$` finds an element.
MOVES = {
    "pairs": {
        "sort": "$('button').click()",
        "from": "slide($('[aria-label=from]'), k * 4)",
        "words": "write($('[type=search]'), 'abcdefghijklmnopqrst'[k])",
        "key": "press($('canvas'), 'ArrowDown')",
        "pointer": "point($('canvas'), 'mousemove', 15 + 30 * k, 15)",
    },
    "map": {
        "colour": "pick($('select'), k)",
        "words": "write($('[type=search]'), 'abcdefghijklmnopqrst'[k])",
        "key": "press($('canvas'), ['ArrowLeft', 'ArrowDown', 'ArrowRight', 'ArrowUp'][k % 4])",
        "pointer": "point($('canvas'), 'pointermove', 100 + 15 * k, 200)",
    },
    "readers": {
        "next": "$$('button')[1].click()",
        "worst": "$$('button')[4].click()",
        "words": "write($('[type=search]'), 'abcdefghijklmnopqrst'[k])",
    },
    "swap": {f"slider {n}": f"slide($$('[type=range]')[{n}], k % 2 + 1)" for n in range(3)},
    "dakl": {f"slider {n}": f"slide($$('[type=range]')[{n}], k % 5)" for n in range(3)},
}
TOOLS = """
const $$ = (query) => document.querySelectorAll(query);
const $ = (query) => $$(query)[0];
const send = (node, event) => node.dispatchEvent(event);
const write = (node, text) => { node.value = text; send(node, new Event("input")); };
const slide = write;
const pick = (node, k) => {
  node.selectedIndex = k % node.length;
  send(node, new Event("change"));
};
const press = (node, key) => send(node, new KeyboardEvent("keydown", { key, bubbles: true }));
const point = (node, kind, x, y) => {
  const { left, top } = node.getBoundingClientRect();
  send(node, new PointerEvent(kind, { clientX: left + x, clientY: top + y, bubbles: true }));
};
const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
"""
TIMES = 20


def frame_of(notebook, name):
    """Return an explorer's frame out of an executed notebook, as HTML."""
    pages = [
        out["data"]["text/html"]
        for cell in notebook.cells
        for out in cell.get("outputs", ())
        if f'<iframe title="{name}"' in out.get("data", {}).get("text/html", "")
    ]
    return pages[-1]


def milliseconds(frame, move):
    """Return the milliseconds until each of several moves is painted."""
    script = f"async () => {{ {TOOLS} const taken = []; for (let k = 0; k < {TIMES}; k++) {{"
    script += f"await painted(); const start = performance.now(); {move}; await painted();"
    script += "taken.push(performance.now() - start); } return taken; }"
    return frame.evaluate(script)


def main():
    """Print a line for each kind of move."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="mini")
    folder = files.root() / "runs" / parser.parse_args().profile / "notebooks"
    good = True
    print(f"{os.cpu_count()} cores; milliseconds until painted, {TIMES} moves each")
    print(f"{'explorer':>10} {'MB':>5} {'move':>10} {'median':>7} {'most':>6}")
    with tempfile.TemporaryDirectory() as place, browser() as chromium:
        for name, source in NOTEBOOKS.items():
            content = frame_of(nbformat.read(folder / f"{source}.ipynb", as_version=4), name)
            good &= len(content) <= 2e6
            path = Path(place) / f"{name}.html"
            path.write_text(f"<!doctype html><meta charset=utf-8>{content}", encoding="utf-8")
            with watched(chromium) as page:
                page.goto(path.as_uri())
                page.frames[1].locator(".rsd .bar").first.wait_for()
                for kind, move in MOVES[name].items():
                    taken = milliseconds(page.frames[1], move)
                    median, most = statistics.median(taken), max(taken)
                    good &= median <= 100
                    size = f"{len(content) / 1e6:5.2f}"
                    print(f"{name:>10} {size} {kind:>10} {median:7.1f} {most:6.1f}", flush=True)
    if not good:
        sys.exit("an answer took longer than 100 ms, or an explorer is larger than 2 MB")


if __name__ == "__main__":
    main()
