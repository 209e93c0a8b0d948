"""Prompts against their peers and floors, on one core: near-duplicates, MiniLM targets, vocabulary.

    python benchmarks/prompts.py                    # about a minute
    python benchmarks/prompts.py --full             # near-duplicates up to 200,000 prompts
    python benchmarks/prompts.py --prompts FILE.gz  # clean a list of prompts, one a line, as text

The peer rensa is not among the requirements: ``pip install rensa``, or its rows are left out.
Times are CPU seconds of this process, pinned to one core where the system allows it.
"""

import argparse
import functools
import gzip
import importlib.util
import itertools
import re
import resource
import statistics
from collections import defaultdict

from _one_core import cpu_seconds  # isort: skip

import numpy as np
import pandas as pd

from rsdlib import data, weights
from rsdlib.data.prompts_in_images import BOILERPLATE

cleaning = importlib.import_module("rsdlib.data.clean")  # its function has the door's name

find_words = re.compile(r"\w+").findall

# --- made-up prompts that read like DiffusionDB's -------------------------------------------------

STYLES = (
    "highly detailed|digital painting|artstation|concept art|sharp focus|illustration|"
    "trending on artstation|intricate|elegant|octane render|8 k|4 k|unreal engine|"
    "cinematic lighting|oil painting|hyperrealistic|volumetric lighting|photorealistic|"
    "matte painting|smooth|studio ghibli|wide angle|dramatic lighting|depth of field|"
    "award winning photograph|by greg rutkowski|art by artgerm|alphonse mucha|by wlop|"
    "by james jean|rule of thirds|symmetrical|hdr|soft light|golden hour|film grain|35 mm|bokeh|"
    "watercolor|pencil sketch|pixel art|ukiyo - e|art nouveau|baroque|vaporwave|steampunk|"
    "minimalist|isometric|low poly|moody|pastel colors|vivid colors|ray tracing|"
    "global illumination|subsurface scattering|cgsociety|pinterest"
)


def make_prompts(n, rng, copies=0.15, near=0.25):
    """Compose `n` prompts; `copies` of them repeat an earlier one, `near` all but a few words.

    A subject of Zipf-weighted words of the English lexicon, and Zipf-weighted styles: about 35
    tokens, as in DiffusionDB.
    """
    from textblob.en import lexicon

    words = np.array(sorted(word for word in lexicon if word.isalpha() and word.islower()))
    draws = []
    for choices, size in ((rng.permutation(words), 14 * n), (np.array(STYLES.split("|")), 12 * n)):
        shares = 1 / np.arange(2, len(choices) + 2)
        draws.append(iter(rng.choice(choices, size, p=shares / shares.sum()).tolist()))
    word, style = draws
    texts, originals = [], []
    for kind in rng.random(n):
        old = originals[int(rng.integers(len(originals)))] if originals else ""
        if originals and kind < copies:
            forms = (old.upper(), f"{old}.", old)
            texts.append(forms[int(3 * kind / copies)])
        elif originals and kind < copies + near:
            parts = old.split(" ")
            for _ in range(int(rng.integers(1, 4))):
                parts[int(rng.integers(len(parts)))] = next(word)
            texts.append(" ".join(parts))
        else:
            subject = [next(word) for _ in range(int(rng.integers(4, 11)))]
            styles = dict.fromkeys(next(style) for _ in range(int(rng.integers(3, 11))))
            thing, detail = " ".join(subject[:3]), " ".join(subject[3:])
            originals.append(f"{thing} with a {detail}, {', '.join(styles)}")
            texts.append(originals[-1])
    return texts


# --- near-duplicates ------------------------------------------------------------------------------


def token_sets(texts):
    """Return what near-duplicates are defined on: words that say something, and all, as sets."""
    pairs = []
    for boilerplate in (BOILERPLATE, {}):
        _, numbers, starts = cleaning.word_sets(map(cleaning.wording, texts), boilerplate)
        edges = itertools.pairwise(starts.tolist())
        pairs.append([frozenset(numbers[start:end].tolist()) for start, end in edges])
    return list(zip(*pairs, strict=True))


def exact_join(sets, threshold, drop=None):
    """Find greedy keep-first near-duplicates exactly, by prefix filtering; or check a result.

    Two sets of Jaccard similarity >= t share one of the |x| - ceil(t |x|) + 1 rarest tokens of
    each. `sets` are pairs from `token_sets`. With `drop`, somebody's result is checked instead.

    Returns
    -------
    ndarray of bool, (n,)
        The rows to drop; with `drop`, those of its rows that no earlier row kept by it justifies.
    """
    sets, wholes = zip(*sets, strict=True)
    count = defaultdict(int)
    for tokens in sets:
        for token in tokens:
            count[token] += 1
    index = defaultdict(list)
    found = np.zeros(len(sets), dtype=bool)
    for i, tokens in enumerate(sets):
        n = len(tokens)
        length = n - int(np.ceil(threshold * n - 1e-9)) + 1
        prefix = sorted(tokens, key=lambda token: (count[token], token))[:length]
        if drop is None or drop[i]:
            for j in {j for token in prefix for j in index[token]}:
                m = len(sets[j])
                if min(m, n) >= threshold * max(m, n) - 1e-9:
                    common = len(tokens & sets[j])
                    same = tokens == sets[j] and threshold < 1
                    enough = common / (m + n - common) >= threshold
                    if enough and (same or cleaning.jaccard(wholes[i], wholes[j]) >= threshold):
                        found[i] = True
                        break
        if not (found if drop is None else drop)[i]:
            for token in prefix:
                index[token].append(i)
    return found if drop is None else drop & ~found


def rensa_alone(texts, threshold):
    """Drop what rensa's own deduplicator drops: it trusts its estimate of the similarity."""
    import rensa

    how = {"num_perm": 128, "use_lsh": True, "num_bands": 16}
    index = rensa.RMinHashDeduplicator(threshold=threshold, **how)
    words = [find_words(data.normalise(text)) for text in texts]
    kept = index.add_pairs([(str(i), tokens) for i, tokens in enumerate(words)])
    return ~np.array(kept, dtype=bool)


def bench_near_duplicates(sizes, threshold=0.8):
    """Print seconds, growth, share of the true drops found and false drops by method and size."""
    print(f"\nNear-duplicates, Jaccard >= {threshold}, 15 % copies and 25 % near copies planted")
    print(f"{'prompts':>8} {'method':<12} {'CPU s':>7} {'1,000/s':>8} {'growth':>7} ", end="")
    print(f"{'drops':>7} {'found':>8} {'false':>6}")
    texts = make_prompts(max(sizes), np.random.default_rng(0))
    before = {}
    for n in sizes:
        sets, truth = token_sets(texts[:n]), None
        methods = {
            "exact join": lambda n=n, sets=sets: exact_join(sets, threshold),
            "rensa alone": lambda n=n: rensa_alone(texts[:n], threshold),
            "ours": lambda n=n: data.near_duplicates(texts[:n], threshold),
        }
        if importlib.util.find_spec("rensa") is None:
            del methods["rensa alone"]
        for name, method in methods.items():
            seconds, drop = cpu_seconds(method)
            truth = drop if truth is None else truth  # the exact join comes first
            false = 0 if name == "exact join" else exact_join(sets, threshold, drop).sum()
            growth = ""
            if name in before:
                m, s = before[name]
                growth = f"N^{np.log(seconds / s) / np.log(n / m):.2f}"
            before[name] = n, seconds
            share = f"{(drop & truth).sum() / truth.sum():.2%}"
            rate = n / seconds / 1000
            print(f"{n:8,} {name:<12} {seconds:7.2f} {rate:8.1f} {growth:>7} ", end="")
            print(f"{drop.sum():7,} {share:>8} {false:6,}")


# --- MiniLM ---------------------------------------------------------------------------------------


def bench_embed(rounds=3, n=256):
    """Print the rates of `embed` and of sentence-transformers alone, beside the products' floor."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    folder = weights.locate("all-MiniLM-L6-v2")
    texts = make_prompts(n, np.random.default_rng(1), copies=0, near=0)
    peer = SentenceTransformer(str(folder), device="cpu")
    lengths = [len(tokens) for tokens in peer.tokenizer(texts)["input_ids"]]
    flops = sum(6 * (24 * 384**2 * length + 4 * 384 * length**2) for length in lengths)
    methods = {
        "sentence-transformers, batches of 32": lambda: peer.encode(texts, batch_size=32),
        "ours, float32": lambda: data.embed(texts),
        "ours, bfloat16": lambda: data.embed(texts, precision="bfloat16"),
    }
    seconds, rates, rows = defaultdict(list), defaultdict(list), {}
    for method in methods.values():
        method()
    for _ in range(rounds):
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(1024, 1024).to(dtype)
            taken, _ = cpu_seconds(lambda a=a: [a @ a for _ in range(20)])
            rates[dtype].append(2 * 1024**3 * 20 / taken)
        for name, method in methods.items():
            taken, rows[name] = cpu_seconds(method)
            seconds[name].append(taken)
    f32, bf16 = (statistics.median(r) for r in rates.values())
    base, *_ = seconds.values()
    print(f"\nMiniLM, {n} prompts of {np.mean(lengths):.1f} tokens; ", end="")
    print(f"matrix products of 1,024: {f32 / 1e9:.0f} GF/s in float32, ", end="")
    print(f"{bf16 / 1e9:.0f} in bfloat16")
    print(f"{'method':<38} {'prompts/s':>9} {'x peer':>7} {'x f32 floor':>12} ", end="")
    print(f"{'min cosine':>11} {'max |diff|':>11}")
    reference = rows["sentence-transformers, batches of 32"]
    for name, taken in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(base, taken, strict=True))
        rate = n / statistics.median(taken)
        cosine, diff = (rows[name] * reference).sum(1).min(), np.abs(rows[name] - reference).max()
        print(f"{name:<38} {rate:9.0f} {ratio:7.2f} {flops / f32 * rate / n:12.2f} ", end="")
        print(f"{cosine:11.6f} {diff:11.1e}")


# --- vocabulary, cleaning -------------------------------------------------------------------------


def bench_vocabulary(texts):
    """Print the rates of fitting and of encoding."""
    data.Vocabulary.fit(texts[:10])  # loads the lexicon
    fitted, vocabulary = cpu_seconds(lambda: data.Vocabulary.fit(texts))
    encoded, labels = cpu_seconds(lambda: vocabulary.encode(texts))
    print(f"\nVocabulary, {len(texts):,} prompts, {len(vocabulary.words)} words, ", end="")
    mean, without = labels.sum(1).mean(), (~labels.any(1)).sum()
    print(f"{mean:.1f} a prompt, {without:,} prompts without any")
    print(f"fit {len(texts) / fitted:,.0f} prompts/s, encode {len(texts) / encoded:,.0f} prompts/s")


def bench_file(path):
    """Print what cleaning does to a list of prompts, and how long each step takes."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as stream:
        texts = stream.read().splitlines()
    pairs = pd.DataFrame({"id": np.arange(len(texts)), "prompt": texts})
    data.is_english("x")  # loads the detector
    seconds, (kept, report) = cpu_seconds(lambda: data.clean(pairs))
    print(report.to_string(index=False))
    print(f"\nclean: {len(texts):,} prompts in {seconds:.2f} s")
    for threshold in (0.7, 0.8, 0.9):
        seconds, drop = cpu_seconds(functools.partial(data.near_duplicates, texts, threshold))
        truth = exact_join(token_sets(texts), threshold)
        false = exact_join(token_sets(texts), threshold, drop).sum()
        print(f"near-duplicates from {threshold}: {seconds:.2f} s, {drop.sum():,} of ", end="")
        print(f"the exact join's {truth.sum():,}, {false} false")
    bench_vocabulary(list(kept["prompt"]))


if __name__ == "__main__":
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    more = "near-duplicates at 200,000 prompts too (minutes)"
    parser.add_argument("--full", action="store_true", help=more)
    parser.add_argument("--prompts", metavar="FILE", help="clean this list of prompts instead")
    arguments = parser.parse_args()
    if arguments.prompts:
        bench_file(arguments.prompts)
    else:
        bench_near_duplicates((20_000, 50_000, 200_000) if arguments.full else (20_000, 50_000))
        bench_vocabulary(make_prompts(20_000, np.random.default_rng(2)))
        bench_embed()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
