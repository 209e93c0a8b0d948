"""What rsd predict shows, ranks, leaves out and writes, with a toy for a model."""

import io
import json
import os
import re
import subprocess
import sys

import broken
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, PngImagePlugin
from test_pictures import Encoder

from rsdlib import cli, data, predict
from rsdlib.errors import BadValueError, ModelNotFoundError
from rsdlib.models import PromptRegressor

PROMPTS = ["a cat, art by nobody", "a dog by the sea, oil", "by nobody, in the style of none"]
WORDS = ("cat", "dog", "oil", "sea")


def toy(size=384, prompts=PROMPTS):
    torch.manual_seed(0)
    model = PromptRegressor(Encoder(), "separate", len(WORDS), size)
    known = np.random.default_rng(0).normal(size=(len(prompts), size)).astype(np.float32)
    return predict.Predictor(model, WORDS, (list(prompts), known), "cpu")


@pytest.fixture(autouse=True)
def embedder(monkeypatch):
    """Let a prompt's embedding depend on its letters; return the texts that were embedded."""
    texts = []

    def embed(prompts, **_):
        texts.extend(prompts)
        seeds = [sum(map(ord, prompt)) for prompt in prompts]
        return np.stack([np.random.default_rng(s).normal(size=384) for s in seeds])

    monkeypatch.setattr(data, "embed", embed)
    monkeypatch.setattr(data, "embed_cached", embed)
    return texts


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Return what `rsd predict` prints, with the toy for a run."""
    monkeypatch.chdir(tmp_path)

    def load(folder, device, captioner, bank=None):
        return toy(prompts=data.load_prompts(bank) if bank else PROMPTS)

    monkeypatch.setattr(predict.Predictor, "load", load)

    def run(*arguments):
        capsys.readouterr()
        cli.main(["predict", *map(str, arguments), "--run", "toy"])
        return capsys.readouterr().out

    return run


def drawn(path, prompt):
    """Write a picture as AUTOMATIC1111 does."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{prompt}\nSteps: 20, Sampler: Euler a, Seed: 1, Size: 48x40")
    broken.photo().save(path, pnginfo=info)
    return path


# --- the stored prompt ----------------------------------------------------------------------------


def test_the_stored_prompt_stands_beside_what_was_read(tmp_path, embedder):
    path = drawn(tmp_path / "a.png", "a (cat:1.3), oil")
    bare = tmp_path / "b.png"
    broken.photo().save(bare)
    given = [path, bare, path.read_bytes(), Image.open(path), Image.open(path).copy()]
    seen = toy().predict(given)
    prompts, cosines, reasons = zip(*seen.stored, strict=True)
    assert prompts == ("a (cat:1.3), oil", None, *["a (cat:1.3), oil"] * 3)
    assert embedder == ["a cat, oil"] * 4  # in its plain form
    own = data.embed(["a cat, oil"])[0]
    expected = data.cosine(seen.embeddings[:1], own[None])[0]
    assert cosines[0] == cosines[2] == cosines[3] == cosines[4] == pytest.approx(expected)
    assert cosines[1] is None
    assert not reasons[0]
    assert "no prompt" in reasons[1]
    assert not reasons[4]  # a copy holds what was read


def test_formats_hold_the_stored_prompt(tmp_path, command):
    drawn(tmp_path / "a.png", "a cat, oil")
    broken.photo().save(tmp_path / "b.png")
    first, second = json.loads(command(tmp_path, "--format", "json"))
    assert first["stored_prompt"] == "a cat, oil"
    assert -1 <= first["stored_cosine"] <= 1
    assert first["stored_reason"] == ""
    assert second["stored_prompt"] is second["stored_cosine"] is None
    assert "no prompt" in second["stored_reason"]
    table = pd.read_csv(io.StringIO(command(tmp_path, "--format", "csv")))
    assert table["stored_prompt"].tolist()[0] == "a cat, oil"
    assert table["stored_prompt"].isna().tolist() == [False, True]
    assert table["stored_cosine"][0] == pytest.approx(first["stored_cosine"])
    text = command(".")
    assert text.count("a cat, oil") == text.count("stored") == 1
    assert f"{first['stored_cosine']:.3f}" in text


def test_a_doubtful_prompt_is_not_shown_but_its_reason_is(tmp_path, command):
    path = drawn(tmp_path / "a.png", "a cat, oil")
    with Image.open(path) as image:
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", image.text["parameters"].replace("48x40", "640x64"))
        image.save(path, pnginfo=info)
    [record] = json.loads(command(path, "--format", "json"))
    assert record["stored_prompt"] is None
    assert "doubtful" in record["stored_reason"]
    assert "stored" not in command("a.png")


def test_without_an_embedder_the_stored_prompt_is_shown_alone(tmp_path, command, monkeypatch):
    def absent(*_, **__):
        raise ModelNotFoundError("there is no MiniLM")

    monkeypatch.setattr(data, "embed", absent)
    path = drawn(tmp_path / "a.png", "a cat, oil")
    assert "a cat, oil" in command(path)
    [record] = json.loads(command(path, "--format", "json"))
    assert (record["stored_prompt"], record["stored_cosine"]) == ("a cat, oil", None)
    assert toy(12).predict(path).stored[0][0] == "a cat, oil"


# --- for those who compete ------------------------------------------------------------------------


def test_kaggles_submission(tmp_path, command):
    for name in ("20057f34d.png", "b,1.jpg"):
        broken.photo(seed=len(name)).save(tmp_path / name)
    text = command(tmp_path, "--format", "kaggle")
    assert text.startswith("imgId_eId,val\n20057f34d_0,")
    table = pd.read_csv(io.StringIO(text))
    expected = [f"{stem}_{e}" for stem in ("20057f34d", "b,1") for e in range(384)]
    assert table["imgId_eId"].tolist() == expected
    paths = [tmp_path / "20057f34d.png", tmp_path / "b,1.jpg"]
    embeddings = toy().predict(paths).embeddings
    np.testing.assert_allclose(table["val"], embeddings.ravel(), rtol=1e-6)


def test_kaggles_submission_needs_names_and_sizes():
    seen = toy().predict([broken.photo(), broken.photo()])
    with pytest.raises(BadValueError, match="1 names of 2 images"):
        seen.submission(["a/x.png", "b/x.jpg"])
    with pytest.raises(BadValueError, match="12 values"):
        toy(12).predict(broken.photo()).submission(["x.png"])


def test_all_of_ones_own_prompts_are_ranked(tmp_path, command):
    broken.photo().save(tmp_path / "a.png")
    own = [f"prompt number {number}" for number in range(12)]
    (tmp_path / "own.txt").write_text("\n".join(own))
    [record] = json.loads(command("a.png", "--rank", "own.txt", "--format", "json"))
    ranked, cosines = zip(*record["prompts"], strict=True)
    assert sorted(ranked) == sorted(own)
    assert list(cosines) == sorted(cosines, reverse=True)
    assert (
        len(json.loads(command("a.png", "--bank", "own.txt", "--format", "json"))[0]["prompts"])
        == 5
    )
    shown = command("a.png", "--rank", "own.txt")
    assert [shown.index(prompt) for prompt in ranked] == sorted(map(shown.index, ranked))


def test_words_and_parts_of_prompts_are_left_out():
    reader, picture = toy(), broken.photo()
    everything = reader.predict(picture)
    assert {word for word, _ in everything.words[0]} == set(WORDS)
    assert {prompt for prompt, _ in everything.prompts[0]} == set(PROMPTS)
    some = reader.predict(picture, n_words=3, without=["Cat", "oil"])
    assert some.words[0] == [w for w in everything.words[0] if w[0] in ("dog", "sea")]
    left = {"art by nobody", "a dog by the sea", PROMPTS[2]}
    assert {prompt for prompt, _ in some.prompts[0]} == left
    np.testing.assert_array_equal(some.embeddings, everything.embeddings)
    artists = reader.predict(picture, without=["artists"])
    assert {prompt for prompt, _ in artists.prompts[0]} == {"a cat", "a dog by the sea, oil"}
    assert artists.words == everything.words


def test_a_part_of_a_word_is_another_word():
    [seen] = toy(prompts=["a category, c++, 100%"]).predict(broken.photo(), without=["cat"]).prompts
    assert seen[0][0] == "a category, c++, 100%"
    [seen] = toy(prompts=["a cat, c++, 100%"]).predict(broken.photo(), without=["c++"]).prompts
    assert seen[0][0] == "a cat, 100%"


def test_left_out_words_come_from_the_command_or_a_file(tmp_path, command):
    broken.photo().save(tmp_path / "a.png")
    (tmp_path / "words.txt").write_text("cat\nart by nobody\n\noil\n")
    for given in ("words.txt", "cat, art by nobody,oil,"):
        [record] = json.loads(command("a.png", "--without", given, "--format", "json"))
        assert {word for word, _ in record["words"]} == {"dog", "sea"}
        assert {prompt for prompt, _ in record["prompts"]} == {"a dog by the sea", PROMPTS[2]}
    [record] = json.loads(command("a.png", "--without", "artists", "--format", "json"))
    assert len(record["prompts"]) == 2
    assert json.loads(command("a.png", "--without", "x" * 5000, "--format", "json"))


def test_sidecars_are_written_where_there_are_none(tmp_path, command):
    for name in ("a.png", "b.png"):
        broken.photo().save(tmp_path / name)
    (tmp_path / "b.txt").write_text("my own")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "b.txt"]
    [record, _] = json.loads(command(tmp_path, "--sidecar", "--format", "json"))
    assert (tmp_path / "a.txt").read_text() == record["prompts"][0][0]
    assert (tmp_path / "b.txt").read_text() == "my own"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.txt", "b.png", "b.txt"]


# --- output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_no_console_fails_on_a_name_or_a_prompt(encoding, tmp_path, command, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        drawn(tmp_path / name, "a 🐈 in 東京")
    except OSError:
        pytest.skip("the file system takes no such name")
    for format in ("text", "json", "csv", "kaggle"):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            cli.main(["predict", str(tmp_path), "--run", "toy", "--format", format])
        out.flush()
        shown = out.buffer.getvalue()
        assert re.search(rb"caf\\{1,2}udce9", shown)
        if format == "text":
            assert b"\\U0001f408" in shown
        elif format == "json":
            assert json.loads(shown)[0]["stored_prompt"] == "a 🐈 in 東京"
        elif format == "csv":
            assert pd.read_csv(io.BytesIO(shown))["stored_prompt"][0] == "a 🐈 in 東京"


def test_the_command_line_itself_escapes(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "rsdlib.cli", "predict", "東京.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 2
    assert b"there is no file \\u6771\\u4eac.png" in done.stderr
