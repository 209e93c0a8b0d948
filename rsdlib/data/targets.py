"""What a model learns to say: the vocabulary's words, and MiniLM's embedding of the prompt."""

import contextlib
import functools
import heapq
import re
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from rsdlib import files, runtime, weights
from rsdlib.data.clean import check_texts, find_words, prompt_key, valid_text, word_sets, wording
from rsdlib.errors import BadValueError, CacheError, CheckpointError, ConfigError, refusing

# --- vocabulary -----------------------------------------------------------------------------------

_WORDS = tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))
_TAGGED = 50_000  # distinct prompts
_words_and_signs = re.compile(r"\w+|[^\w\s]").findall


@dataclass(frozen=True)
class Vocabulary:
    """The words whose presence in a prompt the vocabulary head predicts.

    Paper, Fig. 1; section 7 of the supplementary.

    Attributes
    ----------
    words : tuple of str
        Most frequent first.
    """

    words: tuple

    @classmethod
    def fit(cls, prompts, size=1000):
        """Collect the nouns, adjectives and verbs of the most prompts; pass *training* prompts.

        Prompts are read in their plain form, without tags, weights and underscores. A word counts
        once a prompt, and a prompt once, however many images it has. A word belongs
        if it has at least two letters and nothing else, is no stop word, and most of its
        occurrences are tagged NN*, JJ* or VB* by textblob's lexicon and rules. Of more than 50,000
        distinct prompts, those with the smallest keys are tagged; all count. Ties in frequency go
        by the alphabet. Fewer words than `size` are all kept.

        Parameters
        ----------
        prompts : sequence of str
        size : int
            The paper's m.

        Returns
        -------
        Vocabulary
        """
        tagger = runtime.require("textblob.en.taggers", "textblob").PatternTagger()
        texts = list(dict.fromkeys(map(wording, check_texts(prompts))))
        words, numbers, _ = word_sets(iter(texts), {})
        frequency = dict(zip(words, np.bincount(numbers).tolist(), strict=True))
        tagged, votes = Counter(), Counter()
        for text in heapq.nsmallest(_TAGGED, texts, key=prompt_key):
            tagged.update(tagger.tag(" ".join(_words_and_signs(text)), tokenize=False))
        for (word, label), count in tagged.items():
            votes[word] += count if label.startswith(("NN", "JJ", "VB")) else -count
        words = {word for word in frequency if len(word) > 1 and word.isalpha() and votes[word] > 0}
        words -= set(_WORDS["stop"].split())
        return cls(tuple(sorted(words, key=lambda word: (-frequency[word], word))[:size]))

    def encode(self, prompts):
        """Return which words occur in which prompt, found as they were counted.

        Names of several words, such as those of an encoder's classes, are found as they stand.

        Parameters
        ----------
        prompts : sequence of str, (n,)

        Returns
        -------
        ndarray of bool, (n, m)
        """
        columns = defaultdict(list)  # a word, or some with spaces between them -> where it stands
        for column, word in enumerate(self.words):
            columns[" ".join(find_words(wording(word)))].append(column)
        names = [f" {name} " for name in columns if " " in name]
        labels = np.zeros((len(prompts), len(self.words)), dtype=bool)  # (n, m)
        for row, prompt in zip(labels, check_texts(prompts), strict=True):
            found = find_words(wording(prompt))
            text = f" {' '.join(found)} "
            found += [name.strip() for name in names if name in text]
            row[[column for entry in found for column in columns.get(entry, ())]] = True
        return labels

    @property
    def digest(self):
        """A key that changes with any word or their order."""
        return files.digest([list(self.words), "pattern"])  # the tagger that chose them

    def save(self, path):
        """Write the vocabulary to a JSON file."""
        files.write_json(path, {"words": list(self.words), "digest": self.digest})

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; a file that was altered is a `CacheError`."""
        stored = files.read_json(path)
        with contextlib.suppress(KeyError, TypeError):
            vocabulary = cls(tuple(stored["words"]))
            if vocabulary.digest == stored["digest"]:
                return vocabulary
        raise CacheError(f"{files.relative(path)} is not a vocabulary, or was altered")


# --- embeddings -----------------------------------------------------------------------------------

_FILES = ("modules.json", "config.json", "sentence_bert_config.json", "1_Pooling/config.json")
_FILES += ("tokenizer.json", "model.safetensors")
_CHUNK = 8192  # prompts that are embedded and stored at once


def embed(prompts, *, precision="float32", device="cpu", model=None):
    """Embed prompts with all-MiniLM-L6-v2: the regression targets.

    The authors' choice of sentence transformer. Each distinct prompt is read once; the model reads
    256 tokens, longer prompts are cut.

    Parameters
    ----------
    prompts : sequence of str, (n,)
    precision : {"float32", "bfloat16"}
        Of the weights. bfloat16 keeps a cosine above 0.998 to float32, and is faster where the
        processor has bfloat16 instructions.
    device : str or torch.device
    model : path-like, optional
        Folder of another sentence-transformers BERT with mean pooling.

    Returns
    -------
    ndarray of float32, (n, 384)
        Unit rows. A row depends on its prompt alone, up to rounding.

    Raises
    ------
    ModelNotFoundError, CheckpointError
        The weights are not there, or are not what they should be.
    """
    prompts = [valid_text(prompt) for prompt in check_texts(prompts)]
    encoder = _encoder(_folder(model), precision, str(runtime.device(device)))
    numbers, distinct = pd.factorize(np.array(prompts, dtype=object))
    how = {"batch_size": 32, "show_progress_bar": False, "convert_to_tensor": True}
    rows = encoder.encode(distinct.tolist() or [""], **how).float().cpu().numpy()
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True))[numbers]


def embed_cached(prompts, folder=None, **options):
    """Embed prompts as `embed` does, through files.

    A killed run resumes at the chunk, a damaged chunk is made again. Files are named by the model's
    bytes, the precision and the prompts in them, so they are never served for anything else.

    Parameters
    ----------
    prompts : sequence of str, (n,)
    folder : path-like, optional
        Default: ``embeddings`` in the cache.
    **options
        As for `embed`.

    Returns
    -------
    ndarray of float32, (n, 384)
    """
    folder = Path(folder or files.cache_dir() / "embeddings")
    # First seen first: prompts that are appended to the data leave all full chunks as they are.
    numbers, distinct = pd.factorize(np.array(check_texts(prompts), dtype=object))
    model = _folder(options.get("model"))
    contents = {name: np.fromfile(model / name, np.uint8) for name in _FILES}
    made_from = [files.checksum(contents), options.get("precision", "float32")]
    parts = []
    for start in runtime.track(range(0, len(distinct), _CHUNK), "embedding prompts"):
        chunk = distinct[start : start + _CHUNK].tolist()
        path = folder / f"{files.digest([*made_from, chunk])}.npy"
        rows = files.cached_rows(path, functools.partial(embed, chunk, **options))
        parts.append(np.array(rows))  # a copy: what is mapped keeps its file open
    return np.concatenate(parts or [embed([], **options)])[numbers]


def _folder(model):
    folder = weights.locate("all-MiniLM-L6-v2") if model is None else files.resolve_path(model)
    weights.require_files(folder, _FILES)
    return folder


@functools.lru_cache(maxsize=4)
def _encoder(folder, precision, device):
    """Load a sentence-transformers BERT with mean pooling from `folder`."""
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision {precision!r} is unknown", "Use 'float32' or 'bfloat16'.")
    import torch
    from sentence_transformers import SentenceTransformer

    message, fix = f"{folder} cannot be loaded: {{}}", "Use all-MiniLM-L6-v2, or fetch it again."
    with runtime.quiet(), refusing(Exception, CheckpointError, message, fix):  # tokenizers' own
        encoder = SentenceTransformer(str(folder), device="cpu")
        if not _is_minilm(encoder, folder):
            raise ValueError("it is no whole BERT with GELU and mean pooling")
    return encoder.to(device, getattr(torch, precision))


def _is_minilm(encoder, folder):
    """Tell whether a loaded model is a BERT with mean pooling, its weights all from its file."""
    from safetensors import safe_open

    bert, pooling = encoder[0].auto_model, files.read_json(folder / "1_Pooling" / "config.json")
    means = pooling.get("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean"
    with safe_open(folder / "model.safetensors", "numpy") as file:
        stored = set(file.keys()) - {"embeddings.position_ids"}  # a constant that old files hold
    whole = stored == set(bert.state_dict()) and len(encoder.tokenizer) <= bert.config.vocab_size
    return whole and means and bert.config.hidden_act == "gelu"


# --- directions -----------------------------------------------------------------------------------


def unit_rows(values, name):
    """Return `values` as finite unit rows in float64, at least one.

    Parameters
    ----------
    values : array-like (n, d)
    name : str
        What errors call them.

    Returns
    -------
    ndarray (n, d), float64

    Raises
    ------
    BadValueError
        `values` is no matrix, a row is not finite, or it is zero and has no direction.
    """
    from sklearn.utils import check_array

    message = f"{name} is not a matrix, of two dimensions: {{}}"
    with refusing((TypeError, ValueError), BadValueError, message):
        values = check_array(values, dtype=np.float64, ensure_all_finite=False, input_name=name)
    norms = np.linalg.norm(values, axis=1, keepdims=True)  # (n, 1)
    usable = np.isfinite(norms) & (norms > 0)
    if not usable.all():
        row = np.argmin(usable)
        reason = "not finite" if norms[row] else "zero: it has no direction"
        raise BadValueError(f"row {row} of {name} is {reason}")
    return values / norms


def cosine(pred, target):
    """Return the cosine similarity of each row pair, the paper's score.

    Parameters
    ----------
    pred, target : array-like (n, d)

    Returns
    -------
    ndarray (n,), float64

    Raises
    ------
    BadValueError
        Shapes differ, a value is not finite, or a row is zero: one NaN would eat the whole mean.
    """
    pred, target = unit_rows(pred, "pred"), unit_rows(target, "target")
    if pred.shape != target.shape:
        raise BadValueError(f"pred has shape {pred.shape}, target {target.shape}: not the same")
    return np.einsum("nd,nd->n", pred, target)
