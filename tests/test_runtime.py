"""Devices, precision, seeds, progress, and what a run says of its machine."""

import json
import subprocess
import sys

import pytest
import torch

from rsdlib import runtime
from rsdlib.errors import ConfigError, DeviceError, MissingPackageError, RsdError

# --- device and precision -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu9", "cpu:x", ""])
def test_what_is_no_device_is_named(name):
    with pytest.raises(DeviceError, match=f"'{name}' is not a device"):
        runtime.device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu", "meta", "cpu:1"])
def test_missing_device_is_named(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"'{name}' was asked for, but there is none here"):
        runtime.device(name)


def test_device_is_taken_by_name_or_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="cuda:2"):
        runtime.device("cuda:2")
    for there, chosen in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert runtime.device("auto").type == chosen


def test_precision_is_chosen_or_taken(monkeypatch):
    cpu = torch.device("cpu")
    for fast, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert runtime.precision("auto", cpu) == chosen
    assert runtime.precision("bf16", cpu) == "bf16"
    with pytest.raises(ConfigError, match="fp8"):
        runtime.precision("fp8", cpu)


# --- seeds ----------------------------------------------------------------------------------------


def test_seeds_are_functions_of_their_keys():
    keys = [(word, seed, epoch) for word in "ab" for seed in range(10) for epoch in range(10)]
    draws = [int(runtime.rng(*key).integers(10**12)) for key in keys]
    assert [int(runtime.rng(*key).integers(10**12)) for key in keys] == draws
    assert len(set(draws)) == 200
    seeds = {runtime.torch_seed(*key) for key in keys}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**60 for seed in seeds)


def test_keys_do_not_run_into_each_other():
    draws = {
        int(runtime.rng(*keys).integers(10**12))
        for keys in [("a", 12), ("a1", 2), ("a", 1, 2), ("a", "12"), (["a"], 12), ('a",1', 2)]
    }
    assert len(draws) == 6


def test_seeds_do_not_depend_on_the_process():
    code = "from rsdlib import runtime; print(runtime.torch_seed('x', 1, 'ü'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == runtime.torch_seed("x", 1, "ü")


# --- talking to the user --------------------------------------------------------------------------


def test_missing_package_says_how_to_install_it():
    with pytest.raises(MissingPackageError, match="pip install no-such-package"):
        runtime.require("no_such_package.sub")
    assert issubclass(MissingPackageError, (ImportError, RsdError))
    assert runtime.require("json.decoder") is json.decoder


def test_headless_progress_is_a_line_now_and_then(capsys):
    assert list(runtime.track(range(5), "counting", every=0)) == list(range(5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("counting: 5/5")
    assert list(runtime.track(iter(range(5)), "quick", every=60)) == list(range(5))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("1", False)])
def test_only_the_main_process_speaks(monkeypatch, capsys, rank, speaks):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert runtime.is_main_process() == speaks
    runtime.log("a line")
    assert list(runtime.track(range(3), "counting", every=0)) == [0, 1, 2]
    assert bool(capsys.readouterr().out) == speaks


def test_environment_can_be_written_and_says_what_ran():
    said = json.loads(json.dumps(runtime.environment()))
    assert torch.__version__.startswith(said["versions"]["torch"])
    assert said["threads"] == torch.get_num_threads()
    assert said["git"]


def test_a_bar_leaves_nothing_behind(capsys, monkeypatch):
    """What a terminal or JupyterLab shows at the end, after every carriage return, is blank."""
    monkeypatch.delenv("RSD_HEADLESS")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(runtime.track(range(5), "counting")) == list(range(5))
    printed = capsys.readouterr()
    assert "counting" in printed.out
    assert printed.out.split("\r")[-1].strip() == ""
    assert "\n" not in printed.out
    assert printed.err == ""
