"""Extraction: one pass for all fronts, nothing made twice, the same bytes whoever makes them."""

import functools
import importlib
import json
import os
import queue
import subprocess
import sys
from pathlib import Path

import broken
import numpy as np
import pytest
import torch
import toy_front
from toy_front import SIZE, Deadly, Grid, contents, fronts, open_grid

from rsdlib import data, runtime
from rsdlib.data import forward
from rsdlib.errors import BadImageError, CheckpointError, ConfigError, DeviceError

extraction = importlib.import_module("rsdlib.data.extract")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    broken.diffusiondb(folder, parts=4, images=6)
    return folder


def answers(pairs):
    """Return what the pixels and the grid are, image by image."""
    images = [data.resize(data.open_image(place), SIZE) for place in pairs["image"]]
    with torch.no_grad():
        return np.stack(images), Grid()(torch.from_numpy(np.stack(images))).numpy()


# --- one pass -------------------------------------------------------------------------------------


def test_every_front_is_made_in_one_pass(source, decodes):
    pairs = data.load_pairs(source)
    images, features = data.extract(pairs, fronts())
    assert sorted(decodes) == sorted(pairs["id"])
    rows = np.random.default_rng(0).permutation(len(pairs))
    for store, expected in zip((images, features), answers(pairs), strict=True):
        np.testing.assert_allclose(store.batch(rows), expected[rows], rtol=1e-3)
    assert (images.batch([0]).dtype, features.batch([0]).dtype) == (np.uint8, np.float32)
    assert len({images.key, features.key}) == 2


def test_another_front_reads_again_but_makes_nothing_twice(source, tmp_path, decodes):
    pairs = data.load_pairs(source)
    data.extract(pairs, fronts()[:1])
    before = toy_front.stamps(tmp_path / "data" / "cache" / "parts")
    data.extract(pairs, fronts())
    assert len(decodes) == 2 * len(pairs)
    after = toy_front.stamps(tmp_path / "data" / "cache" / "parts")
    assert {p: t for p, t in after.items() if p.suffix == ".npy"}.items() >= {
        (p, t) for p, t in before.items() if p.suffix == ".npy"
    }


def test_another_cleaning_finds_everything_done(source, decodes):
    pairs = data.load_pairs(source)
    data.extract(pairs.groupby("part_id").head(2), fronts())
    assert len(decodes) == len(pairs)  # whole parts
    decodes.clear()
    some = pairs.iloc[5:14].sample(frac=1, random_state=0)
    store, _ = data.extract(some, fronts())
    assert decodes == []
    assert (store.batch(range(len(some))) == answers(some)[0]).all()


def test_an_image_that_nobody_asked_for_may_be_bad(source):
    members = broken.read_part(source, 2)
    name = data.load_pairs(source).query("part_id == 2")["id"].iloc[0]
    broken.write_part(source, 2, {**members, name: b"not an image"})
    pairs = data.load_pairs(source)
    (store,) = data.extract(pairs[pairs["id"] != name], [data.pixels(SIZE)])
    assert store.ok.all()
    with pytest.raises(BadImageError, match=name):
        data.extract(pairs, [data.pixels(SIZE)])


def test_known_zips_are_not_opened_again_until_they_change(source, monkeypatch):
    pairs = data.load_pairs(source)
    keys = [store.key for store in data.extract(pairs, fronts())]
    opened, own = [], extraction.open_part

    def count(path):
        opened.append(path.name)
        return own(path)

    monkeypatch.setattr(extraction, "open_part", count)
    assert [store.key for store in data.extract(pairs, fronts())] == keys
    assert opened == []
    os.utime(source / "images" / "part-000003.zip", (1, 1))
    assert [store.key for store in data.extract(pairs, fronts())] == keys
    assert len(opened) == 4


def test_large_images_are_decoded_when_they_are_looked_at(source):
    pairs = data.load_pairs(source)
    store = data.Unstored(pairs, SIZE)
    rows = [3, 0, 3]
    assert (store.batch(rows) == answers(pairs)[0][rows]).all()
    assert store.batch([]).shape == (0, 3, SIZE, SIZE)


def test_a_copy_is_one_file_and_the_same_rows(source, tmp_path, decodes):
    pairs = data.load_pairs(source)
    for store in data.extract(pairs, fronts()):
        copy = store.copied(tmp_path / "fast")
        rows = np.random.default_rng(1).integers(0, len(pairs), 40)
        assert (copy.batch(rows) == store.batch(rows)).all()
        assert copy.key == store.key
        assert len(copy._paths) == 1
        assert (store.copied(tmp_path / "fast").batch(rows) == store.batch(rows)).all()


# --- who makes it ---------------------------------------------------------------------------------


def test_shares_of_an_array_job_are_the_whole(source, tmp_path):
    toy_front.extract(source, tmp_path / "whole")
    parts = data.find_parts(source)
    for rank in range(3):
        share = parts[rank::3]
        made = data.run(share, [()] * len(share), fronts(), tmp_path / "shares", "cpu")
        assert sum(len(shards) for shards in made) == len(share)
    assert contents(tmp_path / "shares") == contents(tmp_path / "whole")


def test_processes_open_the_network_themselves_and_make_the_same_bytes(source, tmp_path):
    toy_front.extract(source, tmp_path / "whole")
    with data.executor(processes=2) as pool:
        assert toy_front.extract(source, tmp_path / "two", pool) == 24
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")


def test_a_process_that_opens_other_weights_is_refused(source, tmp_path):
    extraction._opened.cache_clear()
    with pytest.raises(CheckpointError, match="other weights"):
        toy_front.extract(source, tmp_path / "parts", open=functools.partial(open_grid, 2.0))


def test_a_process_that_dies_is_named_and_the_next_run_goes_on(source, tmp_path):
    open = functools.partial(Deadly, str(tmp_path))
    with data.executor(processes=2) as pool, pytest.raises(DeviceError, match="died"):
        toy_front.extract(source, tmp_path / "parts", pool, open)
    assert (tmp_path / "died").exists()
    toy_front.extract(source, tmp_path / "parts")
    toy_front.extract(source, tmp_path / "whole")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_dask_gives_a_lost_workers_part_to_another(source, tmp_path):
    pytest.importorskip("distributed")
    toy_front.extract(source, tmp_path / "whole")
    open = functools.partial(Deadly, str(tmp_path))
    with data.executor(dask="local:2") as pool:
        assert toy_front.extract(source, tmp_path / "parts", pool, open) == 24
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_fifty_times_nothing_is_made_twice_and_bytes_are_the_same(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    broken.diffusiondb(source, parts=12, images=60)
    script = Path(toy_front.__file__)
    command = [sys.executable, script, tmp_path / "runs", source, "50"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= 50


def test_dask_is_asked_for_by_name(monkeypatch):
    def absent(module):
        raise ConfigError(f"no {module}")

    monkeypatch.setattr(runtime, "require", absent)
    with pytest.raises(ConfigError, match="distributed"), data.executor(dask="local:2"):
        pass


# --- memory and devices ---------------------------------------------------------------------------


def test_a_batch_that_memory_does_not_hold_is_halved_for_good_and_said_once(capsys):
    sizes = []

    class Large(torch.nn.Module):
        def forward(self, inputs):
            sizes.append(len(inputs))
            if len(inputs) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return inputs.float()

    run = forward.Forward(Large(), torch.device("cpu"))
    values = np.arange(10.0, dtype=np.float32)[:, None]
    for _ in range(2):
        assert (run(values) == values).all()
    assert sizes == [10, 5, 2, 2, 2, 2, 2, *[2] * 5]
    assert capsys.readouterr().out.count("too little memory") == 1


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken, numbers = [], queue.SimpleQueue()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for number in range(3):
        numbers.put(number)
    for _ in range(3):
        runtime.share(3, numbers)  # as each process begins
    assert taken == [0, 1, 0]
