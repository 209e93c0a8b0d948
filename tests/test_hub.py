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

PROGRAM = """
import dataclasses, json, sys
import torch
from rsdlib import models, weights
from rsdlib.config import BackboneConfig
from rsdlib.errors import RsdError

revision = "0123456789abcdef0123456789abcdef01234567"
for name, sha256 in json.loads(sys.argv[1]).items():
    weights.MODELS[name] = weights.ModelSpec(f"tiny/{name}", "none", revision, sha256)
images = (torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32) % 256).to(torch.uint8)
for library, name in json.loads(sys.argv[2]):
    try:
        encoder = models.create(BackboneConfig(library, name)).eval()
        with torch.no_grad():
            read = images if encoder.front is None else encoder.front(images)
            print(json.dumps([name, encoder(read).double().sum().item()]))
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
    return {f"tiny/{name}": folder / name for name in ("vit", "clip", "sd")}


def load(endpoint, home, wanted, sha256=None):
    """Build encoders in a process of its own, whose hub is at `endpoint`; return what each gave."""
    known = {name: {} for name in ("vit", "clip", "sd", "gone")} | (sha256 or {})
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(known), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_models_come_from_the_hub_and_then_from_the_cache(repositories, tmp_path):
    wanted = [("timm", "vit"), ("open_clip", "clip"), ("diffusers", "sd"), ("timm", "gone")]
    with hub.serve(repositories) as (endpoint, asked):
        first = load(endpoint, tmp_path, wanted)
        assert any(path.startswith("tiny/clip/resolve/") for path in asked)
    assert all(isinstance(first[name], float) for name in ("vit", "clip", "sd")), first
    assert "ModelNotFoundError" in first["gone"]
    assert "$RSD_MODELS/gone" in first["gone"]
    again = load(endpoint, tmp_path, wanted[:3])  # nobody answers there any more
    assert again == {name: first[name] for name in ("vit", "clip", "sd")}


def test_other_bytes_than_registered_are_refused(repositories, tmp_path):
    with hub.serve(repositories) as (endpoint, _):
        found = load(
            endpoint, tmp_path, [("timm", "vit")], {"vit": {"model.safetensors": "0" * 64}}
        )
    assert "CheckpointError" in found["vit"]
    assert "model.safetensors has SHA-256" in found["vit"]


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
    assert weights.find("other", "config.json", fetch=False) is None
