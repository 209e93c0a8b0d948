"""Pretrained weights: the real loading code against a hub on the loopback, with tiny models."""

import json
import os
import subprocess
import sys

import hub
import pytest
import tiny
import torch
from conftest import REPOSITORY

from rsdlib import files, weights

VIT = "vit_base_patch16_224.augreg_in21k_ft_in1k"
CLIP, SD, BLIP = "ViT-H-14", "stable-diffusion-2-base", "blip-image-captioning-large"
GONE = "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k"
PROGRAM = """
import dataclasses, json, sys
import torch
from rsdlib import models, weights
from rsdlib.config import BackboneConfig
from rsdlib.errors import RsdError

registered = json.loads(sys.argv[1])
for name, spec in weights.MODELS.items():
    weights.MODELS[name] = dataclasses.replace(spec, sha256=registered.get(name, {}))
images = (torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32) % 256).to(torch.uint8)
for library, name in json.loads(sys.argv[2]):
    try:
        if library == "blip":
            model = models.open_captioner(name).blip
        elif library == "pipeline":
            model = models.open_pipeline(name, "cpu").unet
        else:
            encoder = models.create(BackboneConfig(library, name)).eval()
            with torch.no_grad():
                read = images if encoder.front is None else encoder.front(images)
                print(json.dumps([name, encoder(read).double().sum().item()]))
            continue
        print(json.dumps([f"{library} {name}", sum(map(torch.numel, model.parameters()))]))
    except RsdError as error:
        print(json.dumps([name, f"{type(error).__name__}: {error}"]))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    import timm

    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments)
    cfg = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "classifier": "head",
        "num_classes": 3,
    }
    told = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "pretrained_cfg": cfg,
        "model_args": arguments,
    }
    files.write_json(folder / "vit" / "config.json", told)
    values = {name: value.numpy() for name, value in vit.state_dict().items()}
    files.save_arrays(folder / "vit" / "model.safetensors", values)
    (folder / "clip").mkdir()
    tiny.clip(folder / "clip")
    tiny.stable_diffusion(folder / "sd")
    tiny.blip(folder / "blip")
    processor = files.read_json(folder / "blip" / "processor_config.json")  # the hub's is older
    files.write_json(folder / "blip/preprocessor_config.json", processor["image_processor"])
    (folder / "blip" / "processor_config.json").unlink()
    for name in UNNEEDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"nobody needs this")
    served = {VIT: "vit", CLIP: "clip", SD: "sd", BLIP: "blip"}
    return {weights.MODELS[name].hub: folder / place for name, place in served.items()}


UNNEEDED = (
    "vit/pytorch_model.bin",
    "clip/open_clip_pytorch_model.bin",
    "clip/model.safetensors",
    "sd/v2.ckpt",
    "sd/unet/diffusion_pytorch_model.fp16.safetensors",
    "sd/unet/diffusion_pytorch_model.bin",
    "sd/safety_checker/model.safetensors",
    "blip/tf_model.h5",
    "blip/pytorch_model.bin",
)


def load(endpoint, home, wanted, sha256=None):
    """Build models in a process of its own, whose hub is at `endpoint`; return what each gave."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(sha256 or {}), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_models_come_from_the_hub_and_then_from_the_cache_if_they_are_right(repositories, tmp_path):
    wanted = [("timm", VIT), ("open_clip", CLIP), ("diffusers", SD), ("pipeline", SD)]
    wanted += [("blip", BLIP), ("timm", GONE)]
    with hub.serve(repositories) as (endpoint, asked):
        first = load(endpoint, tmp_path, wanted)
    came = [path.split("/", 4) for path in asked if "/resolve/" in path]
    came = {f"{repositories[f'{owner}/{name}'].name}/{file}" for owner, name, _, _, file in came}
    assert "sd/unet/diffusion_pytorch_model.safetensors" in came
    assert not came & set(UNNEEDED)
    assert "ModelNotFoundError" in first.pop(GONE)
    assert len(first) == 5
    assert all(isinstance(value, float | int) for value in first.values()), first
    wrong = {VIT: {"model.safetensors": "0" * 64}}
    again = load(endpoint, tmp_path, wanted[:5], wrong)  # nobody answers there any more
    assert "CheckpointError" in again[VIT]
    assert "other bytes than it should: model.safetensors" in again[VIT]
    assert again | {VIT: first[VIT]} == first


# --- the registry ---------------------------------------------------------------------------------


def test_a_folder_is_found_by_its_path_or_its_name(tmp_path, monkeypatch):
    for folder in ("own", "given/other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.setenv("RSD_MODELS", str(tmp_path / "given"))
    assert weights.find(tmp_path / "own", "config.json") == tmp_path / "own"
    assert weights.find("own", "config.json") == tmp_path / "own"  # below the project
    assert weights.find("own", "model_index.json") is None
    assert weights.find("other", "config.json") == tmp_path / "given" / "other"
    assert weights.find("other", "config.json", fetch=False) == tmp_path / "given" / "other"
    assert weights.find("stable-diffusion-v1-4", "config.json", fetch=False) is None
