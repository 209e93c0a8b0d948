"""The whole paper profile once through: its architectures with random weights, a step each.

Needs about 25 GB of memory and 60 GB of disk, and an hour on two cores.
"""

import io
import itertools
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import REPOSITORY
from PIL import Image
from test_paper_size import SD1, SD2, TEXT1, TEXT2, pipeline

from rsdlib import config, data

PAPER = config.profile("paper")
SHORT = """
from rsdlib import config
paper = config.PROFILES["paper"]
train = config.replace(paper.train, epochs=1)
config.PROFILES = {**config.PROFILES, "paper": config.replace(paper, train=train)}
"""
NOTEBOOKS = {  # in an order that leaves early what fills the disk
    "00": "-p resample 1",
    "01": "",
    "02": "",
    "03": "",
    "04": "",
    "06": "-p shifted 2 -p most 4",
    "08": "",
    "05": "",
    "07": "-p count 2 -p few 1 -p noises 1 -p steps 2 -p places [1] -p blends [0.5] -p half true",
}


def vit_and_swin(root):
    import timm

    for name in (PAPER.backbone("vit").model, PAPER.backbone("swin").model):
        body = timm.create_model(name).half()
        timm.models.save_for_hf(body, root / name, safe_serialization=True)


def clip(root):
    import open_clip
    from safetensors.torch import save_file

    folder, name = root / "ViT-H-14", PAPER.backbone("clip").model
    folder.mkdir()
    model = open_clip.create_model(name).half()
    about = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def blip(root):
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )
    from wordpieces import bert_tokenizer

    tokenizer = bert_tokenizer(tiny.PROMPTS, size=200)
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "image_size": 384}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"vocab_size": 30_524, "encoder_hidden_size": 1024}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text |= {"eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id}
    folder = root / PAPER.backbone("blip").model
    made = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    made.half().save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(), tokenizer).save_pretrained(folder)


def stable_diffusion(root):
    for name, about in (("v1-4", (SD1, TEXT1)), ("2-base", (SD2, TEXT2))):
        pipeline(*about).to(dtype=torch.float16).save_pretrained(root / f"stable-diffusion-{name}")


STYLES = ("dark", "bright", "golden", "broken", "ancient", "tiny")
SUBJECTS = ("castle", "river", "robot", "dragon", "ship", "horse")
PLACES = ("forest", "desert", "market", "valley", "harbour", "snow")


def some_prompts():
    """Return eight prompts: four to train on, two to choose by, two to test."""
    wanted, chosen = {"train": 4, "val": 2, "test": 2}, []
    for words in itertools.product(STYLES, SUBJECTS, PLACES):
        prompt = "a {} {} in the {}".format(*words)
        (side,) = data.split([data.prompt_key(prompt)], 0.1, 0.04)  # the profile's
        if wanted[side]:
            wanted[side] -= 1
            chosen.append(prompt)
    return chosen


def diffusiondb(root):
    """Write two parts of four images of 512 pixels, and their table."""
    folder, rows, rng = root / "data" / "diffusiondb", [], np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number, prompt in enumerate(some_prompts()):
        name, part = f"{number:04}.png", number // 4 + 1
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((512, 512), Image.BICUBIC).save(stream, "PNG")
        path = folder / "images" / f"part-{part:06}.zip"
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, stream.getvalue())
        row = {"image_name": name, "prompt": prompt, "part_id": part, "seed": number}
        row |= {"step": 2, "cfg": 7.0, "sampler": 8, "width": 512, "height": 512}
        rows.append(row | {"image_nsfw": 0.1, "prompt_nsfw": 0.1})
    pd.DataFrame(rows).to_parquet(folder / "metadata.parquet")


def prepare(root):
    """Make a project's folder that holds the models, the data and the notebooks."""
    torch.manual_seed(0)
    for make in (vit_and_swin, clip, blip, stable_diffusion, diffusiondb):
        make(root)
    for name in ("pyproject.toml", "notebooks"):
        (root / name).symlink_to(REPOSITORY / name)
    (root / "data" / "mini").symlink_to(REPOSITORY / "data" / "mini")
    startup = root / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "short.py").write_text(SHORT)


def run(root, number, options):
    """Run a notebook of the paper's profile as a user does, for one epoch a training."""
    environment = {**os.environ, "RSD_ROOT": str(root), "RSD_MODELS": str(root)}
    environment |= {"IPYTHONDIR": str(root / "ipython"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "rsdlib.cli", "run", number, "-p", "profile", "paper"]
    subprocess.run([*command, *options.split()], env=environment, check=True, cwd=root)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_notebook_of_the_paper_profile(tmp_path):
    prepare(tmp_path)
    for number, options in NOTEBOOKS.items():
        run(tmp_path, number, options)
    stored = {path.name[:2] for path in tmp_path.glob("runs/paper/figures-*/*.json")}
    assert stored >= {f"0{number}" for number in range(1, 9)}
