"""The benchmark of the paper's encoders: all its rows on tiny ones, and what fails is a line."""

import importlib.util
import json
import math
import runpy
import signal
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
FIGURES = (
    "images_per_s",
    "times_original",
    "of_peak",
    "batch",
    "ms",
    "peak_gb",
    "gflop",
    "begin_s",
)


@pytest.fixture(scope="module")
def gpu():
    """Return the script as a module; what it sets for all of torch is set back."""
    precision, tuned = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = tuned


def works(gpu):
    return {work.name: work for work in gpu.WORKS}


def test_every_row_comes_out(gpu, tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "LONGEST", 1e4)  # also where the tests get little of a core
    report = gpu.main(dry=True, seconds=1e6, out=path)
    assert list(report["rows"]) == list(gpu.ROWS)
    assert set(report["left_out"]) == {"vit-h14/compiled", "captions/compiled"}
    for row in report["rows"].values():
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in FIGURES)
    assert json.loads(path.read_text()) == report
    printed = capsys.readouterr().out
    assert all(f"\n| {name} " in printed for name in gpu.ROWS)


@pytest.mark.parametrize("name", ["vit-b16", "swinv2-l", "vit-h14", "vae", "unet"])
def test_the_real_architectures_cost_what_the_goals_state(gpu, name):
    work = works(gpu)[name]
    assert gpu.flops_per_image(work, False, "meta") / 1e9 == pytest.approx(work.gflop, rel=0.005)


def test_timm_stands_in_for_open_clip(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    gpu.flops_per_image.cache_clear()
    flops = gpu.flops_per_image(works(gpu)["vit-h14"], False, "meta")
    gpu.flops_per_image.cache_clear()
    assert flops / 1e9 == pytest.approx(335, rel=0.005)
    assert gpu.attempt(works(gpu)["vit-h14"], "eager", 2, True, CPU)["ms"] > 0


def test_a_batch_that_does_not_fit_is_halved(gpu, monkeypatch):
    stepper, tried = gpu.stepper, []

    def small(work, way, batch, dry, device):
        tried.append(batch)
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return stepper(work, way, batch, dry, device)

    monkeypatch.setattr(gpu, "stepper", small)
    row = gpu.measured("vae/eager", True, CPU, 1e12, {}, 1e4)
    assert (tried, row["batch"]) == ([2, 1], 1)
    assert row["images_per_s"] == pytest.approx(1000 / row["ms"])


def test_only_missing_memory_is_tried_again(gpu):
    def broken(batch):
        tried.append(batch)
        raise RuntimeError(message)

    for message, expected in (("shapes differ", [8]), ("CUBLAS_STATUS_ALLOC_FAILED", [8, 4, 2, 1])):
        tried = []
        with pytest.raises(RuntimeError, match=message):
            gpu.fitting(broken, 8)
        assert tried == expected


def test_a_row_that_fails_is_a_line(gpu, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    gpu.flops_per_image.cache_clear()
    report = gpu.main(["vae/original", "vit-b16/original"], dry=True)
    assert list(report["rows"]) == ["vit-b16/original"]
    assert "diffusers" in report["left_out"]["vae/original"]
    assert "vae/original is left out: ModuleNotFoundError" in capsys.readouterr().out


def test_a_row_that_takes_too_long_is_a_line(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "LONGEST", 0.1)
    monkeypatch.setattr(gpu, "attempt", lambda *_: time.sleep(10))
    timer = signal.getitimer(signal.ITIMER_REAL)[0]
    report = gpu.main(["vit-b16/eager"], dry=True)
    assert report["left_out"] == {"vit-b16/eager": "TimeoutError: not done after 0.1 s"}
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer > 0)  # pytest's own goes on


def test_no_row_begins_without_time(gpu):
    report = gpu.main(dry=True, seconds=5)
    assert not report["rows"]
    assert set(gpu.ROWS) < set(report["left_out"])


def test_a_way_sets_precision_and_layout(gpu):
    found = {}
    for name in ("vae/original", "vae/eager", "unet/original", "unet/eager"):
        work, way = gpu.ROWS[name]
        network, (first, *_) = gpu.prepared(work, way, 2, True, CPU)
        flat = first.is_contiguous(memory_format=torch.channels_last)
        found[name] = next(network.parameters()).dtype, flat
    assert found == {
        "vae/original": (torch.float32, False),
        "vae/eager": (torch.bfloat16, True),
        "unet/original": (torch.float32, False),
        "unet/eager": (torch.float32, True),  # autocast
    }


@pytest.mark.parametrize(
    ("name", "trained"), [("vit-b16/eager", True), ("unet/original", True), ("vae/eager", False)]
)
def test_training_changes_every_weight_and_reading_none(gpu, monkeypatch, name, trained):
    made, build = [], gpu.build
    monkeypatch.setattr(gpu, "build", lambda *how: made.append(build(*how)) or made[-1])
    step = gpu.stepper(*gpu.ROWS[name], 2, True, CPU)
    before = [p.clone() for p in made[0].parameters()]
    step()
    moved = [not torch.equal(p, q) for p, q in zip(before, made[0].parameters(), strict=True)]
    assert all(moved) if trained else not any(moved)


def test_events_time_a_device_that_answers_later(gpu, monkeypatch):
    """The steps return at once; what the device needs for each is in the events alone."""
    busy = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = busy[0]

        def elapsed_time(self, later):
            return later.at - self.at

    def step():
        busy[0] += 20.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seconds = gpu.median_seconds(step, torch.device("cuda"), 1)
    assert seconds == pytest.approx(0.020)


def test_the_slow_cosine_is_the_cosine(gpu):
    a, b = torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(0))
    assert gpu.one_by_one(a, b) == pytest.approx(F.cosine_similarity(a, b).mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
    ],
)
def test_the_peak_is_the_data_sheets_or_measured(gpu, monkeypatch, name, peak):
    monkeypatch.setattr(gpu, "median_seconds", lambda *_: 2.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.ones(2, 4, 4))
    card = gpu.look_at(torch.device("cuda"), 4)
    assert card["peak"] == (peak or 64.0)
    assert ("measured" in card["peak_from"]) == (peak is None)


def test_without_a_gpu_it_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--only", "vit-h14/original"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "no GPU" in first
    assert last.startswith("| vit-h14/original")


def test_it_runs_without_the_package():
    assert "rsdlib" not in SCRIPT.read_text()
