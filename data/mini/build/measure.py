"""Measure the mini world: ``python data/mini/build/measure.py``.

Writes ``data/mini/measured.json``.

Judged by a network that had no part in the generator, on prompts and renders that no model was
trained on.
"""

import time

import common
import numpy as np
import sample_dataset
import torch
import train_blip
import train_clip
import train_encoder
from common import FRESH
from corpus import NAMES, Corpus
from scenes import sample_scene

from mini_world import Judge
from rsdlib import files, models, runtime
from rsdlib.analysis import bootstrap_ci

SAMPLES = {"single": 1000, "count": 250, "and": 250, "left of": 250}


def share(hits):
    """Return a share with its 95 % interval."""
    hits = np.asarray(hits, float)
    found = bootstrap_ci(hits)
    return {
        "share": round(found.mean, 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
        "n": len(hits),
    }


def prompts(rng, known):
    """Return aligned scenes for every relation, with prompts that were never seen."""
    scenes = {relation: [] for relation in SAMPLES}
    while any(len(scenes[relation]) < number for relation, number in SAMPLES.items()):
        scene = sample_scene(rng, misaligned=0)
        if (
            scene.has_referent
            and len(scenes[scene.relation]) < SAMPLES[scene.relation]
            and scene.prompt not in known
        ):
            scenes[scene.relation].append(scene)
    return scenes


def judged(eye, images, scenes):
    """Compare what the judge sees with what the scenes say."""
    found = eye.agrees(images, [{**vars(scene), "nouns": scene.objects} for scene in scenes])
    return {name: share(values) for name, values in found.items() if not np.isnan(values).any()}


def follows(eye, pipe, scenes):
    """Judge samples of the scenes' prompts, by relation; single objects by medium too."""
    result = {}
    for relation, some in scenes.items():
        groups = np.array_split(np.arange(len(some)), -(-len(some) // sample_dataset.BATCH))
        images = np.concatenate(
            [
                models.sample(pipe, [some[i].prompt for i in part], part, **sample_dataset.HOW)
                for part in runtime.track(groups, f"sampling: {relation}")
            ]
        )
        result[relation] = judged(eye, images, some)
        if relation == "single":
            media = np.array([scene.medium for scene in some])
            by_medium = {
                m: judged(eye, images[media == m], [s for s in some if s.medium == m])["noun"][
                    "share"
                ]
                for m in NAMES["medium"]
            }
            result["single"]["noun by medium"] = by_medium
    return result


def ceiling(eye, scenes):
    """Judge renders of the same scenes."""
    from renderer import draw

    rng = runtime.rng("ceiling")
    return {
        relation: judged(eye, np.stack([draw(scene, rng) for scene in some]), some)
        for relation, some in scenes.items()
    }


def errors(vae, corpus):
    """Return the autoencoder's mean absolute error on renders, pixels in [0, 1].

    Over all renders, and by medium.
    """
    found = []
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(corpus)), 16):
            pixels = torch.from_numpy(corpus.images(rows)).float() / 255
            decoded = vae.decode(vae.encode(2 * pixels - 1).latent_dist.mode()).sample
            found.append((((decoded + 1) / 2).clamp(0, 1) - pixels).abs().mean((1, 2, 3)))
    found, medium = torch.cat(found).numpy(), corpus.labels["medium"]
    by_medium = {
        name: round(float(found[medium == i].mean()), 4) for i, name in enumerate(NAMES["medium"])
    }
    return {"all": round(float(found.mean()), 4), **by_medium}


def speed(pipe):
    """Time 64 guided samples of 20 steps, and the U-Net alone in latents a second."""
    asked = ["a cartoon of a fox in the snow"] * 64
    models.sample(pipe, asked[:8], range(8), **sample_dataset.HOW)
    start = time.perf_counter()
    models.sample(pipe, asked, range(64), **sample_dataset.HOW)
    seconds = time.perf_counter() - start
    latents, text = (
        torch.randn(64, 16, 8, 8),
        torch.randn(64, train_clip.CONTEXT, train_clip.TEXT["width"]),
    )
    with torch.inference_mode():
        rates = []
        for _ in range(12):
            start = time.perf_counter()
            pipe.unet(latents, 500, text)
            rates.append(64 / (time.perf_counter() - start))
    return {
        "seconds for 64 samples": round(seconds, 2),
        "latents per second": round(float(np.median(rates)), 1),
    }


def foundation(corpus):
    """Measure the models that are there beside the pipeline."""
    import timm
    from transformers import BlipForConditionalGeneration, BlipProcessor

    result = {}
    data = train_encoder.labelled(corpus, train_encoder.SIZES)
    data = common.Pictures(corpus, data.fields, data.train, np.arange(len(corpus)))
    for name in train_encoder.ENCODERS:
        body = timm.create_model(f"local-dir:{common.MINI / name}", pretrained=True)
        result[name] = train_encoder.report(
            train_encoder.Classifier(body, train_encoder.SIZES).eval(), data
        )
    result["clip"] = {"image to text recall@1 of 100": train_clip.shipped_recall(corpus)}
    blip = BlipForConditionalGeneration.from_pretrained(train_blip.FOLDER).eval()
    tokenizer = BlipProcessor.from_pretrained(train_blip.FOLDER).tokenizer
    parts = np.array_split(np.arange(2048), 16)
    said = [
        text
        for rows in parts
        for text in train_blip.generate(blip, tokenizer, torch.from_numpy(corpus.images(rows)))
    ]
    result["blip"] = {
        "noun recall": round(float(train_blip.noun_recall(said, corpus.labels["noun"][:2048])), 4)
    }
    return result


def main():
    """Measure everything and write it down."""
    chosen = common.options(__doc__, epochs=None)
    eye, pipe = (
        Judge.open(common.MINI / "judge"),
        models.open_pipeline(sample_dataset.MODEL, chosen.device, torch.float32),
    )
    fresh = Corpus(4096, seed=FRESH)
    scenes = prompts(
        runtime.rng("held-out prompts", chosen.seed), set(Corpus(chosen.renders).prompts)
    )
    measured = {
        "autoencoder, absolute error": errors(pipe.vae, fresh),
        "judge on samples": follows(eye, pipe, scenes),
        "judge on renders (ceiling)": ceiling(eye, scenes),
        "chance": {name: round(1 / len(NAMES[name]), 4) for name in ("noun", "setting", "medium")}
        | {"order": 0.5},
        "foundation models": foundation(fresh),
        "speed": speed(pipe),
        "machine": {
            "threads": torch.get_num_threads(),
            "device": str(pipe.device),
            "torch": torch.__version__,
        },
    }
    files.write_json(common.MINI / "measured.json", measured)
    runtime.log("written: data/mini/measured.json")


if __name__ == "__main__":
    main()
