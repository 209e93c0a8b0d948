"""Reading pairs and images: what is read, what is refused, and stores that equal a fresh decode."""

import concurrent.futures
import errno
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import broken
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFile

from rsdlib import data, files
from rsdlib.data import pairs as pair_readers
from rsdlib.data import parts as readers
from rsdlib.errors import (
    BadArchiveError,
    BadImageError,
    BadTableError,
    BadValueError,
    ConfigError,
    DeviceError,
)

TESTS = Path(__file__).parent
extraction = importlib.import_module("rsdlib.data.extract")
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Put the project's folder, and with it the cache, below the test's own."""
    monkeypatch.setenv("RSD_ROOT", str(tmp_path))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def same(a, b):
    pd.testing.assert_frame_equal(a, b, check_dtype=False)


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", broken.BROKEN_IMAGES)
def test_broken_image_is_refused_by_name(name, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(broken.BROKEN_IMAGES[name]())
    start = time.process_time()
    with pytest.raises(BadImageError) as error:
        data.open_image(path)
    assert time.process_time() - start < 1
    assert (error.value.id, error.value.part) == ("x.png", ".")
    assert "x.png" in str(error.value)
    assert error.value.reason in str(error.value)
    assert error.value.fix
    assert "0x" not in error.value.reason
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


BOMBS = """
import os, resource, sys
import broken
import numpy as np
from rsdlib import data
from rsdlib.errors import BadImageError

for name in (name for name in broken.BROKEN_IMAGES if name.startswith("bomb")):
    content = broken.BROKEN_IMAGES[name]()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.RLIM_INFINITY))
    try:
        np.ones(200 * 2**20, np.uint8)
        print(name, "no limit")
    except MemoryError:
        pass
    try:
        data.decode_image(content)
        print(name, "decoded")
    except BadImageError:
        print(name, "refused")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
"""


def run(program, *arguments):
    """Run a program in a process of its own, which may set its own limits; return its lines."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own account")
def test_bombs_are_refused_in_little_memory():
    lines = run(BOMBS)
    assert len(lines) >= 4
    assert all(line.endswith("refused") for line in lines)


@pytest.mark.parametrize("name", broken.GOOD_IMAGES)
def test_every_mode_becomes_rgb(name, tmp_path):
    make, size, colour, tolerance = broken.GOOD_IMAGES[name]
    path = tmp_path / "x.png"  # the content decides, not the suffix
    path.write_bytes(make())
    image = data.open_image(path)
    assert (image.mode, image.size) == ("RGB", size)
    assert np.abs(np.subtract(image.getpixel((0, 0)), colour)).max() <= tolerance
    pixels = data.resize(image, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_exif_turns_the_image(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(broken.GOOD_IMAGES["turned by EXIF"][0]())
    pixels = np.asarray(data.open_image(path))  # (h, w, 3)
    assert (pixels[:10] == 255).all()
    assert (pixels[10:] == 0).all()


def test_absent_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("none.png", "pipe.png", "folder.png"):
        with pytest.raises(BadImageError, match="no such file"):
            data.open_image(f"{tmp_path}/{name}")
    with pytest.raises(BadArchiveError, match="cannot be opened"):
        data.open_image("none.zip::a.png")


def test_file_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_BYTES", 1000)
    (tmp_path / "x.png").write_bytes(bytes(1001))
    with pytest.raises(BadImageError, match="more than 1,000 bytes"):
        data.open_image(tmp_path / "x.png")


def test_no_file_stays_open(tmp_path):
    (tmp_path / "part-000001.zip").write_bytes(broken.BROKEN_MEMBERS["flipped byte"]())
    (tmp_path / "part-000002.zip").write_bytes(broken.BROKEN_ZIPS["symlink"]())
    (tmp_path / "x.png").write_bytes(broken.BROKEN_IMAGES["PNG cut at 0.5"]())
    before = len(os.listdir("/dev/fd"))
    data.open_image(tmp_path / "part-000001.zip::b.png")
    for locator in ("part-000001.zip::a.png", "part-000002.zip::a.png", "x.png"):
        with pytest.raises((BadImageError, BadArchiveError)):
            data.open_image(tmp_path / locator)
    assert len(os.listdir("/dev/fd")) == before


def test_threads_agree(tmp_path):
    broken.diffusiondb(tmp_path)
    locators = [*data.load_pairs(tmp_path)["image"]] * 20
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        images = list(pool.map(data.open_image, locators))
    assert all(
        image == data.open_image(locator) for image, locator in zip(images, locators, strict=True)
    )


def test_resize_is_the_centre_square_bicubic():
    image = broken.photo(64, 64)
    assert (data.resize(image, 64) == np.asarray(image).transpose(2, 0, 1)).all()
    small = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert abs(data.resize(image, 24).astype(int) - small).max() <= 1
    wide = Image.new("RGB", (128, 64), "black")
    wide.paste(image, (32, 0))
    assert (data.resize(wide, 64) == data.resize(image, 64)).all()
    assert data.resize(image, 100).shape == (3, 100, 100)


# --- zips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", broken.BROKEN_ZIPS)
def test_broken_zip_is_refused_and_writes_nothing(name, source, monkeypatch):
    monkeypatch.setattr(readers, "MAX_MEMBERS", 50)
    part = source / "images" / "part-000001.zip"
    part.parent.mkdir()
    part.write_bytes(broken.BROKEN_ZIPS[name]())
    before = sorted(source.parent.rglob("*"))
    for read in (lambda: data.open_image(f"{part}::ok.png"), lambda: data.load_pairs(source)):
        with pytest.raises(BadArchiveError, match=r"part-000001\.zip"):
            read()
    assert sorted(source.parent.rglob("*")) == before


OTHER_ARCHIVES = [("tar", name, make) for name, make in broken.BROKEN_TARS.items()]
OTHER_ARCHIVES += [("parquet", name, make) for name, make in broken.BROKEN_PARQUETS.items()]


@pytest.mark.parametrize(("kind", "name", "make"), OTHER_ARCHIVES)
def test_broken_archive_is_refused_and_writes_nothing(kind, name, make, source, monkeypatch):
    monkeypatch.setattr(readers, "MAX_MEMBERS", 50)
    monkeypatch.setattr(readers, "MAX_GROUP", 10**6)
    path = source / f"00000.{kind}"
    path.write_bytes(make())
    before = sorted(source.parent.rglob("*"))
    for read in (lambda: data.open_image(f"{path}::ok.png"), lambda: data.load_pairs(source)):
        with pytest.raises(BadArchiveError, match=rf"00000\.{kind}") as refused:
            read()
        assert refused.value.fix
        assert "\n" not in str(refused.value)
    assert sorted(source.parent.rglob("*")) == before


@pytest.mark.parametrize("name", broken.BROKEN_MEMBERS)
def test_broken_member_is_refused_alone(name, tmp_path):
    part = tmp_path / "part-000001.zip"
    part.write_bytes(broken.BROKEN_MEMBERS[name]())
    with pytest.raises(BadImageError) as error:
        data.open_image(f"{part}::a.png")
    assert (error.value.id, error.value.part) == ("a.png", "part-000001.zip")
    assert data.open_image(f"{part}::b.png").size == (8, 8)


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extracted", [False, True], ids=["zips", "folders"])
@pytest.mark.parametrize("holders", [("table",), ("jsons",), ("table", "jsons")], ids="+".join)
def test_diffusiondb_layouts(source, extracted, holders):
    expected = broken.diffusiondb(
        source, table="table" in holders, jsons="jsons" in holders, extracted=extracted
    )
    pairs = data.load_pairs(source)
    expected = expected.sort_values("image_name", ignore_index=True)
    assert [*pairs["id"]] == [*expected["image_name"]]
    assert [*pairs["prompt"]] == [*expected["prompt"]]
    assert [*pairs["seed"]] == [*expected["seed"]]
    assert [*pairs["part_id"]] == [*expected["part_id"]]
    assert [*pairs.columns[:3]] == ["id", "prompt", "image"]
    assert all(data.open_image(locator).height == 48 for locator in pairs["image"])
    assert all(locator.startswith(f"{source}/images/part-00000") for locator in pairs["image"])


def test_parts_may_lie_in_the_source_itself(source):
    broken.diffusiondb(source)
    expected = data.load_pairs(source)
    for part in (source / "images").iterdir():
        part.rename(source / part.name)
    same(data.load_pairs(source).drop(columns="image"), expected.drop(columns="image"))


def test_locators_work_from_any_directory(source, tmp_path, monkeypatch):
    broken.diffusiondb(source)
    locator = data.load_pairs(source)["image"].iloc[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data.open_image(locator)
    # The same relative path where the user happens to be.
    broken.diffusiondb(tmp_path / "elsewhere" / "source", images=1)
    assert data.load_pairs(source)["image"].iloc[0] == locator
    assert data.open_image(data.load_pairs(source)["image"].iloc[3])
    tmp_path.joinpath("source").rename(tmp_path / "moved")
    data.open_image(data.load_pairs("moved")["image"].iloc[0])


def test_order_of_rows_does_not_matter(source):
    frame = broken.diffusiondb(source, parts=3)
    pairs, few = data.load_pairs(source), data.load_pairs(source, limit=4)
    frame.sample(frac=1, random_state=1).to_parquet(source / "metadata.parquet")
    same(data.load_pairs(source), pairs)
    same(data.load_pairs(source, limit=4), few)
    same(few, pairs[pairs["part_id"] == 1].iloc[:4].reset_index(drop=True))
    with pytest.raises(ConfigError):
        data.load_pairs(source, limit=0)


def test_rows_of_absent_parts_are_left_out_and_counted(source, capsys):
    broken.diffusiondb(source, parts=3)
    (source / "images" / "part-000002.zip").unlink()
    pairs = data.load_pairs(source)
    assert sorted(pairs["part_id"].unique()) == [1, 3]
    assert "5 of 15 rows are left out" in capsys.readouterr().out


def test_unlisted_files_are_counted(source, capsys):
    frame = broken.diffusiondb(source, jsons=False)
    frame.iloc[1:].to_parquet(source / "metadata.parquet")
    assert len(data.load_pairs(source)) == 9
    assert "1 files in the parts are not listed" in capsys.readouterr().out


def test_missing_prompts_stay_missing(source):
    frame = broken.diffusiondb(source, parts=1, images=3, jsons=False)
    frame["prompt"] = ["None", None, ""]
    frame.to_parquet(source / "metadata.parquet")
    prompts = data.load_pairs(source).set_index("id")["prompt"].loc[frame["image_name"]]
    assert [pd.isna(prompt) for prompt in prompts] == [False, True, False]
    assert prompts.iloc[0] == "None"


def _rewrite(change):
    """Return a fault: a change of the table's frame."""
    return lambda folder, frame: change(frame).to_parquet(folder / "metadata.parquet")


def _rewrite_json(change):
    """Return a fault: a change of the first part's JSON."""

    def fault(folder, _):
        members = broken.read_part(folder, 1)
        listed = json.loads(members["part-000001.json"])
        members["part-000001.json"] = change(listed).encode()
        broken.write_part(folder, 1, members)

    return fault


def _drop_image(folder, frame):
    members = broken.read_part(folder, 1)
    del members[frame["image_name"].iloc[2]]
    broken.write_part(folder, 1, members)


def _first(frame, **values):
    return pd.concat([frame.iloc[:1].assign(**values), frame], ignore_index=True)


def _second_prompt(listed):
    return json.dumps({name: {**row, "prompt": "x"} for name, row in listed.items()})


def _other_prompt(listed):
    return json.dumps({name: {**row, "p": row["p"] + "!"} for name, row in listed.items()})


def _table(change, message, error=BadTableError):
    return _rewrite(change), error, message


def _json(change, message, error=BadTableError):
    return _rewrite_json(change), error, message


def _file(change, message):
    return lambda folder, _: change(folder / "metadata.parquet"), BadTableError, message


def _two_names(folder, frame):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame)
    names = ["prompt" if name == "seed" else name for name in table.column_names]
    pq.write_table(
        table.rename_columns(names).replace_schema_metadata(), folder / "metadata.parquet"
    )


BAD_TABLES = {  # fault, error, what the message names
    "table cut": _file(lambda path: os.truncate(path, 300), "metadata.parquet"),
    "table empty": _file(lambda path: os.truncate(path, 0), "metadata.parquet"),
    "table is text": _file(lambda path: path.write_text("x" * 999), "metadata.parquet"),
    "no prompt column": _table(lambda x: x.drop(columns="prompt"), "'prompt'"),
    "no name column": _table(lambda x: x.drop(columns="image_name"), "'image_name'"),
    "no part column": _table(lambda x: x.drop(columns="part_id"), "'part_id'"),
    "prompts are numbers": _table(lambda x: x.assign(prompt=1.5), "'prompt'.*text"),
    "prompts are bytes": _table(lambda x: x.assign(prompt=b"x"), "'prompt'.*text"),
    "names are numbers": _table(lambda x: x.assign(image_name=range(len(x))), "'image_name'.*text"),
    "a name is missing": _table(lambda x: _first(x, image_name=None), "'image_name'.*text"),
    "parts are text": _table(lambda x: x.assign(part_id="one"), "'part_id'.*whole numbers"),
    "scores are text": _table(lambda x: x.assign(image_nsfw="low"), "'image_nsfw'.*numbers"),
    "two columns of one name": (_two_names, BadTableError, "metadata.parquet"),
    "JSON with two prompts": (
        lambda folder, _: (
            (folder / "metadata.parquet").unlink(),
            _rewrite_json(_second_prompt)(folder, _),
        ),
        BadTableError,
        "the name of another",
    ),
    "a row twice": _table(_first, "-1000.png' .*stands there 2 times.*same prompt"),
    "an id with two prompts": _table(
        lambda x: _first(x, prompt="x"), "-1000.png' .*different prompt"
    ),
    "an id in two parts": _table(lambda x: _first(x, part_id=2), "-1000.png' .*different part_id"),
    "an id in no part": _table(
        lambda x: _first(x, image_name="q.png"), "'q.png'.*part-000001", BadArchiveError
    ),
    "a name that climbs": _table(
        lambda x: _first(x, image_name="../q.png"), "'../q.png'.*part-000001", BadArchiveError
    ),
    "an image not in its part": (_drop_image, BadArchiveError, "-1002.png'.*part-000001"),
    "JSON contradicts": _json(_other_prompt, "part-000001.*number 1"),
    "JSON names another image": _json(
        lambda x: json.dumps({"q.png": {"p": ""}, **x}), "'q.png'.*part-000001", BadArchiveError
    ),
    "JSON cut": _json(lambda x: json.dumps(x)[:-9], "part-000001.json"),
    "JSON is a list": _json(lambda x: json.dumps([*x]), "part-000001.json"),
    "JSON nested too deeply": _json(lambda x: "[" * 200_000, "part-000001.json"),
    "JSON repeats a key": _json(
        lambda x: '{"a.png": {"p": ""}, "a.png": {"p": "x"}}', "'a.png' stands twice"
    ),
    "no part on disk": (
        lambda folder, _: [path.unlink() for path in folder.glob("images/*")],
        BadTableError,
        "source",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table(name, source):
    fault, error, message = BAD_TABLES[name]
    fault(source, broken.diffusiondb(source))
    with pytest.raises(error, match=message) as raised:
        data.load_pairs(source)
    assert raised.value.fix
    assert str(source) not in str(raised.value)


@pytest.mark.parametrize("extracted", [False, True], ids=["zips", "folders"])
def test_two_parts_with_one_id_and_no_table(source, extracted):
    members = {
        "a.png": b"",
        "part-000001.json": b'{"a.png": {"p": "x"}}',
        "part-000002.json": b'{"a.png": {"p": "x"}}',
    }
    for part in (1, 2):
        broken.write_part(source, part, members, extracted)
    with pytest.raises(BadTableError, match=r"'a\.png' .*stands there 2 times.*different part_id"):
        data.load_pairs(source)


def test_no_table_at_all(source):
    for folder, message in ((source, "neither"), (source / "none", "no folder")):
        with pytest.raises(BadTableError, match=message):
            data.load_pairs(folder)
    broken.diffusiondb(source, table=False, jsons=False)
    with pytest.raises(BadTableError, match=r"part-000001\.zip has no part-000001\.json"):
        data.load_pairs(source)


WORDS = ["None", "nan", "NA", "null", "n/a", ' kept, as "found"\n', "漢字 🦊", "001"]


def _plain(folder, names, suffix):
    """Write a plain folder, an image and one of `WORDS` a row; name its file and prompt columns."""
    rows = [{names[0]: f"{i:03d}.png", names[1]: word, "seed": i} for i, word in enumerate(WORDS)]
    for row in rows:
        broken.photo(seed=row["seed"]).save(folder / row[names[0]])
    if suffix == "csv":
        pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    else:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "names",
    [("file_name", "text"), ("image", "caption"), ("image_name", "prompt"), ("id", "prompt")],
    ids="+".join,
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_plain_folder(source, names, suffix):
    _plain(source, names, suffix)
    pairs = data.load_pairs(source)
    assert [*pairs["prompt"]] == WORDS
    assert [*pairs["seed"]] == [*range(len(WORDS))]
    assert [*pairs.columns] == ["id", "prompt", "image", "seed"]
    assert pairs["image"].iloc[1] == f"{source}/001.png"
    assert data.open_image(pairs["image"].iloc[1]) == broken.photo(seed=1)


def test_plain_ids_may_lack_the_suffix_and_files_may_lie_deeper(source):
    (source / "deep").mkdir()
    broken.photo().save(source / "007.png")
    broken.photo().save(source / "deep" / "x.png")
    (source / "metadata.jsonl").write_text(
        '{"id": "007", "prompt": null}\n{"id": "deep/x", "prompt": "cut \\ud83d"}\n'
    )
    pairs = data.load_pairs(source)
    assert [*pairs["id"]] == ["007", "deep/x"]
    assert [*pairs["image"]] == [f"{source}/007.png", f"{source}/deep/x.png"]
    assert pd.isna(pairs["prompt"].iloc[0])
    assert pairs["prompt"].iloc[1] == "cut ?"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("csv", "", "metadata.csv cannot be read"),
        ("csv", "id,prompt\n../../etc/passwd,x\n", "'../../etc/passwd'"),
        ("csv", "id,prompt\n/etc/passwd,x\n", "'/etc/passwd'"),
        ("csv", "id,prompt\n1,x\n1,x\n", "'1' .*stands there 2 times"),
        ("csv", "id,prompt,seed\n1,x,many\n", "'seed'.*numbers"),
        ("csv", "name,prompt\n1,x\n", "no column 'id' or 'file_name'"),
        ("csv", 'id,prompt\n1,"x\n', "cannot be read"),
        ("jsonl", '{"id": "1", "prompt": "x"}\n[]\n', "JSON object"),
        ("jsonl", '{"id": "1", "prompt": \n', "cannot be read"),
        ("jsonl", '{"id": 1, "prompt": "x"}\n', "'id'.*text"),
        ("jsonl", '{"id": "1", "prompt": ["x"]}\n', "'prompt'.*text"),
    ],
)
def test_bad_plain_table(source, name, text, message):
    (source / f"metadata.{name}").write_text(text)
    with pytest.raises(BadTableError, match=message):
        data.load_pairs(source)


# --- DiffusionDB Large, and parts that are not opened ---------------------------------------------


def test_large_is_read_from_its_two_folders(source):
    frame = broken.diffusiondb(source, parts=2, format="WEBP")
    expected = data.load_pairs(source)
    members = broken.read_part(source, 2)
    members["part-010001.json"] = members.pop("part-000002.json")
    broken.write_part(source, 10_001, members)
    for number, folder in ((1, 1), (10_001, 2)):
        (source / f"diffusiondb-large-part-{folder}").mkdir()
        name = f"part-{number:06}.zip"
        (source / "images" / name).rename(source / f"diffusiondb-large-part-{folder}" / name)
    frame.replace({"part_id": {2: 10_001}}).to_parquet(source / "metadata-large.parquet")
    (source / "metadata.parquet").unlink()
    (source / "images" / "part-000002.zip").rename(source / "images" / "part-000001.zip")  # of 2M
    pairs = data.load_pairs(source)
    assert [*pairs["part_id"].unique()] in ([1, 10_001], [10_001, 1])
    same(pairs.drop(columns=["image", "part_id"]), expected.drop(columns=["image", "part_id"]))
    assert all(data.open_image(locator).format is None for locator in pairs["image"])
    assert pairs["image"].str.contains("/diffusiondb-large-part-").all()


def test_a_limit_opens_no_further_part(source):
    frame = broken.diffusiondb(source, parts=4)
    pairs = data.load_pairs(source)
    for number in (3, 4):
        (source / "images" / f"part-{number:06}.zip").write_bytes(b"")
    by_part = pairs.sort_values(["part_id", "id"]).iloc[:7].sort_values("id", ignore_index=True)
    same(data.load_pairs(source, limit=7), by_part)
    (source / "metadata.parquet").unlink()
    columns = ["id", "prompt", "image", "part_id", "seed"]
    same(data.load_pairs(source, limit=7)[columns], by_part[columns])
    with pytest.raises(BadArchiveError, match="part-000003"):
        data.load_pairs(source, limit=11)
    frame.to_parquet(source / "metadata.parquet")
    with pytest.raises(BadArchiveError, match="part-000003"):
        data.load_pairs(source, limit=11)


def test_each_part_is_opened_once_and_only_if_rows_are_about_it(source, monkeypatch):
    frame = broken.diffusiondb(source, parts=5)
    opened, open_part = [], pair_readers.open_part
    monkeypatch.setattr(pair_readers, "open_part", lambda p: opened.append(p.name) or open_part(p))
    names = [f"part-{number:06}.zip" for number in range(1, 6)]
    data.load_pairs(source)
    assert sorted(opened) == names
    opened.clear()
    frame.query("part_id != 3").to_parquet(source / "metadata.parquet")
    data.load_pairs(source)
    assert sorted(opened) == names[:2] + names[3:]
    opened.clear()
    (source / "metadata.parquet").unlink()
    data.load_pairs(source)
    assert sorted(opened) == names


def test_who_made_an_image_and_when_is_not_carried(source):
    frame = broken.diffusiondb(source)
    expected = data.load_pairs(source)
    frame["user_name"], frame["timestamp"] = "somebody", pd.Timestamp("2022-08-07", tz="UTC")
    frame.to_parquet(source / "metadata.parquet")
    same(data.load_pairs(source), expected)


# --- archives without a table ---------------------------------------------------------------------


def write_tars(folder, tars=3, images=4):
    """Write a WebDataset; return the expected rows of id, prompt and seed, and the images."""
    rows, pictures = [], []
    for tar in range(tars):
        members = []
        for i in range(images):
            seed = 10 * tar + i
            suffix, format = (("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG"))[i % 3]
            about = {"seed": seed, "width": 48, "key": f"{i:09d}", "embedding": [0.5]}
            if i % 2:
                about["caption"] = f"a photo of the number {seed}"
            else:
                members.append((f"{i:09d}.txt", b"a photo of the number %d" % seed))
            members.append((f"{i:09d}.json", json.dumps(about).encode()))
            pictures.append(broken.encode(broken.photo(seed=seed), format))
            members.append((f"{i:09d}.{suffix}", pictures[-1]))
            name = f"deep/{tar:05d}/{i:09d}.{suffix}"
            rows.append((name, f"a photo of the number {seed}", seed))
        members.append(("readme.txt", b"no image has this name"))
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / f"{tar:05d}.tar").write_bytes(broken.tar_bytes(*members))
    return pd.DataFrame(rows, columns=["id", "prompt", "seed"]), pictures


def test_webdataset(source, tmp_path, monkeypatch):
    expected, pictures = write_tars(source)
    pairs = data.load_pairs(source)
    same(pairs[["id", "prompt", "seed"]], expected)
    assert [*pairs.columns] == ["id", "prompt", "image", "seed", "width", "key"]
    monkeypatch.chdir(tmp_path)
    for locator, picture in zip(pairs["image"], pictures, strict=True):
        assert data.open_image(locator) == data.decode_image(picture)
    store = data.extract(pairs, [data.pixels(SIZE)])[0]
    assert (store.batch(range(len(pairs))) == fresh(pairs)).all()
    (source / "deep" / "00002.tar").write_bytes(b"")
    same(data.load_pairs(source, limit=6), pairs.iloc[:6])
    with pytest.raises(BadArchiveError, match=r"00002\.tar"):
        data.load_pairs(source, limit=9)


def test_webdataset_says_what_is_wrong(source):
    picture, tar = broken.encode(broken.photo()), source / "0.tar"
    for about, message in (
        (b"{", r"a\.json of .*0\.tar"),
        (b"[]", "object"),
        (b'{"text": 1}', "text"),
    ):
        tar.write_bytes(broken.tar_bytes(("a.png", picture), ("a.json", about)))
        with pytest.raises(BadTableError, match=message):
            data.load_pairs(source)
    tar.write_bytes(broken.tar_bytes(("a.png", picture), ("b.PNG", picture), ("b.txt", b"\xff x")))
    pairs = data.load_pairs(source)
    assert [*pairs["id"]] == ["0/a.png", "0/b.PNG"]
    assert pd.isna(pairs["prompt"][0])
    assert pairs["prompt"][1] == "\ufffd x"
    cut = broken.BROKEN_IMAGES["PNG cut at 0.5"]()
    tar.write_bytes(broken.tar_bytes(("a.png", cut), ("a.txt", b"x")))
    with pytest.raises(BadImageError) as error:
        data.open_image(f"{tar}::a.png")
    assert (error.value.id, error.value.part) == ("a.png", "source/0.tar")
    with pytest.raises(BadImageError, match="no such"):
        data.open_image(f"{tar}::b.png")
    tar.write_bytes(broken.tar_bytes(("a.txt", b"x")))
    with pytest.raises(BadTableError, match="neither"):
        data.load_pairs(source)


@pytest.mark.parametrize("nested", [False, True], ids=["bytes", "struct"])
def test_parquet_with_images(source, nested):
    (source / "data").mkdir()
    pictures = [broken.encode(broken.photo(seed=seed), "JPEG") for seed in range(20)]
    holders = [{"bytes": picture, "path": "x"} for picture in pictures] if nested else pictures
    for number in (0, 1):
        rows = range(5 * number, 5 * number + 5)
        table = {
            "caption": [f"a photo of the number {row}" for row in rows],
            "jpg_0": [holders[2 * row] for row in rows],
            "jpg_1": [holders[2 * row + 1] for row in rows],
            "seed": [*rows],
            "scores": [[0.5]] * 5,
        }
        content = broken.parquet_bytes(table, row_group_size=2)
        (source / "data" / f"train-{number}.parquet").write_bytes(content)
    pairs = data.load_pairs(source)
    assert [*pairs.columns] == ["id", "prompt", "image", "seed"]
    places = [(row // 5, row % 5, side, row) for row in range(10) for side in (0, 1)]
    assert [*pairs["id"]] == [f"data/train-{n}/{r:06}/jpg_{side}" for n, r, side, _ in places]
    assert [*pairs["prompt"]] == [f"a photo of the number {row}" for *_, row in places]
    expected = [data.decode_image(picture) for picture in pictures]
    for i in np.random.default_rng(0).permutation(20):
        assert data.open_image(pairs["image"][i]) == expected[i]
    with readers.open_part(source / "data" / "train-0.parquet") as part:  # in any order, and twice
        for i in np.random.default_rng(1).integers(10, size=40):
            assert part.read(f"{i // 2:06}/jpg_{i % 2}") == pictures[i]
        assert part.names() == {f"{row:06}/jpg_{side}" for row in range(5) for side in (0, 1)}
        assert part.crc("000001/jpg_0") == zlib.crc32(pictures[2])
        for name in ("000005/jpg_0", "-1/jpg_0", "0/caption", "0", "x/jpg_0"):
            with pytest.raises(BadImageError, match="no such"):
                part.read(name)
    store = data.extract(pairs, [data.pixels(SIZE)])[0]
    assert (store.batch(range(20)) == fresh(pairs)).all()
    (source / "data" / "train-1.parquet").write_bytes(b"")
    same(data.load_pairs(source, limit=3), pairs.iloc[:3])


def test_parquet_with_images_says_what_is_wrong(source):
    picture, path = broken.encode(broken.photo()), source / "0.parquet"
    path.write_bytes(broken.parquet_bytes({"words": ["x"], "jpg_0": [picture]}))
    with pytest.raises(BadTableError, match="no column 'prompt' or 'text' or 'caption'"):
        data.load_pairs(source)
    path.write_bytes(broken.parquet_bytes({"text": ["x"]}))
    with pytest.raises(BadTableError, match="neither"):
        data.load_pairs(source)
    path.write_bytes(broken.parquet_bytes({"text": ["x", None], "jpg_0": [None, picture]}))
    pairs = data.load_pairs(source)
    assert [pd.isna(prompt) for prompt in pairs["prompt"]] == [False, True]
    with pytest.raises(BadImageError, match="000000/jpg_0"):
        data.open_image(pairs["image"][0])
    assert data.open_image(pairs["image"][1]) == broken.photo()
    flipped = broken.parquet_bytes({"text": ["x"], "jpg_0": [picture]}, compression="zstd")
    path.write_bytes(broken.flip(flipped, flipped.index(b"PNG") + 2000))
    with pytest.raises(BadImageError, match="000000/jpg_0"):
        data.open_image(f"{path}::000000/jpg_0")


# --- the store ------------------------------------------------------------------------------------

SIZE = 24


def stored(pairs, size, folder=None, **how):
    return data.extract(pairs, [data.pixels(size)], folder, **how)[0]


def fresh(pairs):
    return np.stack([data.resize(data.open_image(locator), SIZE) for locator in pairs["image"]])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_store_equals_a_fresh_decode(source, format):
    broken.diffusiondb(source, parts=3, format=format)
    pairs = data.load_pairs(source)
    store, expected = stored(pairs, SIZE), fresh(pairs)
    assert len(store) == len(pairs) == 15
    assert store.ok.all()
    assert store.bad.empty
    for size in (0, 1, 7, 64):
        indices = rng.integers(-len(pairs), len(pairs), size)
        batch = store.batch(indices)
        assert batch.shape == (size, 3, SIZE, SIZE)
        assert batch.dtype == np.uint8
        assert batch.flags.writeable
        assert (batch == expected[indices]).all()
        assert all(
            (store.batch([i])[0] == image).all() for i, image in zip(indices, batch, strict=True)
        )
    for indices in (store.ok, [0.5], [[0]], 3):
        with pytest.raises(BadValueError):
            store.batch(indices)
    with pytest.raises(IndexError):
        store.batch([15])


def test_warm_store_decodes_nothing(source, decodes):
    broken.diffusiondb(source)
    pairs = data.load_pairs(source)
    stored(pairs, SIZE)
    assert sorted(decodes) == sorted(pairs["id"])
    decodes.clear()
    shuffled = pairs.sample(frac=1, random_state=0)
    store = stored(shuffled, SIZE)
    assert decodes == []
    assert (store.batch(range(10)) == fresh(shuffled)).all()
    decodes.clear()
    stored(pairs, SIZE + 1)
    assert len(decodes) == 10


@pytest.mark.parametrize("extracted", [False, True], ids=["zips", "folders"])
def test_content_counts_and_dates_do_not(source, extracted, decodes):
    frame = broken.diffusiondb(source, extracted=extracted)
    pairs = data.load_pairs(source)
    stored(pairs, SIZE)
    for path in source.rglob("*"):
        os.utime(path, (1, 1))
    decodes.clear()
    stored(pairs, SIZE)
    assert decodes == []

    name, image = frame["image_name"].iloc[0], broken.photo(41, 48, 1000)
    image.putpixel((20, 20), (1, 2, 3))
    if extracted:
        (source / "images" / "part-000001" / name).write_bytes(broken.encode(image))
    else:
        broken.write_part(source, 1, {**broken.read_part(source, 1), name: broken.encode(image)})
    store = stored(pairs, SIZE)
    assert len(decodes) == 5  # this part alone
    assert (store.batch(range(10)) == fresh(pairs)).all()


def test_moved_data_hits(source, tmp_path, decodes):
    broken.diffusiondb(source)
    stored(data.load_pairs(source), SIZE)
    source.rename(tmp_path / "moved")
    decodes.clear()
    stored(data.load_pairs(tmp_path / "moved"), SIZE)
    assert decodes == []


def shard_of(folder):
    """Return the one shard in a folder: its images, and why each is bad."""
    return next(folder.glob("*.npy")), next(folder.glob("*.json"))


def test_cut_shards_are_noticed_and_made_again(source, tmp_path, capsys):
    broken.diffusiondb(source, parts=1)
    pairs = data.load_pairs(source)
    expected = stored(pairs, SIZE).batch(range(5))
    shard, _ = shard_of(tmp_path / "data" / "cache" / "parts")
    sound = shard.read_bytes()
    for content in (sound[: len(sound) // 2], sound[:-1], sound + b"x", sound[:4], b""):
        shard.write_bytes(content)
        capsys.readouterr()
        assert (stored(pairs, SIZE).batch(range(5)) == expected).all()
        assert shard.name in capsys.readouterr().out
        assert shard.read_bytes() == sound


def test_every_flipped_bit_is_found_on_demand_and_its_shard_made_again(source, tmp_path):
    broken.diffusiondb(source, parts=2)
    pairs = data.load_pairs(source)
    stored(pairs, SIZE)
    folder = tmp_path / "data" / "cache" / "parts"
    shard, _ = shard_of(folder)
    sound = shard.read_bytes()
    assert data.check_shards() == (2, [])
    for i in (*rng.integers(128, len(sound), 20), len(sound) - 1):
        shard.write_bytes(broken.flip(sound, int(i), 1 << rng.integers(8)))
        assert data.check_shards() == (1, [f"data/cache/parts/{shard.name}"])
        assert not shard.exists()
        stored(pairs, SIZE)
        assert shard.read_bytes() == sound


def test_reasons_are_written_first_and_made_again_with_their_images(source, tmp_path, decodes):
    broken.diffusiondb(source, parts=1)
    members = broken.read_part(source, 1)
    pairs = data.load_pairs(source)
    broken.write_part(source, 1, {**members, pairs["id"].iloc[2]: b"not an image"})
    store = stored(pairs, SIZE, on_bad="skip")
    folder = tmp_path / "data" / "cache" / "parts"
    shard, notes = shard_of(folder)
    reasons = json.loads(notes.read_text())["bad"]
    assert reasons == dict(zip(store.bad["id"], store.bad["reason"], strict=True))
    assert [*reasons] == [pairs["id"].iloc[2]]
    assert notes.stat().st_mtime_ns <= shard.stat().st_mtime_ns
    sound = notes.read_bytes()

    def again():
        for path in folder.glob("index-*"):  # what was found is found anew
            path.unlink()
        return stored(pairs, SIZE, on_bad="skip").ok.tolist()

    for content in (None, b"", sound[:-9], b"[null]", b"{}"):
        notes.unlink() if content is None else notes.write_bytes(content)
        decodes.clear()
        assert again() == store.ok.tolist()
        assert len(decodes) == 5
        assert notes.read_bytes() == sound
    for i in range(0, len(sound), 3):  # whatever bit flips: never another row left out
        notes.write_bytes(broken.flip(sound, i, 1 << rng.integers(8)))
        assert again() == store.ok.tolist()


def test_process_pool_makes_the_same_bytes(source, tmp_path):
    broken.diffusiondb(source, parts=4)
    broken.write_part(source, 2, {**broken.read_part(source, 2), "part-000002.json": b"{}"})
    name = data.load_pairs(source).query("part_id == 2")["id"].iloc[0]
    broken.write_part(source, 2, {**broken.read_part(source, 2), name: b"not an image"})
    pairs = data.load_pairs(source)
    serial = stored(pairs, SIZE, tmp_path / "serial", on_bad="skip")
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        parallel = stored(pairs, SIZE, tmp_path / "parallel", on_bad="skip", pool=pool)
        with pytest.raises(BadImageError, match=name):
            stored(pairs, SIZE, tmp_path / "parallel", pool=pool)
    folders = [tmp_path / name for name in ("serial", "parallel")]
    shards = [[p for p in folder.iterdir() if "index" not in p.name] for folder in folders]
    contents = [{path.name: path.read_bytes() for path in some} for some in shards]
    assert len(contents[0]) == 2 * 4
    assert contents[0] == contents[1]
    same(serial.bad, parallel.bad)
    good = np.flatnonzero(serial.ok)
    assert (serial.ok == parallel.ok).all()
    assert (serial.batch(good) == parallel.batch(good)).all()


def test_skipped_images_are_listed_and_never_replaced(source, capsys):
    broken.diffusiondb(source, parts=2, images=20)
    pairs = data.load_pairs(source)
    chosen = {
        1: pairs.query("part_id == 1")["id"].iloc[3],
        2: pairs.query("part_id == 2")["id"].iloc[7],
    }
    for part, name in chosen.items():
        cut = {name: broken.BROKEN_IMAGES["PNG cut at 0.5"]()}
        broken.write_part(source, part, {**broken.read_part(source, part), **cut})
    with pytest.raises(BadImageError, match=chosen[1]):
        stored(pairs, SIZE)
    store = stored(pairs, SIZE, on_bad="skip")
    assert "2 of 40 images are bad" in capsys.readouterr().out
    assert store.ok.sum() + len(store.bad) == len(store) == 40
    assert {*store.bad["id"]} == {*chosen.values()} == {*pairs["id"][~store.ok]}
    assert [*store.bad["part"]] == [
        "source/images/part-000001.zip",
        "source/images/part-000002.zip",
    ]
    assert store.bad["reason"].str.contains("cut short").all()
    good = np.flatnonzero(store.ok)
    assert (store.batch(good) == fresh(pairs.iloc[good])).all()
    with pytest.raises(BadValueError, match="has no image"):
        store.batch(np.arange(40))
    with pytest.raises(ConfigError):
        stored(pairs, SIZE, on_bad="ignore")
    members = broken.read_part(source, 1)
    emptied = dict.fromkeys(members, b"") | {"part-000001.json": members["part-000001.json"]}
    broken.write_part(source, 1, emptied)
    with pytest.raises(BadTableError, match="21 of 40 images are bad"):
        stored(pairs, SIZE, on_bad="skip")
    assert stored(pairs, SIZE, on_bad="skip", max_bad=0.6).ok.sum() == 19


def test_a_file_that_vanished_is_listed_and_found_again(source):
    _plain(source, ("id", "prompt"), "csv")
    pairs = data.load_pairs(source)
    (source / "003.png").unlink()
    store = stored(pairs, SIZE, on_bad="skip")
    assert [*store.bad["id"]] == ["003.png"]
    assert "no such file" in store.bad["reason"].iloc[0]
    broken.photo(seed=3).save(source / "003.png")
    assert stored(pairs, SIZE).ok.all()


def test_a_stopped_build_goes_on_where_it_stopped(source, tmp_path, monkeypatch, decodes):
    broken.diffusiondb(source, parts=5)
    pairs, save, calls = data.load_pairs(source), files.save_rows, []

    def fail_at_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(files, "save_rows", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        stored(pairs, SIZE)
    assert len(list((tmp_path / "data" / "cache" / "parts").glob("*.npy"))) == 2
    decodes.clear()
    store = stored(pairs, SIZE)
    assert len(decodes) == 3 * 5
    assert (store.batch(range(25)) == fresh(pairs)).all()


def test_many_loose_files_are_split_and_a_new_one_changes_one_shard(source, monkeypatch, decodes):
    monkeypatch.setattr(extraction, "_SHARD", 4)
    rows = []
    for i in range(31):
        broken.photo(8, 8, i).save(source / f"{i:03d}.png")
        rows.append(f'{{"id": "{i:03d}", "prompt": "x"}}\n')
    (source / "metadata.jsonl").write_text("".join(rows))
    pairs = data.load_pairs(source)
    (source / "030.png").rename(source / "later")
    stored(pairs.iloc[:-1], SIZE)
    (source / "later").rename(source / "030.png")
    decodes.clear()
    store = stored(pairs, SIZE)
    assert 0 < len(decodes) < 16
    assert (store.batch(range(31)) == fresh(pairs)).all()


def test_empty_and_repeated_rows(source):
    broken.diffusiondb(source)
    pairs = data.load_pairs(source)
    assert len(stored(pairs.iloc[:0], SIZE)) == 0
    twice = pd.concat([pairs, pairs])
    assert (stored(twice, SIZE).batch(range(20)) == fresh(twice)).all()


def test_zip_is_preferred_to_its_folder(source):
    broken.diffusiondb(source)
    with zipfile.ZipFile(source / "images" / "part-000001.zip") as archive:
        archive.extractall(source / "images" / "part-000001")
    assert data.load_pairs(source)["image"].str.contains(".zip::").all()


class Front(torch.nn.Module):
    """A frozen network that tells images apart."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, images):
        return images.float().mean((1, 2, 3))[:, None] * self.scale  # (b, 2)


def test_another_order_of_rows_never_gets_the_features_of_the_first(source):
    """Fault 5: the store's key ignored the order, so that features went to other rows."""
    broken.diffusiondb(source, parts=3)
    pairs = data.load_pairs(source)
    front, reverse = Front(), pairs.iloc[::-1].reset_index(drop=True)
    features = {}
    for name, frame in (("first", pairs), ("reversed", reverse), ("again", pairs)):
        images = stored(frame, SIZE)
        store = data.features(images, front, device="cpu")
        with torch.no_grad():
            expected = front(torch.from_numpy(fresh(frame))).numpy()
        np.testing.assert_allclose(store.batch(range(15)), expected, rtol=1e-3)
        features[name] = (images.key, store.key)
    assert features["first"] == features["again"]
    assert features["first"][0] != features["reversed"][0]
    assert features["first"][1] != features["reversed"][1]


CHANGES = {
    "a row left out": lambda pairs: pairs.iloc[:-1],
    "a row twice": lambda pairs: pd.concat([pairs, pairs.iloc[-1:]]),
    "parts swapped": lambda pairs: pairs.sort_values("part_id", ascending=False, kind="stable"),
    "neighbours swapped": lambda pairs: pairs.iloc[[1, 0, *range(2, len(pairs))]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_which_rows_a_store_holds_is_in_its_key(source, change):
    broken.diffusiondb(source, parts=2)
    pairs = data.load_pairs(source).sort_values(["part_id", "id"], ignore_index=True)
    store = stored(pairs, SIZE)
    assert stored(CHANGES[change](pairs), SIZE).key != store.key
    assert stored(pairs, SIZE).key == store.key
    assert stored(pairs, SIZE + 1).key != store.key


def test_features_of_no_rows_and_of_the_empty_batch(source, tmp_path):
    broken.diffusiondb(source)
    pairs = data.load_pairs(source)
    store = data.features(stored(pairs, SIZE), Front(), device="cpu")
    assert store.batch([]).shape == (0, 2)
    assert store.batch([3]).dtype == np.float32
    empty = stored(pairs.iloc[:0], SIZE)
    assert len(data.features(empty, Front(), device="cpu")) == 0


def test_pictures_are_a_store():
    images = [broken.photo(seed=1), np.asarray(broken.photo(40, 50, 2)), Image.new("P", (9, 9))]
    store = data.Pictures(images, 16)
    assert (store.batch([0])[0] == data.resize(images[0], 16)).all()
    assert store.ok.tolist() == [True] * 3
    assert store.key == data.Pictures(images, 16).key
    assert store.key != data.Pictures(images[::-1], 16).key
    with pytest.raises(BadValueError):
        store.batch([0.5])
    features = data.features(store, Front(), device="cpu")
    assert features.batch([2, 0]).shape == (2, 2)


MANY_SHARDS = """
import os, resource, sys
import numpy as np
import torch
from rsdlib import data
from rsdlib.data import stores

class Mean(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((1, 2, 3))[:, None]

pairs = data.load_pairs(sys.argv[1])
expected = np.stack([data.resize(data.open_image(locator), 8) for locator in pairs["image"]])
stores._SHARD = 1  # of features: a shard a row
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
(images,) = data.extract(pairs, [data.pixels(8)])
features = data.features(images, Mean(), device="cpu")
rows = np.random.default_rng(0).permutation(len(pairs))
assert (images.batch(rows) == expected[rows]).all()
means = expected[rows].mean((1, 2, 3))
assert np.allclose(features.batch(rows)[:, 0], means, rtol=1e-3)
print(len(images._paths), len(features._paths), len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts Linux's own open files")
def test_more_shards_than_files_may_be_open(source):
    broken.diffusiondb(source, parts=300, images=1)
    shards, features, opened = map(int, run(MANY_SHARDS, source, 128)[-1].split())
    assert shards == features == 300
    assert opened < 100


NO_FILES = """
import errno, os, resource, sys
from rsdlib import data
from rsdlib.errors import RsdError

pairs, size = data.load_pairs(sys.argv[1]), int(sys.argv[3])
(store,) = data.extract(pairs, [data.pixels(size)], on_bad="skip")
tries = {
    "table": lambda: data.load_pairs(sys.argv[1]),
    "image": lambda: data.open_image(pairs["image"].iloc[0]),
    "loose": lambda: data.open_image(sys.argv[2]),
    "batch": lambda: store.batch([0]),
    "build": lambda: data.extract(pairs, [data.pixels(size)], on_bad="skip"),
}
for name, attempt in tries.items():
    data.stores._mapped.cache_clear()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    filler = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(filler) + 1, limit[1]))
    try:
        attempt()
        print(name, "worked")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
    except RsdError as error:
        print(name, repr(error))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for handle in filler:
            os.close(handle)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts Linux's own open files")
def test_too_many_open_files_are_no_damage(source, tmp_path):
    """Fault 10: EMFILE was taken for damage, and whole shards were made again."""
    broken.diffusiondb(source)
    broken.photo().save(source / "loose.png")
    stored(data.load_pairs(source), SIZE, on_bad="skip")
    folder = tmp_path / "data" / "cache" / "parts"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines = run(NO_FILES, source, source / "loose.png", SIZE)
    told = dict(line.split(" ", 1) for line in lines)
    assert told == dict.fromkeys(("table", "image", "loose", "batch", "build"), "EMFILE")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_errors_of_the_machine_are_not_the_datas(source, monkeypatch):
    """What Pillow, Arrow or zipfile meet on a failing disk says nothing of the file."""
    broken.diffusiondb(source)
    locator = data.load_pairs(source)["image"].iloc[0]

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    for module, name in ((Image, "open"), (zipfile, "ZipFile"), (pd, "read_parquet")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(OSError, match="Input/output") as error:
                data.open_image(locator) if module is not pd else data.load_pairs(source)
            assert error.value.errno == errno.EIO


# --- models over stores ---------------------------------------------------------------------------


class Memory:
    """A store in memory."""

    def __init__(self, values):
        self.values, self.ok, self.key = values, np.ones(len(values), bool), "memory"

    def batch(self, rows):
        return self.values[rows]


class Narrow(torch.nn.Module):
    """A network on a device that holds `rows` rows; counts what it is given."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.sizes = rows, []

    def forward(self, inputs):
        self.sizes.append(len(inputs))
        if len(inputs) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs * 2, inputs


def test_apply_is_the_model_on_every_row_in_float32():
    values = rng.normal(size=(10, 3)).astype(np.float32)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5)).train()
    rows = rng.integers(0, 10, 23)
    found = data.apply(model, Memory(values), rows, device="cpu", batch_size=7)
    with torch.no_grad():
        expected = model[0](torch.from_numpy(values[rows])).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_apply_halves_batches_that_memory_does_not_hold_and_says_so_once(capsys):
    values = np.arange(100, dtype=np.float32)[:, None]
    model = Narrow(rows=9)
    how = {"device": "cpu", "batch_size": 64}
    found = data.apply(model, Memory(values), np.arange(100), **how)
    np.testing.assert_array_equal(found, 2 * values)
    assert model.sizes == [64, 32, 16, *[8] * 8, *[8] * 4, 4]
    assert capsys.readouterr().out.count("too little memory for 64 rows") == 1
    with pytest.raises(DeviceError, match="one row"):
        data.apply(Narrow(rows=0), Memory(values), np.arange(3), **how)


def test_evaluating_gives_the_model_back_in_its_mode():
    model = torch.nn.Dropout(0.5)

    def evaluate():
        with data.evaluating(model) as same:
            assert same is model
            assert not model.training
            assert torch.is_inference_mode_enabled()
            raise KeyError

    for mode in (True, False):
        model.train(mode)
        with pytest.raises(KeyError):
            evaluate()
        assert model.training == mode
        assert not torch.is_inference_mode_enabled()


def test_weights_key_changes_with_any_weight():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    keys = {data.weights_key(model)}
    for value in model.state_dict().values():
        value.view(-1)[0] += 1
        keys.add(data.weights_key(model))
    assert len(keys) == 1 + len(model.state_dict())


# --- pairs of inputs and answers ------------------------------------------------------------------


def test_a_pair_store_is_its_inputs_beside_the_answers():
    inputs = Memory(rng.normal(size=(6, 3)).astype(np.float32))
    targets = rng.normal(size=(6, 4)).astype(np.float32)
    labels = rng.random((6, 11)) < 0.5
    pairs = data.PairStore(inputs, targets, data.pack(labels), 11, np.arange(4), np.arange(4, 6))
    assert pairs.ok is inputs.ok
    assert pairs.key == inputs.key
    assert len(pairs) == 6
    batch = pairs.batch([4, 1])
    assert set(batch) == {"input", "target", "labels"}
    np.testing.assert_array_equal(batch["input"], inputs.values[[4, 1]])
    np.testing.assert_array_equal(batch["target"], targets[[4, 1]])
    np.testing.assert_array_equal(batch["labels"], labels[[4, 1]])
    bare = data.PairStore(inputs, targets, None, 0, np.arange(4), np.arange(4, 6))
    assert set(bare.batch([0])) == {"input", "target"}
    assert set(bare.answers([0])) == {"target"}
