"""Explorers: figures that answer a hand.

Each is one module of plain JavaScript (``js/``) over one packed text, in a frame of its own: the
same in JupyterLab, where selections come back to Python, in a saved notebook and in a page. Nothing
comes from elsewhere. In a terminal an explorer is a few lines of text.
"""

import base64
import html
import io
import uuid
import zlib
from pathlib import Path

import anywidget
import numpy as np
import pandas as pd
import traitlets
from PIL import Image
from pydantic_core import to_json

from rsdlib import data, files, runtime
from rsdlib.errors import BadValueError

MOST = 6000  # pictures in one sheet: an explorer's saved form stays below 2 MB


def _read(name):
    return (Path(__file__).parent / "js" / name).read_text(encoding="utf-8")


class Explorer(anywidget.AnyWidget):
    """What every explorer is: a page, and in JupyterLab what was chosen in it.

    The page lies in a frame and needs nothing else, so that a saved notebook stays alive; the
    widget has no view, it carries what page and Python tell each other.

    Attributes
    ----------
    selected : list of int
        The rows that were selected by hand.
    frame : pandas.DataFrame or None
        The table behind it.
    """

    _esm = _read("bridge.js")
    key = traitlets.Unicode().tag(sync=True)

    def __init__(self, name, content, text, height, frame=None, answer=None):
        self.name, self.text, self.height = name, text, height
        self.packed, self.frame, self.answer = _packed(content), frame, answer
        self.selected = []
        super().__init__(key=uuid.uuid4().hex)
        self.on_msg(self._hear)

    def _hear(self, _, told, buffers):
        if "selected" in told:
            self.selected = told["selected"]
        elif "question" in told:
            self.send({"packed": _packed(self.answer(told["question"]))})
        else:  # a page asks whether somebody listens
            self.send({"live": True, "selected": self.selected})

    @property
    def rows(self):
        """The selected rows of the table."""
        return self.frame.iloc[self.selected]

    def __repr__(self):
        return self.text

    def page(self):
        """Return the explorer as an HTML frame that needs nothing else."""
        page = _read("page.html").replace("MODULES", _read("common.js") + _read(f"{self.name}.js"))
        page = page.replace("its key", self.key).replace("what it shows", self.packed)
        style = f"width:100%;height:{self.height}px;border:0"
        frame = f'<iframe title="{self.name}" sandbox="allow-scripts" style="{style}" srcdoc="'
        return f'{frame}{html.escape(page)}"></iframe>'

    def _repr_mimebundle_(self, **_):
        return {"text/plain": self.text, "text/html": self.page()}


def _packed(content):
    text = to_json(content, inf_nan_mode="null", fallback=lambda array: array.tolist())
    return base64.b64encode(zlib.compress(text, 9)).decode()


def _sheet(pictures, side, quality=60):
    """Return pictures (n, 3, s, s) as one image, and where each lies in it."""
    if not len(pictures):
        raise BadValueError("there is no picture to show")
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for number, picture in enumerate(pictures):
        small = Image.fromarray(picture.transpose(1, 2, 0)).resize((side, side))
        sheet.paste(small, (number % columns * side, number // columns * side))
    stream = io.BytesIO()
    sheet.save(stream, "WEBP", quality=quality)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return {"sheet": f"data:image/webp;base64,{encoded}", "side": side, "columns": columns}


def spread(rows, most=MOST):
    """Return at most so many of some rows, evenly spaced."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)
    return np.asarray(rows)[places]


def _columns(pictures, frame):
    """Return a table's columns as the modules take them: prompts, numbers, kinds, flags."""
    if len(pictures) != len(frame):
        raise BadValueError(f"there are {len(pictures)} pictures and {len(frame)} rows")
    if not frame.columns.is_unique or len(frame.columns) < 2:
        fix = "Hand in a column prompt and others, each once."
        raise BadValueError(f"the table has the columns {[*frame]}", fix)
    columns = {"prompts": _texts(frame["prompt"], ""), "numbers": {}, "kinds": {}, "flags": {}}
    for name in frame.columns.drop("prompt"):
        values = frame[name]
        if pd.api.types.is_bool_dtype(values):
            columns["flags"][name] = values.fillna(False).astype(int).tolist()
        elif pd.api.types.is_numeric_dtype(values):
            numbers = values.to_numpy(float, na_value=np.nan)
            columns["numbers"][name] = [float(f"{number:.6g}") for number in numbers]
        else:
            columns["kinds"][name] = _texts(values, "–")
    return columns


def _texts(values, missing):
    return [missing if pd.isna(value) else runtime.shown(value) for value in values]


# --- the explorers --------------------------------------------------------------------------------


def explore_readers(pictures, prompts, answers, targets=None, notes=None, ask=None):
    """Look at one picture after another, and at what every reader makes of it.

    Parameters
    ----------
    pictures : ndarray (n, 3, s, s), uint8
    prompts : sequence of str (n)
        The true ones, "" where none is known.
    answers : dict of str to rsdlib.predict.Prediction
        By the readers' names, of all pictures.
    targets : ndarray (n, d), optional
        The prompts' embeddings: best and worst are judged by them.
    notes : sequence of str (n), optional
        What else is to be said of each picture.
    ask : callable, optional
        Takes an image's path or its bytes and returns picture, prompt and answers of that one; it
        can then be handed in by the reader.

    Returns
    -------
    Explorer
    """
    prompts = _texts(prompts, "")
    shown = _readings(pictures, prompts, answers, targets)
    shown |= {"notes": notes, "asks": ask is not None}
    first = [answer.lines(0, name, prompts[0]) for name, answer in answers.items()]
    count = f"{len(prompts)} pictures, {len(answers)} readers. The first:"
    text = "\n".join([count, f"TRUE: {prompts[0]}", *first])

    def answer(question):
        try:
            asked = (
                question["path"] if "path" in question else base64.b64decode(question["content"])
            )
            picture, prompt, read = ask(asked)
            target = data.embed([prompt]) if prompt else None
            own = {"asks": True, "own": True}
            return _readings(picture[None], _texts([prompt], ""), read, target) | own
        except Exception as error:  # whatever it is, it is said where it was asked
            return shown | {"said": str(error) or type(error).__name__}

    return Explorer("readers", shown, text, 560, answer=answer)


def _readings(pictures, prompts, answers, targets):
    readers = {}
    for name, answer in answers.items():
        readers[name] = [_reading(answer, i, prompt) for i, prompt in enumerate(prompts)]
        if targets is not None:
            cosines = data.cosine(answer.embeddings, targets).round(4).tolist()
            for reading, cosine in zip(readers[name], cosines, strict=True):
                reading["cosine"] = cosine
    content = {"prompts": prompts, "readers": readers, "scored": targets is not None}
    return content | _sheet(pictures, min(pictures.shape[-1], 96))


def _reading(answer, i, prompt):
    words = [word for word, _ in answer.words[i]]
    right = data.Vocabulary(tuple(words)).encode([prompt])[0]
    said = [[w, round(p, 3), bool(r)] for (w, p), r in zip(answer.words[i], right, strict=True)]
    caption = answer.captions[i] if answer.captions else ""
    unlike = answer.in_domain is not None and not answer.in_domain[i]
    near = [prompt for prompt, _ in answer.prompts[i]]
    return {"words": said, "near": near, "caption": caption, "unlike": unlike, "cosine": None}


def explore_pairs(pictures, frame, curves=None):
    """See all pairs at once, sorted and filtered, and select some.

    Parameters
    ----------
    pictures : ndarray (n, 3, s, s), uint8
    frame : pandas.DataFrame (n)
        A column ``prompt``; numbers sort (the first one at first), truth values are causes to
        filter by, text is kinds to filter by.
    curves : ndarray (n, e), optional
        Difficulty over epochs.

    Returns
    -------
    Explorer

    Raises
    ------
    BadValueError
        There is nothing to show, lengths differ, or a column is missing or there twice.
    """
    content = _sheet(pictures, 32, quality=30) | _columns(pictures, frame)
    if not content["numbers"]:
        raise BadValueError("the table has no number", "Hand in one to sort by.")
    if curves is not None:
        content["curves"] = np.asarray(curves, float).round(3)
    by = next(iter(content["numbers"]))
    ends = frame.sort_values(by).iloc[sorted({0, len(frame) - 1})][["prompt", by]]
    text = f"{len(frame)} pairs; least and most in {by}:\n{ends.to_string(index=False)}"
    return Explorer("pairs", content, text, 620, frame)


def plane(embeddings):
    """Return embeddings (n, d) in the plane (n, 2), by t-SNE; computed once."""
    from sklearn.manifold import TSNE

    embeddings = np.asarray(embeddings, np.float32)
    if len(embeddings) < 4:
        return np.eye(len(embeddings), 2)
    key = files.checksum({"embeddings": embeddings})[:16]
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    how = {"metric": "cosine", "init": "random", "random_state": 0, "perplexity": perplexity}
    path = files.cache_dir() / "planes" / f"{key}.npy"
    return files.cached_rows(path, lambda: TSNE(**how).fit_transform(embeddings))


def explore_map(embeddings, pictures, frame):
    """See prompts in the plane, alike where they lie together, and select some with a line.

    Parameters
    ----------
    embeddings : ndarray (n, d)
    pictures : ndarray (n, 3, s, s), uint8
    frame : pandas.DataFrame (n)
        A column ``prompt``, and what the points can be coloured by.

    Returns
    -------
    Explorer

    Raises
    ------
    BadValueError
        There is nothing to show, lengths differ, or a column is missing or there twice.
    """
    flags = frame.select_dtypes(bool).columns  # colours like others
    frame = frame.assign(**{name: frame[name].map({True: "yes", False: "no"}) for name in flags})
    content = _sheet(pictures, 48) | _columns(pictures, frame)
    if len(embeddings) != len(frame):
        raise BadValueError(f"there are {len(embeddings)} embeddings and {len(frame)} rows")
    content["x"], content["y"] = plane(embeddings).round(2).T
    text = f"{len(frame)} prompts in the plane; {', '.join(frame.columns.drop('prompt'))}:\n"
    text += frame.drop(columns="prompt").describe().round(3).to_string()
    return Explorer("map", content, text, 640, frame)


def explore_swap(pictures, prompts, encoders, places, measures, original):
    """Move through prompts, encoders and the first step swapped.

    Parameters
    ----------
    pictures : ndarray (p, 1 + e * s, 3, h, h), uint8
        Of each prompt: by the original, then by each encoder from each place on.
    prompts, encoders, places : sequence of str (p), (e), (s)
    measures : dict of str to ndarray (p, e, s)
        NaN where something was not drawn.
    original : dict of str to ndarray (p)
        The same measures of the original's pictures.

    Returns
    -------
    Explorer
    """
    flat = pictures.reshape(-1, *pictures.shape[2:])
    content = {"prompts": list(prompts), "encoders": list(encoders), "places": list(places)}
    content |= {"measures": {k: np.round(v, 4) for k, v in measures.items()}}
    content |= {"original": {k: np.round(v, 4) for k, v in original.items()}}
    tables = []
    for kind, values in measures.items():
        several = pd.concat([pd.DataFrame(one, encoders, places) for one in values])
        table = several.groupby(level=0, sort=False).mean().round(3)
        tables.append(f"{kind}, mean over {len(values)} prompts\n{table}")
    side = min(pictures.shape[-1], 128)
    return Explorer("swap", content | _sheet(flat, side), "\n".join(tables), 560)


def explore_dakl(predictions, pred, target, blends=21):
    """Move DAKL's width, its ridge and its share in the blend, on validation.

    Parameters
    ----------
    predictions : dict of (float, float) to ndarray (n, d)
        DAKL's answers by gamma and alpha: every gamma with every alpha.
    pred, target : ndarray (n, d)
        The ensemble's answers, and the prompts' embeddings.
    blends : int
        So many shares, from the ensemble alone to DAKL alone.

    Returns
    -------
    Explorer
    """
    shares = np.linspace(0, 1, blends).round(3)
    gammas, alphas = (sorted(set(values)) for values in zip(*predictions, strict=True))
    cosines = np.empty((len(gammas), len(alphas), blends))
    for i, j, k in np.ndindex(cosines.shape):
        blend = (1 - shares[k]) * pred + shares[k] * predictions[gammas[i], alphas[j]]
        cosines[i, j, k] = data.cosine(blend, target).mean()
    best, off = np.unravel_index(cosines.argmax(), cosines.shape), cosines[0, 0, 0]
    content = {"gammas": _short(gammas), "alphas": _short(alphas), "blends": shares, "off": off}
    content |= {"cosines": cosines.round(5), "best": [int(i) for i in best]}
    at = f"gamma {gammas[best[0]]:.2g}, alpha {alphas[best[1]]:.2g}, {shares[best[2]]:.0%} DAKL"
    text = f"best on validation: {at}: {cosines[best]:.4f}; the ensemble alone {off:.4f}"
    return Explorer("dakl", content, text, 420)


def _short(values):
    return [float(f"{value:.2g}") for value in values]
