"""Folders as people have them: every layout is read or refused by name, what is bad counts once."""

import json
import os
import random
import shutil
import zipfile

import broken
import pandas as pd
import pytest
import squares
from PIL import PngImagePlugin
from test_experiment import Mean, settings

from rsdlib import cli, data, experiment
from rsdlib.errors import BadArchiveError, BadTableError, ConfigError

PICTURE = broken.encode(broken.photo(16, 16))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def write(folder, **contents):
    """Write files whose names have ``__`` for a slash and ``_1`` for a dot; return the folder."""
    for name, content in contents.items():
        put(folder / name.replace("__", "/").replace("_1", "."), content)
    return folder


def put(path, content=PICTURE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def told(picture_prompt, **more):
    """Return a PNG that carries a prompt as AUTOMATIC1111 writes it."""
    info = PngImagePlugin.PngInfo()
    steps = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 16x16"
    info.add_text("parameters", f"{picture_prompt}\nNegative prompt: blurry\n{steps}")
    return broken.encode(broken.photo(16, 16), pnginfo=info, **more)


# --- one policy for what is bad -------------------------------------------------------------------


def change_part(folder, number, change):
    members = broken.read_part(folder, number)
    change(members)
    broken.write_part(folder, number, members)


def test_a_source_with_four_kinds_of_faults_is_trained_on_the_rest(source, capsys):
    frame = broken.diffusiondb(source, parts=3, images=30)
    names = frame["image_name"]

    def break_two(members):
        del members[names[3]]
        listed = json.loads(members["part-000001.json"])
        listed[names[5]]["p"] = "another prompt"
        members["part-000001.json"] = json.dumps(listed).encode()

    change_part(source, 1, break_two)
    cut = broken.BROKEN_IMAGES["PNG cut at 0.5"]()
    change_part(source, 2, lambda members: members.update({names[35]: cut}))
    put(source / "images" / "part-000003.zip", b"<html>404</html>")
    with pytest.raises((BadTableError, BadArchiveError), match="on_bad='skip'"):
        experiment.prepare(settings(source).data)
    profile = settings(source, on_bad="skip", english_only=False)
    prepared = experiment.prepare(profile.data)
    assert len(prepared.bad) == 3
    how = {"epochs": 1, "weight": 0.0, "encoder": Mean()}
    run = experiment.train(profile, "own", prepared, **how)
    assert (run / "model.safetensors").exists()
    bad = prepared.bad.set_index("id")
    assert {*bad.index} == {names[3], names[5], names[35], "part-000003.zip"}
    assert bad.columns.tolist() == ["part", "reason"]
    part = "source/images/part-00000{}.zip".format
    where = bad["part"].to_dict()
    assert where == {
        **dict.fromkeys(names[[3, 5]], part(1)),
        names[35]: part(2),
        "part-000003.zip": part(3),
    }
    left = 60 - 2
    assert len(prepared.pairs) == left
    assert prepared.images(16).ok.sum() == left - 1
    assert "3 of 61 rows and parts are bad" in capsys.readouterr().out


def test_what_is_left_out_is_part_of_no_key_but_the_rows(source):
    broken.diffusiondb(source, parts=3, images=20)
    keys = {
        experiment.prepare(settings(source, on_bad=on_bad, english_only=False).data).key
        for on_bad in ("error", "skip")
    }
    assert len(keys) == 1
    with pytest.raises(ConfigError, match="on_bad"):
        settings(source, on_bad="ignore")
    with pytest.raises(ConfigError, match="on_bad"):
        data.load_pairs(source, on_bad="ignore")


def _absent(members, names):
    del members[names[0]]


def _json(change):
    def fault(members, names):
        listed = json.loads(members["part-000001.json"])
        change(listed, names)
        members["part-000001.json"] = json.dumps(listed).encode()

    return fault


def _cut_json(members, _):
    members["part-000001.json"] = members["part-000001.json"][:-9]


FAULTS = {  # of the first part: how, and what it costs
    "an image is absent": (_absent, 1),
    "the JSON lists an absent image": (_json(lambda x, names: x.update({"q.png": {"p": "x"}})), 0),
    "another prompt": (_json(lambda x, names: x[names[0]].update(p="x")), 1),
    "no prompt": (_json(lambda x, names: x[names[0]].pop("p")), 1),
    "a row is no object": (_json(lambda x, names: x.update({names[0]: ["x"]})), 1),
    "the JSON is cut": (_cut_json, 8),
    "the JSON is a list": (lambda x, _: x.update({"part-000001.json": b"[]"}), 8),
    "the JSON is no text": (lambda x, _: x.update({"part-000001.json": b"\xff\xfe\x00"}), 8),
    "a member climbs": (lambda x, _: x.update({"../x.png": b""}), 8),
    "no image is left": (lambda x, names: [x.pop(name) for name in names], 8),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("table", [True, False], ids=["table", "JSONs"])
def test_a_part_with_a_fault(source, fault, table):
    frame = broken.diffusiondb(source, parts=3, images=8, table=table)
    names = frame["image_name"][:8].tolist()
    before = data.load_pairs(source)
    change, lost = FAULTS[fault]
    change_part(source, 1, lambda members: change(members, names))
    if not table and fault in ("another prompt", "no prompt"):  # nothing that it contradicts
        return
    with pytest.raises((BadTableError, BadArchiveError), match="on_bad='skip'") as error:
        data.load_pairs(source)
    assert "part-000001" in str(error.value)
    after = data.load_pairs(source, on_bad="skip")
    assert len(after) == 24 - lost
    pd.testing.assert_frame_equal(
        after.drop(columns="image"),
        before[before["id"].isin(after["id"])].drop(columns="image").reset_index(drop=True),
        check_dtype=False,
    )
    (bad,) = after.attrs["bad"]
    assert bad["id"] in (*names, "q.png", "part-000001.zip")
    assert bad["part"] == "source/images/part-000001.zip"
    assert bad["reason"]
    pd.concat([after, after.iloc[:2]])  # what it carries does not hinder pandas


def test_above_five_faults_and_one_percent_the_data_are_refused(source):
    frame = broken.diffusiondb(source, parts=1, images=20, jsons=False)
    names = frame["image_name"].tolist()
    change_part(source, 1, lambda members: [members.pop(name) for name in names[:5]])
    assert len(data.load_pairs(source, on_bad="skip")) == 15
    change_part(source, 1, lambda members: members.pop(names[5]))
    with pytest.raises(BadTableError, match="6 of 20 rows and parts are bad"):
        data.load_pairs(source, on_bad="skip")


def test_nothing_is_left(source):
    put(source / "metadata.csv", "file_name,prompt\n1.png,a cat\n2.png,a dog, x\n")
    with pytest.raises(BadTableError, match=r"no pair of .* is left"):
        data.load_pairs(source, on_bad="skip")


def test_a_limit_is_filled_from_the_parts_that_are_sound(source):
    broken.diffusiondb(source, parts=3, images=4)
    put(source / "images" / "part-000001.zip", b"")
    pairs = data.load_pairs(source, limit=4, on_bad="skip")
    assert pairs["part_id"].tolist() == [2] * 4
    for part in (2, 3):
        put(source / "images" / f"part-00000{part}.zip", b"")
    with pytest.raises(BadTableError, match=r"no pair of .* is left"):
        data.load_pairs(source, on_bad="skip")


def test_rows_and_archives_that_are_bad_are_listed(source):
    rows = [{"file_name": f"{i}.png", "prompt": f"prompt {i}", "seed": i} for i in range(9)]
    rows[1]["file_name"] = "absent.png"
    rows[2]["prompt"] = ["a list"]
    rows[3]["seed"] = "many"
    rows[4]["file_name"] = "../climbs.png"
    for i in range(9):
        put(source / f"{i}.png")
    lines = [json.dumps(row) for row in rows]
    lines[5] = "[]"
    put(source / "metadata.jsonl", "\n".join(lines))
    pairs = data.load_pairs(source, on_bad="skip")
    assert pairs["id"].tolist() == ["0.png", "6.png", "7.png", "8.png"]
    assert pairs["seed"].tolist() == [0, 6, 7, 8]
    assert len(pairs.attrs["bad"]) == 5
    assert {bad["part"] for bad in pairs.attrs["bad"]} == {"source/metadata.jsonl"}
    (source / "metadata.jsonl").unlink()
    put(source / "a.tar", broken.tar_bytes(("a.png", PICTURE), ("a.json", b'{"text": "x"}')))
    put(source / "b.tar", broken.tar_bytes(("b.png", PICTURE), ("b.json", b"{")))
    put(source / "c.tar", b"<html>")
    pairs = data.load_pairs(source, on_bad="skip")
    assert pairs["id"].tolist() == ["a/a.png"]
    assert [bad["id"] for bad in pairs.attrs["bad"]] == ["b.png", "c.tar"]


# --- tables that are not what they seem -----------------------------------------------------------

CSV = {  # text, what the error names, the rows that are sound
    "unquoted commas": ("{h}\n1,a cat, oil painting\n2,a dog\n", "line 2.*3 fields", ["2"]),
    "a trailing comma": ("{h}\n1,a cat\n2,a dog,\n", "line 3.*3 fields", ["1"]),
    "a short row": ("{h}\n1\n2,a dog\n", "line 2.*1 fields", ["2"]),
    "a quote in the middle": ('{h}\n1,"a cat" on a mat\n2,a dog\n', "line 2", ["2"]),
    "a quote that stays open": ('{h}\n1,a cat\n2,"a dog\n', "line 3", ["1"]),
    "one closes another's quote": ('{h}\n1,"a cat\n2,a "dog"\n3,x\n', "line 2", ["3"]),
    "CRLF": ("{h}\r\n1,a cat\r\n2,a dog, x\r\n", "line 3.*3 fields", ["1"]),
    "a line in quotes before": ('{h}\n1,"a\n\ncat"\n2,a dog, x\n', "line 5.*3 fields", ["1"]),
    "quotes of single kind": ("{h}\n1,'a cat, oil'\n2,x\n", "line 2.*3 fields", ["2"]),
    "backslash before a comma": ("{h}\n1,a cat\\, oil\n2,x\n", "line 2.*3 fields", ["2"]),
}


@pytest.mark.parametrize("name", CSV)
def test_a_row_that_does_not_count_up_is_refused_never_shifted(source, name):
    text, message, sound = CSV[name]
    for number in "123":
        put(source / f"{number}.png")
    put(source / "metadata.csv", text.format(h="file_name,prompt"))
    with pytest.raises(BadTableError, match=message) as error:
        data.load_pairs(source)
    assert "metadata.csv" in str(error.value)
    assert "on_bad" in str(error.value)
    pairs = data.load_pairs(source, on_bad="skip")
    assert pairs["id"].tolist() == sound
    assert {bad["id"].split()[0] for bad in pairs.attrs["bad"]} == {"line"}


@pytest.mark.parametrize("mark", [";", "\t", "|"])
@pytest.mark.parametrize("prompt", ["a cat", "a cat, oil, 4k"])
def test_other_separators_are_refused_by_name(source, mark, prompt):
    put(source / "1.png")
    put(source / "metadata.csv", f"file_name{mark}prompt\n1.png{mark}{prompt}\n")
    for on_bad in ("error", "skip"):
        with pytest.raises(BadTableError, match=r"metadata\.csv.*not separated by commas"):
            data.load_pairs(source, on_bad=on_bad)


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_sound_tables_are_read_as_they_are(source, start, end):
    prompts = ["a cat, oil", 'a "cat"', "a\ncat", "", "None", "12\" ruler, 'x'"]
    lines = [f'{start}file_name, prompt ,"note, of me"']
    for number, prompt in enumerate(prompts):
        put(source / f"{number}.png")
        quoted = prompt.replace('"', '""')
        lines.append(f'{number}.png,"{quoted}",001')
    lines += ["", ",,", '"6.png",6" tall,']
    put(source / "6.png")
    put(source / "metadata.csv", end.join(lines))
    pairs = data.load_pairs(source)
    assert pairs["prompt"].tolist() == [*prompts, '6" tall']
    assert pairs["note, of me"].tolist() == ["001"] * 6 + [""]


def test_random_tables_are_read_exactly_or_refused(source):
    rng = random.Random(0)
    for number in range(4):
        put(source / f"{number}.png")
    right = [[f"{n}.png", f"p{n}, q", f"s{n}"] for n in range(4)]
    whole = "a,b,c\n".replace("a,b,c", "file_name,prompt,style") + "".join(
        f'{name},"{prompt}",{style}\n' for name, prompt, style in right
    )
    for _ in range(150):
        text = list(whole)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(23, len(text))
            text[place : place + rng.randint(0, 2)] = rng.choice(['"', ",", "\n", "", '""', "\\"])
        put(source / "metadata.csv", "".join(text))
        try:
            pairs = data.load_pairs(source)
        except BadTableError:
            continue
        for row in pairs.itertuples():  # what was read stands in one line's fields
            assert row.style == "" or not row.style.startswith("p")
            assert not row.prompt.startswith("s")


def test_a_line_of_json_that_is_no_object_is_named(source):
    put(source / "1.png")
    good = '{"file_name": "1.png", "prompt": "a\u2028cat"}\r\n'
    for line in (
        "[]",
        "3",
        "{",
        '"x"',
        "nan{",
        '{"a": 1} {"b": 2}',
        '{"a": 1, "a": 2}',
        "[" * 9999,
    ):
        put(source / "metadata.jsonl", f"\ufeff\n{good}\n{line}\n")
        with pytest.raises(BadTableError, match=r"line 4.*metadata\.jsonl"):
            data.load_pairs(source)
        pairs = data.load_pairs(source, on_bad="skip")
        assert pairs["prompt"].tolist() == ["a\u2028cat"]


@pytest.mark.parametrize(
    "text", ["{long},seed\na cat,1\n", "file_name,prompt\n{long},a cat\n"], ids=["column", "name"]
)
def test_messages_stay_short_whatever_a_table_holds(source, text):
    put(source / "metadata.csv", text.format(long="x" * 50_000))
    with pytest.raises(BadTableError, match=r"metadata\.csv") as error:
        data.load_pairs(source)
    assert len(str(error.value)) < 2000


# --- DiffusionDB as it is published ---------------------------------------------------------------


def large(folder, numbers=(1, 10_001), extracted=False, place="diffusiondb-large-part-{}"):
    """Write DiffusionDB Large as it is published; return its table."""
    frame = broken.diffusiondb(
        folder / "made", parts=len(numbers), format="WEBP", extracted=extracted
    )
    frame["part_id"] = frame["part_id"].map(dict(enumerate(numbers, 1)))
    for i, number in enumerate(numbers, 1):
        kind = "" if extracted else ".zip"
        target = folder / place.format(1 if number <= 10_000 else 2) / f"part-{number:06}{kind}"
        target.parent.mkdir(exist_ok=True)
        if extracted:
            made = folder / "made" / "images" / f"part-{i:06}"
            (made / f"{made.name}.json").rename(made / f"part-{number:06}.json")
            made.rename(target)
            continue
        members = broken.read_part(folder / "made", i)
        members[f"part-{number:06}.json"] = members.pop(f"part-{i:06}.json")
        target.write_bytes(broken.zip_bytes(members))
    shutil.rmtree(folder / "made")
    frame.to_parquet(folder / "metadata-large.parquet")
    return frame


def make_folder(folder):
    (folder / "made").mkdir()
    return folder


@pytest.mark.parametrize("extracted", [False, True], ids=["zips", "folders"])
@pytest.mark.parametrize("place", ["diffusiondb-large-part-{}", "images"])
@pytest.mark.parametrize("table", [True, False], ids=["table", "JSONs"])
def test_large_alone(source, extracted, place, table):
    frame = large(make_folder(source), extracted=extracted, place=place)
    if not table:
        (source / "metadata-large.parquet").unlink()
    pairs = data.load_pairs(source)
    assert {*pairs["id"]} == {*frame["image_name"]}
    assert {*pairs["part_id"]} == {1, 10_001}
    assert all(data.open_image(locator).width for locator in pairs["image"])


def test_2m_and_large_side_by_side_are_never_mixed(source, capsys):
    big = large(make_folder(source))
    small = broken.diffusiondb(source, parts=3)
    assert {*data.load_pairs(source)["id"]} == {*small["image_name"]}
    assert "2 parts of the other DiffusionDB" in capsys.readouterr().out
    (source / "metadata.parquet").rename(source / "away")
    assert {*data.load_pairs(source)["id"]} == {*big["image_name"]}
    assert "3 parts of the other DiffusionDB" in capsys.readouterr().out
    (source / "metadata-large.parquet").unlink()  # neither table: the JSONs
    assert {*data.load_pairs(source)["id"]} == {*small["image_name"]}
    shutil.rmtree(source / "images")
    assert {*data.load_pairs(source)["id"]} == {*big["image_name"]}
    (source / "away").rename(source / "metadata.parquet")
    with pytest.raises(BadTableError, match=r"metadata\.parquet lists none.*metadata-large"):
        data.load_pairs(source)
    big.to_parquet(source / "metadata-large.parquet")  # both tables, Large's parts alone
    assert {*data.load_pairs(source)["id"]} == {*big["image_name"]}


def test_parts_of_2m_beside_larges_table_alone_are_refused_by_name(source):
    large(make_folder(source))
    shutil.rmtree(source / "diffusiondb-large-part-1")
    shutil.rmtree(source / "diffusiondb-large-part-2")
    broken.diffusiondb(source, parts=1, table=False, jsons=False)
    with pytest.raises(BadArchiveError, match=r"part-000001\.zip.*metadata-large\.parquet.*WebP"):
        data.load_pairs(source)
    with pytest.raises(BadTableError, match="no pair"):
        data.load_pairs(source, on_bad="skip")


def test_a_clone_with_unpacked_parts(source):
    frame = broken.diffusiondb(source, extracted=True)
    part = source / "images" / "part-000001"
    part.rename(source / "inner")
    part.mkdir()
    (source / "inner").rename(part / "part-000001")  # as some programs unpack
    for name in (".DS_Store", "._x.png", "Thumbs.db"):
        put(source / "images" / "part-000002" / name)
    put(source / "README.md", "about")
    put(source / ".git" / "x.png")
    pairs = data.load_pairs(source)
    assert {*pairs["id"]} == {*frame["image_name"]}
    assert all(data.open_image(locator).width for locator in pairs["image"])


def test_a_subset_as_parquet_files_in_any_depth(source):
    table = {"image": [{"bytes": PICTURE, "path": "a.png"}], "prompt": ["x"]}
    table |= {"user_name": ["someone"], "seed": [1]}
    put(source / "2m_random_1k" / "train" / "0000.parquet", broken.parquet_bytes(table))
    pairs = data.load_pairs(source)
    assert pairs["id"].tolist() == ["2m_random_1k/train/0000/000000/image"]
    assert pairs.columns.tolist() == ["id", "prompt", "image", "seed"]
    assert data.open_image(pairs["image"][0]).size == (16, 16)


# --- parts that were packed anew ------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["part-000001/", "images/part-000001/", "x/"])
@pytest.mark.parametrize("table", [True, False], ids=["table", "JSONs"])
def test_parts_that_were_packed_anew(source, folder, table):
    broken.diffusiondb(source, table=table)
    expected = data.load_pairs(source)
    members = broken.read_part(source, 1)
    name = next(iter(members))
    packed = {f"{folder}{name}": content for name, content in members.items()}
    packed |= {f"__MACOSX/{folder}._{name}": b"x" for name in members}
    packed |= {f"{folder}{name}": b"x" for name in (".DS_Store", "Thumbs.db", f"._{name}")}
    broken.write_part(source, 1, packed)
    with zipfile.ZipFile(source / "images" / "part-000001.zip", "a") as archive:
        archive.writestr(zipfile.ZipInfo(folder), b"")
    pairs = data.load_pairs(source)
    pd.testing.assert_frame_equal(pairs.drop(columns="image"), expected.drop(columns="image"))
    of_first = pairs.loc[pairs["part_id"] == 1, "image"]
    assert of_first.str.contains(f"part-000001.zip::{folder}", regex=False).all()
    for new, old in zip(pairs["image"], expected["image"], strict=True):
        if "::" + folder not in new:
            assert new == old
        assert data.open_image(new).height == 48
    (store,) = data.extract(pairs, [data.pixels(8)])
    assert store.ok.all()


def test_one_name_in_two_folders_of_a_part_is_no_guess(source):
    frame = broken.diffusiondb(source, parts=1)
    name = frame["image_name"][0]
    change_part(source, 1, lambda members: members.update({f"a/{name}": members.pop(name)}))
    assert len(data.load_pairs(source)) == 5
    change_part(source, 1, lambda members: members.update({f"b/{name}": members[f"a/{name}"]}))
    with pytest.raises(BadArchiveError, match=name):
        data.load_pairs(source)


# --- tables that others write ---------------------------------------------------------------------


def test_kaggles_prompts(source):
    put(source / "prompts.csv", 'imgId,prompt\n20057f34d,a cat\n227ef0887,"a dog, x"\n')
    put(source / "sample_submission.csv", "imgId_eId,val\n20057f34d_0,0.1\n")
    for name in ("20057f34d.png", "227ef0887.png"):
        put(source / "images" / name)
    pairs = data.load_pairs(source)
    assert pairs["id"].tolist() == ["20057f34d", "227ef0887"]
    assert pairs["prompt"].tolist() == ["a cat", "a dog, x"]
    assert pairs["image"].tolist() == [f"{source}/images/{id}.png" for id in pairs["id"]]
    shutil.rmtree(source / "images")
    with pytest.raises(BadTableError, match=r"'20057f34d' in .*prompts\.csv.*not in the folder"):
        data.load_pairs(source)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("folders", [("",), ("train/", "test/"), ("data/train/",)])
def test_hugging_faces_image_folder(source, kind, folders):
    for folder in folders:
        frame = pd.DataFrame({"file_name": ["0001.png", "deep/2.jpg"], "text": ["a cat", "a dog"]})
        put(source / folder / "0001.png")
        put(source / folder / "deep" / "2.jpg")
        path = source / folder / f"metadata.{kind}"
        if kind == "csv":
            frame.to_csv(path, index=False)
        elif kind == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_parquet(path)
    pairs = data.load_pairs(source)
    ids = sorted(f"{folder}{name}" for folder in folders for name in ("0001.png", "deep/2.jpg"))
    assert pairs["id"].tolist() == ids
    assert pairs["image"].tolist() == [f"{source}/{id}" for id in ids]
    assert pairs["prompt"].tolist() == ["a cat", "a dog"] * len(folders)


def test_names_in_tables_as_people_write_them(source):
    for name in ("a.PNG", "B.jpeg", "deep/c.webp", "images/d.png", "e.f.png"):
        put(source / name)
    put(source / "a.txt", "not the image")
    names = ["a", "b.JPEG", "deep\\c.webp", "d", "e.f"]
    frame = pd.DataFrame({"file_name": names, "prompt": "x"})
    frame.to_csv(source / "metadata.csv", index=False)
    places = data.load_pairs(source).set_index("id")["image"].loc[names]
    expected = ["a.PNG", "B.jpeg", "deep/c.webp", "images/d.png", "e.f.png"]
    assert places.tolist() == [f"{source}/{name}" for name in expected]
    put(source / "a.jpg")  # which of the two is meant?
    with pytest.raises(BadTableError, match=r"'a' in .*twice"):
        data.load_pairs(source)


def test_what_is_there_and_what_is_missing_is_named(source):
    put(source / "labels.tsv", "a\tb\n")
    put(source / "clips" / "a.mp4")
    put(source / ".DS_Store")
    with pytest.raises(BadTableError, match=r"neither a table.*2 other files") as error:
        data.load_pairs(source)
    for name in ("labels.tsv", "clips/a.mp4"):
        assert name in str(error.value)
    assert "DS_Store" not in str(error.value)
    put(source / "a.png")
    with pytest.raises(BadTableError, match=r"no picture of 1 in .* has a prompt.*labels\.tsv"):
        data.load_pairs(source)


# --- pictures without a table ---------------------------------------------------------------------


def test_a_folder_of_pictures_is_a_source(source, capsys):
    put(source / "told.png", told("a (red:1.2) fox, <lora:detail:0.8>"))
    put(source / "deep" / "beside.png", told("not this one"))
    put(source / "deep" / "beside.txt", "\ufeff a  dog\r\nin the_snow ")
    put(source / "wide.PNG")
    put(source / "wide.txt", "a wide cat".encode("utf-16"))
    put(source / "saved.png")  # AUTOMATIC1111 writes such files, too
    put(source / "saved.txt", "a saved cat,\noil\nNegative prompt: blurry\nSteps: 20, Seed: 1")
    put(source / "empty.jpg", broken.encode(broken.photo(16, 16), "JPEG"))
    put(source / "empty.txt", " \n")
    put(source / "latin.webp", broken.encode(broken.photo(16, 16), "WEBP"))
    put(source / "latin.txt", b"caf\xe9")
    put(source / "plain.bmp", broken.encode(broken.photo(16, 16), "BMP"))
    put(source / "torn.png", b"\x89PNG\r\n\x1a\n")
    for name in ("._told.png", ".ipynb_checkpoints/told.png", "@eaDir/told.png", "__MACOSX/a.png"):
        put(source / name)
    put(source / "clip.mp4")
    put(source / "notes.txt", "no picture has this name")
    pairs = data.load_pairs(source).set_index("id")
    missing = ["empty.jpg", "latin.webp", "plain.bmp", "torn.png"]
    assert {*pairs.index} == {*missing, "told.png", "deep/beside.png", "wide.PNG", "saved.png"}
    assert pairs.columns.tolist() == [
        *("prompt", "image", "raw_prompt", "negative_prompt", "writer", "reason")
    ]
    fox = pairs.loc["told.png"]
    assert fox["prompt"] == data.plain("a (red:1.2) fox, <lora:detail:0.8>")
    assert fox["raw_prompt"] == "a (red:1.2) fox, <lora:detail:0.8>"
    assert (fox["negative_prompt"], fox["reason"]) == ("blurry", "")
    assert fox["writer"]
    assert pairs["prompt"]["deep/beside.png"] == data.plain("a dog in the_snow")
    assert pairs["prompt"]["wide.PNG"] == "a wide cat"
    assert pairs["prompt"]["saved.png"] == "a saved cat, oil"
    assert pairs["prompt"][missing].isna().all()
    assert (pairs["reason"][missing] != "").all()
    assert "empty" in pairs["reason"]["empty.jpg"]
    out = capsys.readouterr().out
    assert "2 other files" in out
    assert "clip.mp4" in out
    assert len(data.load_pairs(source, limit=3)) == 3


def test_faults_of_one_folder_do_not_hide_the_next(source, tmp_path):
    broken.diffusiondb(source, parts=2)
    put(source / "images" / "part-000001.zip", b"")
    put(tmp_path / "mine" / "a.png", told("a cat"))
    put(tmp_path / "mine" / "vectors.parquet", broken.parquet_bytes({"x": [1]}))
    both = f"{source}{os.pathsep}{tmp_path / 'mine'}"
    pairs = data.load_pairs(both, on_bad="skip")
    assert len(pairs) == 6
    assert "a cat" in pairs["prompt"].tolist()
    put(tmp_path / "other" / "a.png", told("a cat"))
    both = f"{tmp_path / 'other'}{os.pathsep}{tmp_path / 'mine'}"
    with pytest.raises(BadTableError, match=r"'a\.png' in mine?.*2 times|'a\.png' in other"):
        data.load_pairs(both)


def test_doubtful_prompts_are_missing_with_their_reason(source):
    put(source / "sound.png", told("a cat"))
    info = PngImagePlugin.PngInfo()
    steps = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x1024"
    info.add_text("parameters", f"a dog\n{steps}")
    put(source / "cropped.png", broken.encode(broken.photo(700, 300), pnginfo=info))
    pairs = data.load_pairs(source).set_index("id")
    assert pd.isna(pairs["prompt"]["cropped.png"])
    assert "doubtful" in pairs["reason"]["cropped.png"]
    assert pairs["prompt"]["sound.png"] == "a cat"


def test_pictures_without_any_prompt_are_refused_with_the_reasons(source):
    for number in range(3):
        put(source / f"{number}.png")
    put(source / "2.txt", "")
    with pytest.raises(
        BadTableError, match=r"no picture of 3 .*2 times no prompt.*1 times its \.txt"
    ):
        data.load_pairs(source)


def test_own_pictures_are_prepared_like_any_source(source):
    for colour in ("red", "green", "blue", "white"):
        for thing in squares.THINGS:
            text = f"a {colour} {thing}, oil painting of {thing}s"
            put(source / colour / f"{thing}.png", told(text))
    for number in range(4):
        put(source / f"bare{number}.png")
    prepared = experiment.prepare(settings(source).data)
    assert len(prepared.pairs) == 48
    report = prepared.report.set_index("rule")
    assert (report["rows_in"] - report["rows_out"]).max() == 4
    assert (prepared.pairs["raw_prompt"] == prepared.pairs["prompt"]).all()
    assert prepared.images(16).ok.all()
    assert prepared.bad.empty


def test_prompts_are_counted_and_written_beside_pictures(source, capsys):
    put(source / "a.png", told("a (cat:1.2), <lora:x:1>"))
    put(source / "b.png", told("a dog"))
    put(source / "b.txt", "my own words")
    put(source / "deep" / "c.png", told("a fox"))
    put(source / "deep" / "c.jpg", broken.encode(broken.photo(16, 16), "JPEG"))
    put(source / "d.png")
    cli.main(["data", "prompts", str(source)])
    out = capsys.readouterr().out
    assert "no prompt in any known form" in out
    assert not (source / "a.txt").exists()
    before = data.load_pairs(source).set_index("id")["prompt"]
    cli.main(["data", "prompts", str(source), "--write"])
    assert "1 .txt written; 1 not" in capsys.readouterr().out
    assert (source / "a.txt").read_text(encoding="utf-8") == "a (cat:1.2), <lora:x:1>\n"
    assert (source / "b.txt").read_text(encoding="utf-8") == "my own words"
    assert not (source / "deep" / "c.txt").exists()  # two pictures would share it
    after = data.load_pairs(source).set_index("id")["prompt"]
    pd.testing.assert_series_equal(before, after)
    cli.main(["data", "prompts", str(source), "--write"])
    assert "0 .txt written" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["data", "fetch", "elsewhere"])


def test_prompts_of_no_folder_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        data.find_prompts(tmp_path / "nowhere")
