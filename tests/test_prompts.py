"""Prompts: the identity they share, cleaning, near-duplicates, the split, vocabulary labels and MiniLM targets."""

import json
import socket
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rsdlib import prompts, registry, runtime
from rsdlib.config import CleanConfig
from rsdlib.errors import (
    BadTableError,
    BadValueError,
    CacheError,
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
)

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

SUBJECTS = ["cat", "dog", "robot", "castle", "dragon", "wizard", "owl", "forest", "lake", "queen", "knight", "ship", "fox"]
STYLES = ["oil painting", "highly detailed", "artstation", "octane render", "8k", "greg rutkowski", "sharp focus", "moody"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Refuse every connection."""

    def refuse(*_):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def similar_prompts(n, rng):
    """Make prompts with many pairs on either side of a Jaccard similarity of 0.8, and some exact copies."""
    made = []
    for _ in range(n):
        if made and rng.random() < 0.5:
            words = made[rng.integers(len(made))].split()
            for _ in range(rng.integers(0, 4)):
                words[rng.integers(len(words))] = SUBJECTS[rng.integers(len(SUBJECTS))]
            made.append(" ".join(words))
        else:
            subject = " ".join(f"{rng.choice(SUBJECTS)}{rng.integers(40)}" for _ in range(rng.integers(1, 8)))
            made.append(f"{subject}, {', '.join(rng.choice(STYLES, rng.integers(1, 5), replace=False))}")
    return made


def pairs_of(texts, **columns):
    frame = pd.DataFrame({"id": [f"{number:05d}.webp" for number in range(len(texts))], "prompt": pd.Series(texts, dtype=object)})
    return frame.assign(image="part-000001.zip", **columns)


# --- identity ---------------------------------------------------------------------------------------------------------------


def test_normalise_is_idempotent_and_does_not_see_the_encoding():
    rng = np.random.default_rng(0)
    odd = [c for c in map(chr, range(0x3000)) if unicodedata.decomposition(c) or unicodedata.combining(c) or c.casefold() != c]
    pool = odd + list("abc XYZ") + [chr(c) for c in range(0x2000, 0x2070)]
    for text in [*ODD.values(), *("".join(rng.choice(pool, 5)) for _ in range(5000))]:
        normal = prompts.normalise(text)
        assert prompts.normalise(normal) == normal
        assert prompts.normalise(prompts.tidy(text)) == normal
        assert prompts.normalise(unicodedata.normalize("NFD", text.replace("\ud800", ""))) == normal
        assert prompts.tidy(prompts.tidy(text)) == prompts.tidy(text)


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
    assert prompts.normalise(one) == prompts.normalise(other)
    assert prompts.key(one) == prompts.key(other)


def test_tidy_keeps_case_and_joiners_and_drops_what_no_file_takes():
    assert prompts.tidy("  A\u202e Cat\0\r\n👩\u200d👧 \ud800") == "A Cat 👩\u200d👧"
    for text in ODD.values():
        prompts.tidy(text).encode("utf-8")


# --- split ------------------------------------------------------------------------------------------------------------------


def test_split_is_a_function_of_each_prompt_alone():
    keys = [prompts.key(f"prompt {number}") for number in range(5000)]
    sides = prompts.split(keys, 0.1, 0.2)
    order = np.random.default_rng(0).permutation(5000)
    assert (prompts.split([keys[i] for i in order], 0.1, 0.2) == sides[order]).all()
    assert (prompts.split(keys[:100], 0.1, 0.2) == sides[:100]).all()  # the data grew
    assert ((prompts.split(keys, 0.3, 0.2) == "test") == (sides == "test")).all()
    shares = Counter(sides.tolist())
    assert abs(shares["val"] / 5000 - 0.1) < 0.02
    assert abs(shares["test"] / 5000 - 0.2) < 0.02


def test_no_prompt_is_on_two_sides():
    texts = [f"{variant} number {n}" for n in range(300) for variant in ("A Cat", "a  cat", "a c\u200bat")]
    kept, _ = prompts.clean(pairs_of(texts), CleanConfig(images_per_prompt=3, near_duplicate=None))
    assert len(kept) == 900
    sides = kept.assign(side=prompts.split(kept["key"], 0.2, 0.2)).groupby(kept["prompt"].map(prompts.normalise))["side"]
    assert (sides.nunique() == 1).all()
    assert set(sides.first()) == {"train", "val", "test"}


def test_split_refuses_prompts_and_empty_training_sets():
    with pytest.raises(BadValueError, match="keys"):
        prompts.split(["a cat"], 0.1, 0.1)
    with pytest.raises(ConfigError, match="nothing to train on"):
        prompts.split([prompts.key("a cat")], 0.5, 0.5)
    assert prompts.split([], 0.1, 0.1).shape == (0,)


# --- cleaning ---------------------------------------------------------------------------------------------------------------


def test_missing_prompts_go_and_the_words_that_look_missing_stay():
    texts = [None, float("nan"), pd.NA, 3.5, b"cat", "None", "null", "nan", "N/A", "NaN cat", "NA "]
    kept, report = prompts.clean(pairs_of(texts), CleanConfig(min_characters=2))
    assert list(kept["prompt"]) == ["None", "null", "nan", "N/A", "NaN cat", "NA"]
    assert report.set_index("rule").loc["missing", ["rows_in", "rows_out"]].tolist() == [11, 6]


def test_every_rule_drops_what_it_names_and_is_counted():
    texts = ["a cat", "", "   ", "?!... ---", "🎨✨", "\u200b\u200f", "of", "a dog " * 300, "a  cat", "A CAT\n", *ODD.values()]
    kept, report = prompts.clean(pairs_of(texts))
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
    kept, report = prompts.clean(pairs, CleanConfig(images_per_prompt=2))
    assert kept["id"].is_monotonic_increasing  # the order of the input
    for _ in range(3):
        shuffled = pairs.sample(frac=1, random_state=rng)
        again, same = prompts.clean(shuffled, CleanConfig(images_per_prompt=2))
        assert list(again["id"]) == [i for i in shuffled["id"] if i in set(kept["id"])]
        pd.testing.assert_frame_equal(report, same)
        pd.testing.assert_frame_equal(again.sort_values("id", ignore_index=True), kept)


def test_images_per_prompt_and_all_rows_of_a_dropped_prompt():
    copy = "a red cat on a big blue mat in the old house by the sea"
    texts = [copy] * 4 + [copy.upper()] + [f"{copy} today"] * 3 + ["two dogs"] * 2
    kept, _ = prompts.clean(pairs_of(texts), CleanConfig(images_per_prompt=3))
    assert Counter(kept["prompt"]) == {copy: 3, "two dogs": 2}
    assert list(kept["key"]) == [prompts.key(text) for text in kept["prompt"]]
    assert list(kept.columns) == ["id", "prompt", "image", "key"]


def test_nsfw_scores_count_only_where_they_are():
    scores = [0.1, 2.0, np.nan, 0.9]
    pairs = pairs_of(["one cat", "two dogs", "three owls", "four ships"], image_nsfw=scores, prompt_nsfw=0.0)
    assert list(prompts.clean(pairs)[0]["image_nsfw"].fillna(-1)) == [0.1, -1, 0.9]
    assert len(prompts.clean(pairs, CleanConfig(max_nsfw=0.5))[0]) == 2
    assert len(prompts.clean(pairs.drop(columns=["image_nsfw", "prompt_nsfw"]))[0]) == 4


def test_language_refuses_only_clear_cases():
    english = (
        "a cat|elon musk by artgerm, artstation|portrait of Frida Kahlo|die cut sticker, vector art|Café de Flore at night, Paris"
    )
    foreign = (
        "une femme dans un jardin, peinture à l'huile|eine katze sitzt auf dem dach|paisaje de montaña al atardecer, muy detallado|"
        "кот на крыше|retrato de uma mulher na praia|猫が屋根の上にいる"
    )
    assert all(map(prompts.is_english, english.split("|")))
    assert not any(map(prompts.is_english, foreign.split("|")))
    kept, report = prompts.clean(pairs_of(foreign.split("|")), CleanConfig(english_only=False))
    assert len(kept) == 6
    assert report.set_index("rule")["note"]["language"] == "off"


def test_clean_names_what_is_wrong_with_a_table_and_takes_an_empty_one():
    with pytest.raises(BadTableError, match="'prompt'"):
        prompts.clean(pd.DataFrame({"id": ["1"], "text": ["cat"]}))
    with pytest.raises(BadTableError, match=r"00000\.webp"):
        prompts.clean(pd.concat([pairs_of(["cat"]), pairs_of(["dog"])]))
    kept, report = prompts.clean(pairs_of([]))
    assert (len(kept), report["rows_out"].sum()) == (0, 0)


# --- near-duplicates --------------------------------------------------------------------------------------------------------


def brute_force(texts, threshold):
    """Drop greedily by comparing every pair."""
    sets = [set(prompts._words(text)) or {text} for text in map(prompts.normalise, texts)]
    kept, drop = [], np.zeros(len(texts), dtype=bool)
    for i, tokens in enumerate(sets):
        drop[i] = any(len(tokens & other) / len(tokens | other) >= threshold for other in kept)
        if not drop[i]:
            kept.append(tokens)
    return drop


@pytest.mark.parametrize("threshold", [0.6, 0.8, 1.0])
def test_near_duplicates_against_every_pair(threshold):
    texts = similar_prompts(2000, np.random.default_rng(2))
    found, true = prompts.near_duplicates(texts, threshold), brute_force(texts, threshold)
    assert 100 < true.sum() < 1900
    assert (found & true).sum() >= 0.98 * true.sum()
    sets = [set(prompts._words(prompts.normalise(text))) for text in texts]
    for i in np.flatnonzero(found):  # no drop without an earlier kept prompt that justifies it
        assert any(len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold for j in np.flatnonzero(~found[:i]))


def test_near_duplicates_keep_the_first_and_compare_wordless_prompts_as_text():
    texts = ["a b c d e", "A, B; C d E!", "a b c d", "a b c", "🎨", "🎨\ufe0f", "✨", "", "  "]
    assert prompts.near_duplicates(texts, 0.8).tolist() == [False, True, True, False, False, True, False, False, True]
    assert prompts.near_duplicates([]).shape == (0,)
    with pytest.raises(ConfigError, match="threshold"):
        prompts.near_duplicates(["a"], 0)


# --- vocabulary -------------------------------------------------------------------------------------------------------------


def test_vocabulary_counts_prompts_and_keeps_nouns_adjectives_verbs():
    texts = ["a red cat sitting quickly on the mat", "the cat and the cat", "a red dog, 8k, x, dog2", "Cat!"]
    vocabulary = prompts.Vocabulary.fit(texts)
    assert vocabulary.words == ("cat", "red", "dog", "mat", "sitting")  # frequency, then alphabet; fewer than asked for
    assert prompts.Vocabulary.fit(texts, size=2).words == ("cat", "red")
    assert prompts.Vocabulary.fit(texts[::-1]) == vocabulary


def test_encode_finds_words_as_they_were_counted():
    """L2: the original counts lower-cased words and looks them up in the prompt's own case."""
    vocabulary = prompts.Vocabulary.fit(["portrait of a café", "portrait of a cat"])
    assert set(vocabulary.words) == {"portrait", "café", "cat"}
    same = ["Portrait, CAFÉ", "portrait cafe\u0301", "ＰＯＲＴＲＡＩＴ in a caf\u200bé\ud800"]
    labels = vocabulary.encode(same)
    assert labels.shape == (3, 3)
    assert labels.dtype == bool
    assert (labels == labels[0]).all()
    assert labels[0, vocabulary.words.index("café")]
    assert not vocabulary.encode(["zebra", "concatenate", "!?", "", *ODD.values()][:4]).any()


def test_encode_equals_counting():
    texts = list(dict.fromkeys(map(prompts.normalise, similar_prompts(300, np.random.default_rng(3)))))
    vocabulary = prompts.Vocabulary.fit(texts * 2, size=20)  # a prompt counts once, however many images it has
    assert vocabulary == prompts.Vocabulary.fit(texts, size=20)
    labels = vocabulary.encode(texts)
    for column, word in enumerate(vocabulary.words):
        assert labels[:, column].tolist() == [word in prompts._words(prompts.normalise(text)) for text in texts]
    assert (np.diff(labels.sum(0)) <= 0).all()  # most frequent first


def test_vocabulary_survives_its_file_and_notices_changes(tmp_path):
    vocabulary = prompts.Vocabulary.fit(["a red cat", "ein café"])
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    assert prompts.Vocabulary.load(path) == vocabulary
    stored = json.loads(path.read_text())
    for words in (stored["words"][::-1], stored["words"][1:], ["bat", *stored["words"][1:]]):
        path.write_text(json.dumps({**stored, "words": words}))
        with pytest.raises(CacheError, match=r"vocabulary\.json"):
            prompts.Vocabulary.load(path)
    path.write_text("[]")
    with pytest.raises(CacheError):
        prompts.Vocabulary.load(path)


def test_taggers_are_named_and_nltk_says_what_it_needs(monkeypatch):
    with pytest.raises(ConfigError, match="nltk"):
        prompts.Vocabulary.fit(["a cat"], tagger="spacy")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "pos_tag", lambda tokens: [(token, "NN") for token in tokens])
    assert prompts.Vocabulary.fit(["a cat"], tagger="nltk").words == ("cat",)

    def absent(tokens):
        raise LookupError("averaged_perceptron_tagger_eng")

    monkeypatch.setattr(nltk, "pos_tag", absent)
    with pytest.raises(ModelNotFoundError, match=r"nltk\.downloader"):
        prompts.Vocabulary.fit(["a cat"], tagger="nltk")


# --- targets ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """Run torch on one thread: two that wait for each other on a busy machine take many times as long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_missing_prompt_is_never_the_word_nan():
    for texts in ([None], ["a cat", float("nan")], "a cat"):
        for function in (prompts.embed, prompts.near_duplicates, prompts.Vocabulary.fit, prompts.Vocabulary(("cat",)).encode):
            with pytest.raises(BadValueError):
                function(texts)


@pytest.mark.usefixtures("one_thread")
def test_embed_equals_sentence_transformers():
    transformers = pytest.importorskip("sentence_transformers")
    peer = transformers.SentenceTransformer(str(registry.locate("all-MiniLM-L6-v2")), device="cpu")
    texts = similar_prompts(40, np.random.default_rng(4)) + [prompts._without_surrogates(text) for text in ODD.values()] + [""]
    wanted = peer.encode(texts, batch_size=7)
    found = prompts.embed(texts, batch_tokens=500)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-5
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    half = prompts.embed(texts, precision="bfloat16")
    assert (half * wanted).sum(1).min() > 0.9999


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.usefixtures("one_thread")
def test_a_row_depends_on_its_prompt_alone(precision):
    texts = similar_prompts(30, np.random.default_rng(5))
    together = prompts.embed([*texts, *ODD.values(), *texts], precision=precision)
    assert (together[:30] == together[-30:]).all()
    alone = np.concatenate([prompts.embed([text], precision=precision) for text in texts])
    assert np.abs(alone - together[:30]).max() < (1e-6 if precision == "float32" else 1e-2)
    assert (prompts.embed(["A  Cat\u200b"]) == prompts.embed(["a cat"])).all()  # MiniLM is uncased
    assert prompts.embed([]).shape == (0, 384)


@pytest.mark.usefixtures("one_thread")
def test_odd_prompts_are_embedded_in_time():
    prompts.embed(["a cat"])
    for text in ODD.values():
        start = time.process_time()
        row = prompts.embed([text])
        assert time.process_time() - start < 1
        assert np.isfinite(row).all()


@pytest.mark.usefixtures("one_thread")
def test_embed_cached_resumes_and_repairs(tmp_path, monkeypatch):
    texts = similar_prompts(60, np.random.default_rng(6))
    texts += texts[:10]
    embed, embedded = prompts.embed, []
    monkeypatch.setattr(prompts, "_CHUNK", 16)
    monkeypatch.setattr(prompts, "embed", lambda chunk, **options: embedded.extend(chunk) or embed(chunk, **options))
    wanted = embed(texts)

    def again():
        embedded.clear()
        assert np.abs(prompts.embed_cached(texts, tmp_path) - wanted).max() < 1e-6
        return len(embedded)

    assert again() == len(set(texts))
    assert again() == 0
    files = sorted(Path(tmp_path).rglob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    files[0].unlink()  # killed before it was written
    assert again() == 16
    data = bytearray(files[1].read_bytes())
    data[-5] ^= 1
    files[1].write_bytes(data)
    assert again() == 16
    assert again() == 0
    prompts.embed_cached(texts[:16], tmp_path, precision="bfloat16")  # never served from the float32 files
    assert len(embedded) == len(set(texts[:16]))
    assert np.abs(prompts.embed_cached(list(dict.fromkeys(texts))[:3]) - wanted[:3]).max() < 1e-6
    assert list((runtime.cache_dir() / "embeddings").rglob("*.safetensors"))


def test_embed_refuses_what_is_not_the_model(tmp_path):
    source = registry.locate("all-MiniLM-L6-v2")
    with pytest.raises(ConfigError, match="precision"):
        prompts.embed(["a cat"], precision="int4")
    names = ("config.json", "sentence_bert_config.json", "1_Pooling/config.json", "tokenizer.json", "model.safetensors")
    for number, (name, change, error) in enumerate(
        [
            ("model.safetensors", None, ModelNotFoundError),
            ("model.safetensors", lambda data: data[: len(data) // 2], CheckpointError),
            ("config.json", lambda data: data.replace(b'"gelu"', b'"relu"'), CheckpointError),
            ("config.json", lambda data: data.replace(b'"num_hidden_layers": 6', b'"num_hidden_layers": 5'), CheckpointError),
            ("tokenizer.json", lambda data: data[:1000], CheckpointError),
            ("1_Pooling/config.json", lambda data: data.replace(b"true", b"false"), CheckpointError),
        ]
    ):
        folder = tmp_path / str(number)
        (folder / "1_Pooling").mkdir(parents=True)
        for other in names:
            if other != name:
                (folder / other).symlink_to(source / other)
            elif change:
                (folder / other).write_bytes(change((source / other).read_bytes()))
        with pytest.raises(error):
            prompts.embed(["a cat"], model=folder)
