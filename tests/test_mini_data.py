"""The data set that ships: sampled from the mini Stable Diffusion, in DiffusionDB's layout."""

import hashlib
import io
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[1] / "data"
SHIPPED = DATA / "mini" / "diffusiondb"
sys.path.insert(0, str(DATA / "mini" / "build"))

import sample_dataset  # noqa: E402
from test_renderer import ARTICLE  # noqa: E402


@pytest.fixture(scope="module")
def metadata():
    return pq.read_table(SHIPPED / "metadata.parquet")


@pytest.fixture(scope="module")
def truth():
    return pq.read_table(SHIPPED / "scenes.parquet")


@pytest.fixture(scope="module")
def archives():
    return {
        path.stem: zipfile.ZipFile(path) for path in sorted((SHIPPED / "images").glob("part-*.zip"))
    }


def test_records_refuse_near_duplicates():
    records = sample_dataset.sample_records(300, seed=5)
    assert records == sample_dataset.sample_records(300, seed=5)
    assert len({record.image_name for record in records}) == 300
    prompts = {record.scene.prompt for record in records}
    words = [set(re.findall(r"\w+", prompt.lower())) for prompt in sorted(prompts)]
    assert all(len(a & b) < 0.8 * len(a | b) for i, a in enumerate(words) for b in words[:i])


def test_a_data_set_is_written_byte_for_byte_again(tmp_path):
    records = sample_dataset.sample_records(30, seed=3)
    images = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    seen = [
        {
            "judged_nouns": ["fox"],
            "judged_count": 1,
            "judged_setting": "snow",
            "judged_medium": "neon",
        }
    ] * 30
    for name in ("a", "b"):
        sample_dataset.write(tmp_path / name, records, images, seen)
    files = sorted(
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()
    )
    assert [str(file) for file in files] == [
        "images/part-000001.zip",
        "metadata.parquet",
        "names.json",
        "scenes.parquet",
    ]
    assert all(
        (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        for file in files
    )


def test_columns_are_those_of_diffusiondb(metadata, truth):
    assert metadata.schema.equals(sample_dataset.METADATA)
    assert truth.schema.equals(sample_dataset.SCENES)
    assert metadata["image_name"].equals(truth["image_name"])


def test_rows_are_enough_and_say_how_they_were_sampled(metadata):
    names, prompts = metadata["image_name"].to_pylist(), metadata["prompt"].to_pylist()
    assert len(set(names)) == len(names)
    assert len(set(metadata["seed"].to_pylist())) == len(names)
    assert len(set(prompts)) >= 7000
    assert max(prompts.count(prompt) for prompt in set(prompts)) <= 4
    for column, value in sample_dataset.SAMPLED.items():
        assert set(metadata[column].to_pylist()) == {value}
    assert not any(ARTICLE.search(prompt) for prompt in prompts)


def test_parts_list_their_images(metadata, archives):
    rows = metadata.to_pylist()
    assert sorted(archives) == [
        f"part-{part:06d}" for part in sorted({row["part_id"] for row in rows})
    ]
    for name, archive in archives.items():
        listed = json.loads(archive.read(f"{name}.json"))
        assert set(archive.namelist()) == {*listed, f"{name}.json"}
        assert len(listed) <= 1000
        here = [row for row in rows if row["part_id"] == int(name[-6:])]
        keys = {"p": "prompt", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}
        assert listed == {
            row["image_name"]: {k: row[column] for k, column in keys.items()} for row in here
        }


def test_images_can_be_read(metadata, archives):
    for archive in archives.values():
        for name in archive.namelist()[:40]:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB")


def test_renders_to_compare_with_are_read_like_any_source():
    from rsdlib import data

    pairs = data.load_pairs(DATA / "mini" / "renders")
    assert len(pairs) == pairs["id"].nunique() >= 256
    assert data.open_image(pairs["image"].iloc[-1]).size == (64, 64)
    sampled = set(
        pq.read_table(SHIPPED / "metadata.parquet", columns=["image_name"])[
            "image_name"
        ].to_pylist()
    )
    assert not sampled & set(pairs["id"])


def test_checksums_in_the_readme():
    found = re.findall(
        r"^([0-9a-f]{64})  (\S+)$", (DATA / "README.md").read_text("utf-8"), re.MULTILINE
    )
    listed = {path: digest for digest, path in found}
    code = {DATA / "mini" / "build", DATA / "mini" / "world"}
    files = [path for path in (DATA / "mini").rglob("*") if path.is_file()]
    files = [path for path in files if not code & set(path.parents)]
    shipped = {path.relative_to(DATA).as_posix(): path for path in files}
    assert set(shipped) == set(listed)
    for name, path in shipped.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name], name
    assert sum(path.stat().st_size for path in (DATA / "mini").rglob("*") if path.is_file()) < 40e6
