"""Prompts: identity, cleaning, near-duplicates, the split, vocabulary labels, MiniLM targets."""

import importlib
import itertools
import json
import random
import re
import socket
import time
import unicodedata
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from rsdlib import data, files, weights
from rsdlib.config import CleanConfig
from rsdlib.data import targets
from rsdlib.data.prompts_in_images import BOILERPLATE
from rsdlib.errors import (
    BadTableError,
    BadValueError,
    CacheError,
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
)

cleaning = importlib.import_module("rsdlib.data.clean")  # its function has the door's name

ODD = {
    "long": "a cat " * 1700,
    "one word": "x" * 10_000,
    "chinese": "一只猫坐在桌子上",
    "arabic": "\u202bقطة على السطح\u202c\u200f",
    "hindi": "बिल्ली छत पर बैठी है",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 family portrait",
    "surrogate": "a cat \ud800 on a mat",
    "nul": "a cat\0 on a mat",
    "newline": 'a "cat",\r\non\ta mat',
    "formula": '=HYPERLINK("http://example.org","cat")',
    "html": "<script>alert('cat')</script>",
}

SUBJECTS = "cat dog robot castle dragon wizard owl forest lake queen knight ship fox"
SUBJECTS = SUBJECTS.split(" ")
STYLES = "oil painting|highly detailed|artstation|octane render|8k|greg rutkowski|sharp focus|moody"
STYLES = STYLES.split("|")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Refuse every connection."""

    def refuse(*_):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def similar_prompts(n, rng):
    """Make prompts, many pairs on either side of a Jaccard similarity of 0.8, some exact copies."""
    made = []
    for _ in range(n):
        if made and rng.random() < 0.5:
            words = made[rng.integers(len(made))].split()
            for _ in range(rng.integers(0, 4)):
                words[rng.integers(len(words))] = SUBJECTS[rng.integers(len(SUBJECTS))]
            made.append(" ".join(words))
        else:
            words = (f"{rng.choice(SUBJECTS)}{rng.integers(40)}" for _ in range(rng.integers(1, 8)))
            subject = " ".join(words)
            styles = ", ".join(rng.choice(STYLES, rng.integers(1, 5), replace=False))
            made.append(f"{subject}, {styles}")
    return made


def pairs_of(texts, **columns):
    ids = [f"{number:05d}.webp" for number in range(len(texts))]
    frame = pd.DataFrame({"id": ids, "prompt": pd.Series(texts, dtype=object)})
    return frame.assign(image="part-000001.zip", **columns)


# --- identity -------------------------------------------------------------------------------------


def test_normalise_is_idempotent_and_does_not_see_the_encoding():
    rng = np.random.default_rng(0)
    signs = map(chr, range(0x3000))
    kinds = (unicodedata.decomposition, unicodedata.combining, lambda c: c.casefold() != c)
    odd = [c for c in signs if any(kind(c) for kind in kinds)]
    pool = odd + list("abc XYZ") + [chr(c) for c in range(0x2000, 0x2070)]
    for text in [*ODD.values(), *("".join(rng.choice(pool, 5)) for _ in range(5000))]:
        normal = data.normalise(text)
        assert data.normalise(normal) == normal
        assert data.normalise(data.tidy(text)) == normal
        assert data.normalise(unicodedata.normalize("NFD", text.replace("\ud800", ""))) == normal
        assert data.tidy(data.tidy(text)) == data.tidy(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Portrait", "portrait"),
        ("café", "cafe\u0301"),
        ("ＦＵＬＬ ｗｉｄｔｈ", "full width"),
        ("𝓯𝓪𝓷𝓬𝔂", "fancy"),
        ("STRASSE", "straße"),
        (" a\n\tcat\u3000", "a cat"),
        ("c\u200ba\ufefft\u202e\0", "cat"),
        ("ca\ud800t", "cat"),
        ("\ud83d\ude00", "😀"),
        ("❤\ufe0f", "❤"),
    ],
)
def test_what_looks_alike_is_one_prompt(one, other):
    assert data.normalise(one) == data.normalise(other)
    assert data.prompt_key(one) == data.prompt_key(other)


def test_the_short_ways_for_plain_texts_change_nothing():
    """Words, tidied and normalised texts as the general rules have them, of every sign."""
    rng = np.random.default_rng(0)
    signs = [chr(c) for c in range(0x3000)] + [chr(c) for c in range(0x1F000, 0x1F700)]
    texts = [f"a {sign} B" for sign in signs] + ["".join(rng.choice(signs, 9)) for _ in range(999)]
    for text in [*texts, *ODD.values()]:
        marked = text + "\u200b"  # which the short ways leave to the general rules
        assert data.tidy(text) == data.tidy(marked)
        assert data.normalise(text) == data.normalise(marked)
        assert cleaning.find_words(text) == re.findall(r"\w+", text)


def test_tidy_keeps_case_and_joiners_and_drops_what_no_file_takes():
    assert data.tidy("  A\u202e Cat\0\r\n👩\u200d👧 \ud800") == "A Cat 👩\u200d👧"
    for text in ODD.values():
        data.tidy(text).encode("utf-8")


# --- split ----------------------------------------------------------------------------------------


def test_split_is_a_function_of_each_prompt_alone():
    keys = [data.prompt_key(f"prompt {number}") for number in range(5000)]
    sides = data.split(keys, 0.1, 0.2)
    order = np.random.default_rng(0).permutation(5000)
    assert (data.split([keys[i] for i in order], 0.1, 0.2) == sides[order]).all()
    assert (data.split(keys[:100], 0.1, 0.2) == sides[:100]).all()  # the data grew
    assert ((data.split(keys, 0.3, 0.2) == "test") == (sides == "test")).all()
    shares = Counter(sides.tolist())
    assert abs(shares["val"] / 5000 - 0.1) < 0.02
    assert abs(shares["test"] / 5000 - 0.2) < 0.02


def test_no_prompt_is_on_two_sides():
    texts = [
        f"{variant} number {n}"
        for n in range(300)
        for variant in ("A Cat", "a  cat", "a c\u200bat")
    ]
    kept, _ = data.clean(pairs_of(texts), CleanConfig(images_per_prompt=3, near_duplicate=None))
    assert len(kept) == 900
    kept = kept.assign(side=data.split(kept["key"], 0.2, 0.2))
    sides = kept.groupby(kept["prompt"].map(data.normalise))["side"]
    assert (sides.nunique() == 1).all()
    assert set(sides.first()) == {"train", "val", "test"}


def test_split_refuses_prompts_and_empty_training_sets():
    with pytest.raises(BadValueError, match="keys"):
        data.split(["a cat"], 0.1, 0.1)
    with pytest.raises(ConfigError, match="nothing to train on"):
        data.split([data.prompt_key("a cat")], 0.5, 0.5)
    assert data.split([], 0.1, 0.1).shape == (0,)


# --- cleaning -------------------------------------------------------------------------------------


def test_missing_prompts_go_and_the_words_that_look_missing_stay():
    texts = [None, float("nan"), pd.NA, 3.5, b"cat", "None", "null", "nan", "N/A", "NaN cat", "NA "]
    kept, report = data.clean(pairs_of(texts), CleanConfig(min_characters=2))
    assert list(kept["prompt"]) == ["None", "null", "nan", "N/A", "NaN cat", "NA"]
    assert report.set_index("rule").loc["missing", ["rows_in", "rows_out"]].tolist() == [11, 6]


def test_every_rule_drops_what_it_names_and_is_counted():
    texts = [
        "a cat",
        "",
        "   ",
        "?!... ---",
        "🎨✨",
        "\u200b\u200f",
        "of",
        "a dog " * 300,
        "a  cat",
        "A CAT\n",
        *ODD.values(),
    ]
    kept, report = data.clean(pairs_of(texts))
    assert (report["rows_in"].to_numpy()[1:] == report["rows_out"].to_numpy()[:-1]).all()
    assert report["rows_in"][0] == len(texts)
    assert report["rows_out"].iloc[-1] == len(kept)
    lost = dict(zip(report["rule"], report["rows_in"] - report["rows_out"], strict=True))
    assert lost == {
        "missing": 0,
        "tidied": 0,
        "unreadable": 5,
        "length": 4,
        "language": 3,
        "nsfw": 0,
        "duplicates": 3,
        "near-duplicates": 1,  # of the three sentences with a mat, two are the same
    }
    assert ODD["formula"] in set(kept["prompt"])
    assert "a cat on a mat" in set(kept["prompt"])


def test_the_order_of_rows_does_not_decide_who_stays():
    rng = np.random.default_rng(1)
    texts = similar_prompts(600, rng) + ["A Cat", "a cat", "a cat.", None, "??"] * 4
    pairs = pairs_of(texts)
    kept, report = data.clean(pairs, CleanConfig(images_per_prompt=2))
    assert kept["id"].is_monotonic_increasing  # the order of the input
    for _ in range(3):
        shuffled = pairs.sample(frac=1, random_state=rng)
        again, same = data.clean(shuffled, CleanConfig(images_per_prompt=2))
        assert list(again["id"]) == [i for i in shuffled["id"] if i in set(kept["id"])]
        pd.testing.assert_frame_equal(report, same)
        pd.testing.assert_frame_equal(again.sort_values("id", ignore_index=True), kept)


def test_images_per_prompt_and_all_rows_of_a_dropped_prompt():
    copy = "a red cat on a big blue mat in the old house by the sea"
    texts = [copy] * 4 + [copy.upper()] + [f"{copy} today"] * 3 + ["two dogs"] * 2
    kept, _ = data.clean(pairs_of(texts), CleanConfig(images_per_prompt=3))
    assert Counter(kept["prompt"]) == {copy: 3, "two dogs": 2}
    assert list(kept["key"]) == [data.prompt_key(text) for text in kept["prompt"]]
    assert list(kept.columns) == ["id", "prompt", "image", "key"]


def test_nsfw_scores_count_only_where_they_are():
    scores = [0.1, 2.0, np.nan, 0.9]
    pairs = pairs_of(
        ["one cat", "two dogs", "three owls", "four ships"], image_nsfw=scores, prompt_nsfw=0.0
    )
    assert list(data.clean(pairs)[0]["image_nsfw"].fillna(-1)) == [0.1, -1, 0.9]
    assert len(data.clean(pairs, CleanConfig(max_nsfw=0.5))[0]) == 2
    assert len(data.clean(pairs.drop(columns=["image_nsfw", "prompt_nsfw"]))[0]) == 4


def test_language_refuses_only_clear_cases():
    english = (
        "a cat|elon musk by artgerm, artstation|portrait of Frida Kahlo|"
        "die cut sticker, vector art|Café de Flore at night, Paris"
    )
    foreign = (
        "une femme dans un jardin, peinture à l'huile|eine katze sitzt auf dem dach|"
        "paisaje de montaña al atardecer, muy detallado|"
        "кот на крыше|retrato de uma mulher na praia|猫が屋根の上にいる"
    )
    assert all(map(data.is_english, english.split("|")))
    assert not any(map(data.is_english, foreign.split("|")))
    kept, report = data.clean(pairs_of(foreign.split("|")), CleanConfig(english_only=False))
    assert len(kept) == 6
    assert report.set_index("rule")["note"]["language"] == "off"


def test_clean_names_what_is_wrong_with_a_table_and_takes_an_empty_one():
    with pytest.raises(BadTableError, match="'prompt'"):
        data.clean(pd.DataFrame({"id": ["1"], "text": ["cat"]}))
    with pytest.raises(BadTableError, match=r"00000\.webp"):
        data.clean(pd.concat([pairs_of(["cat"]), pairs_of(["dog"])]))
    kept, report = data.clean(pairs_of([]))
    assert (len(kept), report["rows_out"].sum()) == (0, 0)


# --- near-duplicates ------------------------------------------------------------------------------


def words_of(text):
    """Return the words of a text as two sets: all, and those that say something."""
    text = data.normalise(data.plain(text))
    words = re.findall(r"\w+", text)
    marks = [BOILERPLATE.get(word, 0) for word in ("", *words, "")]
    left = set()
    for word, before, mark, behind in zip(words, marks, marks[1:], marks[2:], strict=False):
        if mark == 0 or (mark == 1 and not before and not behind):
            left.add(word)
    whole = set(words) or {text}
    return whole, left or whole


def alike(one, other, threshold):
    """Tell whether two texts repeat each other."""
    whole, left = one[0] & other[0], one[1] & other[1]
    if len(left) < threshold * len(one[1] | other[1]):
        return False
    same = one[1] == other[1] and threshold < 1
    return same or len(whole) / len(one[0] | other[0]) >= threshold


def brute_force(texts, threshold):
    """Drop greedily by comparing every pair."""
    kept, drop = [], np.zeros(len(texts), dtype=bool)
    for i, words in enumerate(map(words_of, texts)):
        drop[i] = any(alike(words, other, threshold) for other in kept)
        if not drop[i]:
            kept.append(words)
    return drop


@pytest.mark.parametrize("threshold", [0.6, 0.8, 1.0])
def test_near_duplicates_against_every_pair(threshold):
    texts = similar_prompts(1200, np.random.default_rng(2))
    found, true = data.near_duplicates(texts, threshold), brute_force(texts, threshold)
    assert 100 < true.sum() < 1100
    assert (found & true).sum() >= 0.98 * true.sum()
    sets = [*map(words_of, texts)]
    for i in np.flatnonzero(found):  # no drop without an earlier kept prompt that justifies it
        assert any(alike(sets[i], sets[j], threshold) for j in np.flatnonzero(~found[:i]))


def test_word_sets_are_the_words_of_each_text(monkeypatch):
    monkeypatch.setattr(cleaning, "_CHUNK", 100)
    texts = [*map(data.normalise, [*similar_prompts(950, np.random.default_rng(4)), *ODD.values()])]
    texts += ["", "! ?", "!", "! ?", "a ! a"]
    words, numbers, starts = cleaning.word_sets(iter(texts), {})
    found = [numbers[a:b].tolist() for a, b in itertools.pairwise(starts)]
    expected = [set(re.findall(r"\w+", text)) or {text} for text in texts]
    assert [*map(len, found)] == [*map(len, map(set, found))] == [*map(len, expected)]
    assert len(set(words)) == len(words) == len(set().union(*expected))
    assert {words[i] for i in found[0]} == expected[0]
    for i, j in np.random.default_rng(0).integers(len(texts), size=(9000, 2)):
        assert len({*found[i]} & {*found[j]}) == len(expected[i] & expected[j])


def test_near_duplicates_keep_the_first_and_compare_wordless_prompts_as_text():
    texts = ["a b c d e", "A, B; C d E!", "a b c d", "a b c", "🎨", "🎨\ufe0f", "✨", "", "  "]
    dropped = [texts[i] for i in np.flatnonzero(data.near_duplicates(texts, 0.8))]
    assert dropped == ["A, B; C d E!", "a b c d", "🎨\ufe0f", "  "]
    assert data.near_duplicates([]).shape == (0,)
    with pytest.raises(ConfigError, match="threshold"):
        data.near_duplicates(["a"], 0)


TAIL = ", <lora:add_detail:0.8>, (masterpiece:1.2), best quality, 8k, hdr"
LONG = " BREAK highly detailed, sharp focus, trending, artstation, ultra realistic, intricate"


@pytest.mark.parametrize("tail", [TAIL, TAIL + LONG, TAIL.replace(",", ""), f"{LONG}, {TAIL}, uhd"])
def test_prompts_are_not_alike_by_wording_that_all_share(tail):
    """A subject differs: seen once, with `lora`, weights and quality words counted as content."""
    texts = [f"a cat{tail}", f"a dog{tail}", f"a (dog:1.3){tail}", "a dog", f"a dog, hdr{tail}"]
    assert data.near_duplicates(texts).tolist() == [False, False, True, True, True]


def test_prompts_that_differ_in_a_word_are_not_alike_because_little_else_says_something():
    texts = [
        "in space among planets, 3d render, a robot",
        "a castle in space among planets, 8k",
    ]
    assert not data.near_duplicates(texts).any()
    assert not data.near_duplicates(["a cat, 8k", "a cat"], 1).any()


def test_only_what_says_nothing_is_left_out():
    texts = ["a high castle", "a castle", "a sharp knife", "a knife", "best quality, 8k", "8k, hdr"]
    texts += ["masterpiece", "(masterpiece:1.2)", "long_hair, girl", "girl, long hair"]
    dropped = [texts[i] for i in np.flatnonzero(data.near_duplicates(texts))]
    assert dropped == ["(masterpiece:1.2)", "girl, long hair"]


def test_the_report_shows_what_was_dropped_beside_what_it_repeats(tmp_path):
    same = "a red cat on a big blue mat in the old house by the sea"
    texts = [same, "two dogs", f"{same}, 8k", f"{same} today", "two owls", f"({same}:1.1)"]
    kept, report = data.clean(pairs_of(texts))
    assert list(kept["prompt"]) == [same, "two dogs", "two owls"]
    files.write_parquet(tmp_path / "report.parquet", report)
    examples = pd.read_parquet(tmp_path / "report.parquet").set_index("rule")["examples"]
    assert [list(pair) for pair in examples["near-duplicates"]] == [
        [t, same] for t in (*texts[2:4], texts[5])
    ]
    assert not any(map(len, examples.drop("near-duplicates")))
    many = [f"{same} {n}" for n in range(20)]
    assert len(data.clean(pairs_of(many))[1]["examples"].iloc[-1]) == 5


def test_missing_prompts_are_counted_by_their_reasons():
    texts = [None, "a cat", None, None, None]
    reasons = ["b", "", "a", "a", None]
    pairs = pairs_of(texts, reason=reasons)
    for order in (pairs, pairs[::-1]):
        assert data.clean(order)[1]["note"][0] == "2 a; 1 b"
    assert data.clean(pairs_of(["a cat"]))[1]["note"][0] == ""


def test_clean_makes_prompts_plain_where_it_is_asked_to():
    texts = ["a (red:1.2) cat", "A red cat", "<lora:x:1>", "long_hair, girl"]
    kept, report = data.clean(pairs_of(texts), CleanConfig(plain=True))
    assert list(kept["prompt"]) == ["a red cat", "long hair, girl"]
    assert list(kept["raw_prompt"]) == [texts[0], texts[3]]
    assert list(kept["key"]) == [data.prompt_key(prompt) for prompt in kept["prompt"]]
    assert report.set_index("rule")["changed"]["tidied"] == 3
    first = pairs_of(["a red cat"], raw_prompt=["a ((red)) cat"])
    assert data.clean(first, CleanConfig(plain=True))[0]["raw_prompt"].tolist() == ["a ((red)) cat"]
    assert "raw_prompt" not in data.clean(pairs_of(texts))[0]


# --- vocabulary -----------------------------------------------------------------------------------


def test_vocabulary_counts_prompts_and_keeps_nouns_adjectives_verbs():
    texts = [
        "a red cat sitting quickly on the mat",
        "the cat and the cat",
        "a red dog, 8k, x, dog2",
        "Cat!",
    ]
    vocabulary = data.Vocabulary.fit(texts)
    # Frequency, then alphabet; fewer than asked for.
    assert vocabulary.words == ("cat", "red", "dog", "mat", "sitting")
    assert data.Vocabulary.fit(texts, size=2).words == ("cat", "red")
    assert data.Vocabulary.fit(texts[::-1]) == vocabulary


def test_words_come_from_the_plain_form():
    texts = [
        "girl, long_hair, <lora:add_detail:0.8>",
        "a (girl:1.3) BREAK hair",
        "embedding:bad_hand",
    ]
    vocabulary = data.Vocabulary.fit(texts)
    assert set(vocabulary.words) == {"girl", "long", "hair"}
    labels = vocabulary.encode(["LONG_hair <lora:girl:1>"])[0]
    assert set(np.array(vocabulary.words)[labels]) == {"long", "hair"}


def test_encode_finds_words_as_they_were_counted():
    """L2: the original counts lower-cased words and looks them up in the prompt's own case."""
    vocabulary = data.Vocabulary.fit(["portrait of a café", "portrait of a cat"])
    assert set(vocabulary.words) == {"portrait", "café", "cat"}
    same = ["Portrait, CAFÉ", "portrait cafe\u0301", "ＰＯＲＴＲＡＩＴ in a caf\u200bé\ud800"]
    labels = vocabulary.encode(same)
    assert labels.shape == (3, 3)
    assert labels.dtype == bool
    assert (labels == labels[0]).all()
    assert labels[0, vocabulary.words.index("café")]
    assert not vocabulary.encode(["zebra", "concatenate", "!?", "", *ODD.values()][:4]).any()


def test_encode_equals_counting():
    made = similar_prompts(300, np.random.default_rng(3))
    texts = list(dict.fromkeys(map(data.normalise, made)))
    # A prompt counts once, however many images it has.
    vocabulary = data.Vocabulary.fit(texts * 2, size=20)
    assert vocabulary == data.Vocabulary.fit(texts, size=20)
    labels = vocabulary.encode(texts)
    for column, word in enumerate(vocabulary.words):
        expected = [word in cleaning.find_words(data.normalise(text)) for text in texts]
        assert labels[:, column].tolist() == expected
    assert (np.diff(labels.sum(0)) <= 0).all()  # most frequent first


def test_of_many_prompts_some_are_tagged_and_all_count(monkeypatch):
    made = similar_prompts(400, np.random.default_rng(5))
    whole = data.Vocabulary.fit(made)
    monkeypatch.setattr(targets, "_TAGGED", 100)
    some = data.Vocabulary.fit(made)
    assert data.Vocabulary.fit(made[::-1]) == some  # the prompts' keys choose, not their order
    assert 20 < len(some.words) <= len(whole.words)
    assert [word for word in whole.words if word in set(some.words)] == [*some.words]
    tagged = sorted({data.normalise(text) for text in made}, key=data.prompt_key)[:100]
    assert set(data.Vocabulary.fit(tagged).words) == set(some.words)


def test_vocabulary_survives_its_file_and_notices_changes(tmp_path):
    vocabulary = data.Vocabulary.fit(["a red cat", "ein café"])
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    assert data.Vocabulary.load(path) == vocabulary
    stored = json.loads(path.read_text())
    for words in (stored["words"][::-1], stored["words"][1:], ["bat", *stored["words"][1:]]):
        path.write_text(json.dumps({**stored, "words": words}))
        with pytest.raises(CacheError, match=r"vocabulary\.json"):
            data.Vocabulary.load(path)
    path.write_text("[]")
    with pytest.raises(CacheError):
        data.Vocabulary.load(path)


# --- targets --------------------------------------------------------------------------------------


NAME = "all-MiniLM-L6-v2"


@pytest.fixture
def one_thread():
    """Run torch on one thread: two that wait for each other on a busy machine take far longer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoded(monkeypatch):
    """Return a list that grows with every text that the model reads."""
    texts = []
    encoder = targets._encoder(weights.locate(NAME), "float32", "cpu")
    encode = encoder.encode

    def count(chunk, **options):
        texts.extend(chunk)
        return encode(chunk, **options)

    monkeypatch.setattr(encoder, "encode", count)
    return texts


def test_a_missing_prompt_is_never_the_word_nan():
    takers = (
        data.embed,
        data.embed_cached,
        data.near_duplicates,
        data.Vocabulary.fit,
        data.Vocabulary(("cat",)).encode,
    )
    for texts in ([None], ["a cat", float("nan")], "a cat"):
        for function in takers:
            with pytest.raises(BadValueError):
                function(texts)


@pytest.mark.usefixtures("one_thread")
def test_embed_equals_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(weights.locate(NAME)), device="cpu")
    texts = [*similar_prompts(40, np.random.default_rng(4)), *ODD.values(), ""]
    read = [cleaning.valid_text(text) for text in texts]
    wanted = peer.encode(read, batch_size=7)
    found = data.embed(texts)
    assert (found.dtype, found.shape) == (np.float32, (len(texts), 384))
    assert np.abs(found - wanted).max() < 1e-5
    half = data.embed(texts, precision="bfloat16")
    assert half.dtype == np.float32
    assert (half * wanted).sum(1).min() > 0.998
    for rows in (found, half):
        assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.usefixtures("one_thread")
def test_a_row_depends_on_its_prompt_alone(precision):
    close = 1e-6 if precision == "float32" else 1e-2
    texts = similar_prompts(30, np.random.default_rng(5))
    together = data.embed([*texts, *ODD.values(), *texts], precision=precision)
    assert (together[:30] == together[-30:]).all()
    alone = np.concatenate([data.embed([text], precision=precision) for text in texts])
    assert np.abs(alone - together[:30]).max() < close
    order = np.random.default_rng(0).permutation(30)
    shuffled = data.embed([texts[i] for i in order], precision=precision)
    assert np.abs(shuffled - together[order]).max() < close
    same = data.embed(["A  Cat\u200b", "a cat"], precision=precision)
    assert np.abs(same[0] - same[1]).max() < close  # MiniLM is uncased
    assert data.embed([], precision=precision).shape == (0, 384)


def test_each_distinct_prompt_is_read_once(encoded):
    texts = ["a cat", "two dogs", "a cat", "a c\ud800at", "a cat"]
    rows = data.embed(texts)
    assert sorted(encoded) == ["a cat", "two dogs"]
    assert (rows[[0, 2, 3, 4]] == rows[0]).all()


def test_the_model_reads_256_tokens():
    words = [f"{word} " for word in SUBJECTS] * 30
    long, cut = "".join(words), "".join(words[:254])  # two tokens are marks
    rows = data.embed([long, cut, "".join(words[:253])])
    assert np.abs(rows[0] - rows[1]).max() < 1e-6
    assert np.abs(rows[0] - rows[2]).max() > 1e-4


def test_loading_is_silent_and_leaves_seeds_and_threads_alone(capfd):
    import torch
    from transformers.utils import logging

    def state():
        numbers = np.random.get_state()[1].tolist()  # noqa: NPY002
        seeds = (torch.get_rng_state().tolist(), numbers, random.getstate())
        return seeds, torch.get_num_threads(), logging.is_progress_bar_enabled()

    data.embed(["a cat"])  # imports everything
    targets._encoder.cache_clear()
    before = state()
    capfd.readouterr()
    data.embed(["a cat"])
    assert state() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("one_thread")
def test_odd_prompts_are_embedded_in_time():
    data.embed(["a cat"])
    for text in ODD.values():
        start = time.process_time()
        row = data.embed([text])
        assert time.process_time() - start < 1
        assert np.isfinite(row).all()


@pytest.mark.usefixtures("one_thread")
def test_embed_cached_resumes_and_repairs(tmp_path, monkeypatch):
    texts = [*similar_prompts(60, np.random.default_rng(6)), *ODD.values()]
    texts += texts[:10]
    embed, embedded = data.embed, []

    def count(chunk, **options):
        embedded.extend(chunk)
        return embed(chunk, **options)

    monkeypatch.setattr(targets, "_CHUNK", 16)
    monkeypatch.setattr(targets, "embed", count)
    wanted = embed(texts)

    def again():
        embedded.clear()
        assert np.abs(data.embed_cached(texts, tmp_path) - wanted).max() < 1e-6
        return len(embedded)

    assert again() == len(set(texts))
    assert again() == 0
    chunks = sorted(tmp_path.rglob("*.npy"), key=lambda path: path.stat().st_mtime_ns)
    chunks[0].unlink()  # killed before it was written
    assert again() == 16
    content = bytearray(chunks[1].read_bytes())
    content[-50] ^= 1
    chunks[1].write_bytes(content)
    assert again() == 16
    assert again() == 0
    data.embed_cached(texts[:16], tmp_path, precision="bfloat16")  # another file than float32's
    assert len(embedded) == len(set(texts[:16]))
    assert np.abs(data.embed_cached(texts[:3]) - wanted[:3]).max() < 1e-6
    assert list((files.cache_dir() / "embeddings").glob("*.npy"))
    assert data.embed_cached([]).shape == (0, 384)


def test_stored_embeddings_belong_to_their_model(tmp_path, monkeypatch):
    """Another model in the same folder is never answered for by its predecessor's files."""
    source, folder = weights.locate(NAME), tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in targets._FILES:
        (folder / name).symlink_to(source / name)
    made = []
    monkeypatch.setattr(targets, "embed", lambda chunk, **_: made.append(chunk) or np.ones((1, 2)))
    for _ in range(2):
        data.embed_cached(["a cat"], tmp_path, model=folder)
    assert len(made) == 1
    pooling = (folder / "1_Pooling" / "config.json").read_text()
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").write_text(pooling.replace("true", "false"))
    data.embed_cached(["a cat"], tmp_path, model=folder)
    assert len(made) == 2


WRONG_MODELS = {  # file, what happens to it (None: it is not there), error
    "no weights": ("model.safetensors", None, ModelNotFoundError),
    "no modules": ("modules.json", None, ModelNotFoundError),
    "weights cut": ("model.safetensors", lambda x: x[: len(x) // 2], CheckpointError),
    "another activation": (
        "config.json",
        lambda x: x.replace(b'"gelu"', b'"relu"'),
        CheckpointError,
    ),
    "fewer layers": (
        "config.json",
        lambda x: x.replace(b'"num_hidden_layers": 6', b'"num_hidden_layers": 5'),
        CheckpointError,
    ),
    "more layers": (
        "config.json",
        lambda x: x.replace(b'"num_hidden_layers": 6', b'"num_hidden_layers": 7'),
        CheckpointError,
    ),
    "fewer words": (
        "config.json",
        lambda x: x.replace(b"30522", b"30000"),
        CheckpointError,
    ),
    "tokenizer cut": ("tokenizer.json", lambda x: x[:1000], CheckpointError),
    "no mean": ("1_Pooling/config.json", lambda x: x.replace(b"true", b"false"), CheckpointError),
    "pooling is a list": ("1_Pooling/config.json", lambda x: b"[]", CheckpointError),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_embed_refuses_what_is_not_the_model(name, tmp_path):
    source, (changed, change, error) = weights.locate(NAME), WRONG_MODELS[name]
    (tmp_path / "1_Pooling").mkdir(parents=True)
    for file in targets._FILES:
        if file != changed:
            (tmp_path / file).symlink_to(source / file)
        elif change:
            (tmp_path / file).write_bytes(change((source / file).read_bytes()))
    with pytest.raises(error) as raised:
        data.embed(["a cat"], model=tmp_path)
    assert changed in str(raised.value) or str(tmp_path) in str(raised.value)
    assert raised.value.fix


def test_embed_refuses_an_unknown_precision():
    with pytest.raises(ConfigError, match="precision"):
        data.embed(["a cat"], precision="int4")


# --- directions -----------------------------------------------------------------------------------


def test_unit_rows_are_unit_and_keep_their_directions():
    rows = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    unit = data.unit_rows(rows, "rows")
    assert unit.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-14)
    np.testing.assert_allclose(data.cosine(unit, rows), 1, rtol=1e-12)
    np.testing.assert_allclose(data.unit_rows(-3 * rows, "rows"), -unit, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "not finite"), (-np.inf, "not finite"), (0, "zero")]
)
def test_rows_without_a_direction_are_named(value, reason):
    rows = np.ones((5, 3))
    rows[3] = value
    with pytest.raises(BadValueError, match=f"row 3 of these .*{reason}"):
        data.unit_rows(rows, "these")


@pytest.mark.parametrize("values", [np.ones(4), np.ones((2, 2, 2)), np.ones((0, 3)), "x", [["x"]]])
def test_what_is_no_matrix_is_refused_in_one_line(values):
    with pytest.raises(BadValueError, match=r"^these is not a matrix.* dimensions") as raised:
        data.unit_rows(values, "these")
    assert "\n" not in str(raised.value)


# --- choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_are_the_fewest_that_seldom_miss(threshold):
    """P(miss) = (1 - s^r)^b at the threshold, with b bands of r hashes."""
    bands = cleaning.choose_bands(threshold, miss=0.005)
    misses = {b: (1 - threshold ** (240 // b)) ** b for b in range(16, 241) if 240 % b == 0}
    assert bands in misses
    seldom = [b for b, miss in misses.items() if miss < 0.005]
    assert bands == (min(seldom) if seldom else 240)
