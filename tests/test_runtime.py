"""Files written whole or not at all, checked when read; devices, seeds, settings, progress."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rsdlib import config, runtime
from rsdlib.errors import CacheError, ConfigError, DeviceError, MissingPackageError, RsdError

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3),
    "empty": np.zeros((0, 3), np.uint8),
    "scalar": np.array(3),
    "half": np.ones(4, np.float16),
}

# --- files ------------------------------------------------------------------------------------------------------------------


def test_arrays_come_back_with_shape_type_and_meta(tmp_path):
    runtime.save_arrays(tmp_path / "x", ARRAYS, {"made": ["from", 1]})
    found, meta = runtime.load_arrays(tmp_path / "x")
    assert meta == {"made": ["from", 1]}
    assert found.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_equal_contents_are_equal_bytes(tmp_path):
    for name in "ab":
        runtime.save_arrays(tmp_path / name, ARRAYS, {"x": 1, "y": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "x"
    runtime.save_arrays(path, {"a": np.arange(40.0), "b": np.arange(5)}, {"k": 1})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(len(whole), size=200):
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            arrays, meta = runtime.load_arrays(path)
        except CacheError:
            continue
        assert (meta, arrays.keys()) != ({"k": 1}, {"a", "b"}), f"a flip at byte {at} went unnoticed"


@pytest.mark.parametrize("keep", [0, 5, 50, -1])
def test_cut_file_is_noticed(tmp_path, keep):
    runtime.save_arrays(tmp_path / "x", ARRAYS)
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:keep])
    with pytest.raises(CacheError, match="damaged"):
        runtime.load_arrays(tmp_path / "x")


def test_header_that_claims_terabytes_allocates_nothing(tmp_path):
    header = json.dumps(
        {"a": {"dtype": "F64", "shape": [10**11], "data_offsets": [0, 8 * 10**11]}, "__metadata__": {"rsdlib": "{}"}}
    ).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CacheError, match="does not lie inside"):
        runtime.load_arrays(tmp_path / "x")


def test_cache_is_made_once_and_again_when_stale_or_damaged(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": np.ones(3)}

    for meta, expected in (({"k": 1}, 1), ({"k": 1}, 1), ({"k": 2}, 2), ({"k": 2}, 2)):
        runtime.cached_arrays(tmp_path / "x", make, meta)
        assert len(made) == expected
    data = bytearray((tmp_path / "x").read_bytes())
    data[-1] ^= 1
    (tmp_path / "x").write_bytes(data)
    np.testing.assert_array_equal(runtime.cached_arrays(tmp_path / "x", make, {"k": 2})["a"], np.ones(3))
    assert len(made) == 3


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_failing_write_leaves_the_old_file_and_no_leftover(tmp_path, monkeypatch, fails):
    path = tmp_path / "x.json"
    runtime.write_json(path, {"old": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if fails == "write":
        monkeypatch.setattr("pathlib.Path.write_text", full)
    else:
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        runtime.write_json(path, {"new": 1})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_refuses_nan_and_names_damage(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        runtime.write_json(tmp_path / "x", {"a": float("nan")})
    (tmp_path / "x").write_text('{"a": ')
    with pytest.raises(CacheError, match="x cannot be read"):
        runtime.read_json(tmp_path / "x")


def test_parquet_is_written_whole(tmp_path):
    frame = pd.DataFrame({"a": [1, 2]})
    runtime.write_parquet(tmp_path / "x.parquet", frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "x.parquet"), frame)


def test_processes_sharing_a_cache_see_no_torn_file(tmp_path):
    def work(queue):
        try:
            for _ in range(30):
                runtime.save_arrays(tmp_path / "x", {"a": np.arange(5000)})
                assert runtime.load_arrays(tmp_path / "x")[0]["a"].sum() == 12497500
            queue.put(True)
        except Exception as error:
            queue.put(error)

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(queue,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [True] * 4


# --- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epohcs": 3}, "Did you mean 'epochs'"),
        ({"epochs": "3"}, "of type str, not int"),
        ({"epochs": True}, "of type bool"),
        ({"batch_size": -8}, "out of range"),
        ({"seed": 2**40}, "out of range"),
        ({"lr": float("nan")}, "out of range"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        config.replace(config.TrainConfig(), **changes)


def test_profiles_are_data_and_change_as_asked():
    assert set(config.PROFILES) == {"smoke", "mini", "paper"}
    paper = config.profile("paper")
    assert (paper.train.epochs, paper.train.batch_size, paper.train.lr, paper.head.weight) == (3, 64, 1e-4, 0.1)
    assert paper.data.vocabulary_size == 1000
    changed = config.profile("mini", source="elsewhere/pairs", near_duplicate=0.9, limit=10, vocabulary_size=None)
    assert (changed.data.source, changed.data.clean.near_duplicate, changed.data.limit) == ("elsewhere/pairs", 0.9, 10)
    assert changed.data.vocabulary_size == config.profile("mini").data.vocabulary_size
    with pytest.raises(ConfigError, match="Did you mean 'mini'"):
        config.profile("miny")
    with pytest.raises(ConfigError, match="backbone 'vti' is unknown"):
        paper.backbone("vti")


def test_no_profile_name_is_asked_for_outside_config():
    for path in (Path(config.__file__).parent).glob("*.py"):
        if path.name != "config.py":
            text = path.read_text()
            assert 'profile == "' not in text
            assert "profile.name ==" not in text


# --- device, seeds, progress ------------------------------------------------------------------------------------------------


def test_missing_device_is_named():
    with pytest.raises(DeviceError, match="'tpu9' is not a device"):
        runtime.device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="'cuda' was asked for"):
            runtime.device("cuda")
        assert runtime.device("auto").type == "cpu"


def test_precision_is_chosen_or_taken(monkeypatch):
    cpu = torch.device("cpu")
    for fast, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert runtime.precision("auto", cpu) == chosen
    assert runtime.precision("bf16", cpu) == "bf16"
    with pytest.raises(ConfigError, match="fp8"):
        runtime.precision("fp8", cpu)


def test_seeds_are_functions_of_their_keys():
    assert runtime.rng("a", 1).integers(10**9) == runtime.rng("a", 1).integers(10**9)
    draws = {int(runtime.rng(word, seed, epoch).integers(10**12)) for word in "ab" for seed in range(10) for epoch in range(10)}
    assert len(draws) == 200
    assert 0 <= runtime.torch_seed("x") < 2**63


def test_digest_does_not_depend_on_order_or_hash_seed():
    assert runtime.digest({"a": 1, "b": 2}) == runtime.digest({"b": 2, "a": 1})
    code = "from rsdlib import runtime; print(runtime.digest({'x': ['ü', 1.5]}))"
    results = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True).stdout
        for seed in "12"
    }
    assert len(results) == 1


def test_missing_package_says_how_to_install_it():
    with pytest.raises(MissingPackageError, match="pip install no-such-package"):
        runtime.require("no_such_package.sub")
    with pytest.raises(MissingPackageError, match=r"rsdlib\[dist\]"):
        runtime.require("no_such_package", extra="dist")
    assert issubclass(MissingPackageError, (ImportError, RsdError))


def test_headless_progress_is_a_line_now_and_then(capsys):
    assert list(runtime.track(range(5), "counting", every=0)) == list(range(5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("counting: 5/5")
    assert list(runtime.track(iter(range(5)), "quick", every=60)) == list(range(5))
    assert capsys.readouterr().out == ""


def test_project_folder_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.delenv("RSD_ROOT")
    monkeypatch.chdir(tmp_path)
    assert (runtime.root() / "rsdlib" / "runtime.py").is_file()
    monkeypatch.setenv("RSD_ROOT", str(tmp_path))
    assert runtime.root() == tmp_path
