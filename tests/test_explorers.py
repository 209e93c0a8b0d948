"""Explorers: what they pack, what they say as text, and that they answer in a browser."""

import base64
import json
import re
import time
import zlib

import numpy as np
import pandas as pd
import pytest
from browser import EVIL, watched

from rsdlib import analysis
from rsdlib.analysis.explorers import Explorer, plane
from rsdlib.errors import BadImageError, BadValueError
from rsdlib.predict import Prediction

N = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One explorer of each kind, with hostile prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RSD_ROOT", str(tmp_path_factory.mktemp("root")))
        return _made()


def _made():
    rng = np.random.default_rng(0)
    prompts = [*EVIL, *(f"a cat and {i} dogs" for i in range(N - len(EVIL)))]
    pictures = rng.integers(0, 255, (N, 3, 16, 16), dtype=np.uint8)
    frame = pd.DataFrame({"prompt": prompts, "difficulty": np.arange(N) / N})
    frame["split"] = ["train", "val"] * (N // 2)
    frame["two things"] = np.arange(N) >= N // 2
    units = np.eye(N, dtype=np.float32)
    words = [[("cat", 0.9), ("script", 0.4)]] * N
    answer = Prediction(units, words, [[(prompt, 0.5)] for prompt in prompts])
    curves = np.where(frame[["two things"]], np.nan, rng.random((N, 3)))
    kinds = {"CLIPScore": rng.random((3, 2, 4)), "judge": np.full((3, 2, 4), np.nan)}
    kinds["judge"][:, :, 0] = 0.25
    drawn = pictures[:27].reshape(3, 9, 3, 16, 16)
    original = {kind: values[:, 0, 0] for kind, values in kinds.items()}
    places = ["1", "2", "10%", "50%"]
    cells = {(g, a): np.roll(units, int(a > 1), axis=0) for g in (0.1, 1.0) for a in (0.1, 1, 10)}
    return {
        "readers": analysis.explore_readers(pictures, prompts, {"vit": answer}, units, prompts),
        "pairs": analysis.explore_pairs(pictures, frame, curves),
        "map": analysis.explore_map(rng.random((N, 5)), pictures, frame),
        "swap": analysis.explore_swap(drawn, prompts[:3], ["a", "b"], places, kinds, original),
        "dakl": analysis.explore_dakl(cells, np.roll(units, 1, axis=0), units),
    }


def unpacked(packed):
    return json.loads(zlib.decompress(base64.b64decode(packed)))


@pytest.mark.parametrize("name", ["readers", "pairs", "map", "swap"])
def test_prompts_arrive_as_they_are(made, name):
    told = unpacked(made[name].packed)["prompts"]
    assert told[:3] == list(EVIL[:3])
    assert set(told[len(EVIL) :]) <= {f"a cat and {i} dogs" for i in range(N)}


def test_what_is_missing_is_null(made):
    told = unpacked(made["pairs"].packed)
    assert told["curves"][-1] == [None] * 3
    assert told["flags"] == {"two things": [0] * (N // 2) + [1] * (N // 2)}
    assert unpacked(made["swap"].packed)["measures"]["judge"][0][0] == [0.25, None, None, None]


@pytest.mark.parametrize("name", ["readers", "pairs", "map", "swap", "dakl"])
def test_a_page_needs_nothing_from_elsewhere(made, name):
    page = made[name].page()
    assert set(re.findall(r"https?://[^\s\"'&]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert page.count("<iframe") == page.count("</iframe>") == 1
    assert "import " not in re.sub(r"//.*", "", page)


def test_text_for_terminals_tells_what_is_shown(made):
    assert "40 pairs" in repr(made["pairs"])
    assert "0.975" in repr(made["pairs"])
    assert "TRUE: <script>" in repr(made["readers"])
    assert "0.25" in repr(made["swap"])
    assert "100% DAKL" in repr(made["dakl"])
    assert "the ensemble alone 0.0000" in repr(made["dakl"])


def test_dakl_scores_every_blend(made):
    told = unpacked(made["dakl"].packed)
    blend = np.array(told["cosines"])[0, 0]  # of what is right with what is wrong
    shares = np.linspace(0, 1, 21)
    expected = shares / np.hypot(shares, 1 - shares)
    np.testing.assert_allclose(blend, expected, atol=1e-5)
    assert told["off"] == 0


def test_selected_rows_are_rows_of_the_table(made):
    explorer = made["pairs"]
    explorer._hear(explorer, {"selected": [3, 1]}, [])
    assert explorer.rows.index.tolist() == [3, 1]
    explorer._hear(explorer, {"selected": []}, [])


def test_what_is_shown_stays_alive_in_a_saved_notebook(made):
    assert set(made["map"]._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_a_picture_handed_in_is_answered_or_refused_by_name(made, monkeypatch):
    unit = np.eye(1, 384, dtype=np.float32)
    read = Prediction(unit, [[("cat", 0.9)]], [[]])

    def ask(image):
        if image == b"broken":
            raise BadImageError("yours", "memory", "cut short")
        return np.zeros((3, 8, 8), np.uint8), "", {"vit": read}

    none = np.zeros((1, 3, 8, 8), np.uint8)
    explorer = analysis.explore_readers(none, ["before"], {"vit": read}, ask=ask)
    sent = []
    monkeypatch.setattr(explorer, "send", sent.append)
    content = base64.b64encode(b"broken").decode()
    for question in ({"path": "my.png"}, {"content": content}, {"content": 5}):
        explorer._hear(explorer, {"question": question}, [])
    answered, refused, odd = (unpacked(told["packed"]) for told in sent)
    assert odd["said"]
    assert answered["prompts"] == [""]
    assert "cut short" in refused["said"]
    assert refused["prompts"] == ["before"]


def explored(kind, frame):
    pictures = np.zeros((len(frame), 3, 8, 8), np.uint8)
    if kind == "map":
        return analysis.explore_map(np.eye(len(frame), 5), pictures, frame)
    return analysis.explore_pairs(pictures, frame)


@pytest.mark.parametrize("kind", ["pairs", "map"])
def test_odd_tables_are_shown_as_they_are(kind):
    prompts = pd.Series(["a", None, "b\ud83d"], dtype=object)
    frame = pd.DataFrame({"prompt": prompts, "small": [1e-5, np.nan, 2e-5]})
    frame["kind"] = pd.Categorical(["x", None, "y"])
    frame["flag"] = [True, False, True]
    frame["count"] = pd.array([1, None, 3], "Int64")
    told = unpacked(explored(kind, frame).packed)
    assert told["prompts"] == ["a", "", "b\\ud83d"]
    assert told["numbers"] == {"small": [1e-5, None, 2e-5], "count": [1, None, 3]}
    assert told["kinds"]["kind"] == ["x", "–", "y"]
    flags = told["kinds"]["flag"] if kind == "map" else told["flags"]["flag"]
    assert flags == (["yes", "no", "yes"] if kind == "map" else [1, 0, 1])
    assert unpacked(explored(kind, frame.iloc[:1]).packed)["prompts"] == ["a"]


@pytest.mark.parametrize("kind", ["pairs", "map"])
@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"prompt": [], "d": []}),
        pd.DataFrame({"prompt": ["a"]}),
        pd.DataFrame([["a", 1, 2]], columns=["prompt", "d", "d"]),
    ],
)
def test_tables_with_nothing_to_show_are_refused_by_name(kind, frame):
    with pytest.raises(BadValueError):
        explored(kind, frame)
    with pytest.raises(BadValueError, match="3 pictures and 4 rows"):
        analysis.explore_pairs(
            np.zeros((3, 3, 8, 8), np.uint8), pd.DataFrame({"prompt": ["a"] * 4, "d": 1})
        )


def test_the_plane_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RSD_ROOT", str(tmp_path))
    points = np.random.default_rng(1).random((12, 4))
    first = np.array(plane(points))
    monkeypatch.setattr("sklearn.manifold.TSNE.fit_transform", None)
    np.testing.assert_array_equal(plane(points), first)
    frame = pd.DataFrame({"prompt": ["a"] * 3, "d": 1})
    with pytest.raises(BadValueError, match="12 embeddings and 3 rows"):
        analysis.explore_map(points, np.zeros((3, 3, 8, 8), np.uint8), frame)


# --- in a browser ---------------------------------------------------------------------------------


def shown(page, explorer, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{explorer.page()}", encoding="utf-8")
    page.goto(path.as_uri())
    frame = page.frames[1]
    frame.locator(".rsd .bar").first.wait_for()
    return frame


def answered(frame, move, text):
    """Return the seconds until a text stands there after a move, in the browser's own clock."""
    start = time.perf_counter()
    move()
    frame.get_by_text(text).first.wait_for()
    return time.perf_counter() - start


# All that an explorer says of its prompts, one after the other.
ALL = {
    "readers": "for (const _ of Array(40)) { say(); $$('button')[1].click(); }",
    "pairs": """for (const _ of Array(40)) {
        say();
        $$("canvas")[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
    }""",
    "map": """const { left, top } = $$("canvas")[0].getBoundingClientRect();
    for (let x = 5; x < 560; x += 10) for (let y = 5; y < 440; y += 10) {
        const at = { clientX: left + x, clientY: top + y };
        $$("canvas")[0].dispatchEvent(new PointerEvent("pointermove", at));
        say();
    }""",
    "swap": """for (const k of [0, 1, 2]) {
        $$("input")[0].value = k;
        $$("input")[0].dispatchEvent(new Event("input"));
        say();
    }""",
}


@pytest.mark.parametrize("name", ALL)
def test_every_prompt_is_shown_as_it_is(chromium, made, tmp_path, name):
    with watched(chromium) as page:
        frame = shown(page, made[name], tmp_path)
        tools = "const $$ = (query) => document.querySelectorAll(query), said = new Set();"
        tools += "const say = () => said.add($$('.side')[0].innerText);"
        said = frame.evaluate(f"() => {{ {tools} {ALL[name]}; return [...said]; }}")
        text = re.sub(r"\s+", " ", " ".join(said))
        for prompt in EVIL[: 3 if name == "swap" else None]:
            assert re.sub(r"\s+", " ", prompt).strip() in text
        assert page.title() != "taken"


def test_readers_answer(chromium, made, tmp_path):
    with watched(chromium) as page:
        frame = shown(page, made["readers"], tmp_path)
        frame.get_by_role("button", name="next").click()
        assert EVIL[1] in frame.locator(".rsd").inner_text()
        frame.get_by_label("search in prompts").fill("39 dogs")
        assert "no prompt holds" in frame.locator(".bar").first.inner_text()
        frame.get_by_label("search in prompts").fill("cat 33")
        assert "a cat and 33 dogs" in frame.locator(".rsd").inner_text()
        assert frame.locator(".right").all_inner_texts() == ["✓ cat 0.9"]
        frame.get_by_role("button", name="worst").click()
        assert page.title() != "taken"


def test_pairs_answer_to_mouse_and_keys(chromium, made, tmp_path):
    with watched(chromium) as page:
        frame = shown(page, made["pairs"], tmp_path)
        grid = frame.get_by_role("application")
        grid.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        frame.get_by_text("40 of 40 pairs, 1 selected").wait_for()
        frame.get_by_label("from", exact=True).fill("50")
        frame.get_by_text("20 of 40 pairs, 1 selected").wait_for()
        frame.get_by_label("split").select_option("val")
        frame.get_by_text("10 of 40 pairs, 1 selected").wait_for()
        frame.get_by_label("cause").select_option("two things")
        frame.get_by_role("button", name="select all shown").click()
        frame.get_by_text("10 of 40 pairs, 11 selected").wait_for()
        grid.hover(position={"x": 45, "y": 15})
        assert "a cat and 17 dogs" in frame.locator(".rsd").inner_text()


def test_shift_selects_what_lies_between_in_what_is_shown(chromium, made, tmp_path):
    with watched(chromium) as page:
        frame = shown(page, made["pairs"], tmp_path)
        grid = frame.get_by_role("application")
        grid.click(position={"x": 3 * 30 + 15, "y": 15})
        frame.get_by_role("button", name="turn around").click()  # it is the fourth from the end now
        grid.focus()
        page.keyboard.press("Shift+Enter")
        frame.get_by_text("40 of 40 pairs, 37 selected").wait_for()
        frame.get_by_role("button", name="clear").click()
        grid.click(position={"x": 15, "y": 15})
        frame.get_by_label("to", exact=True).fill("25")  # that one is not shown any more
        grid.click(position={"x": 45, "y": 15}, modifiers=["Shift"])
        frame.get_by_text("10 of 40 pairs, 2 selected").wait_for()


def test_pairs_without_a_number_stay_last(chromium, tmp_path):
    values = [0.5, np.nan, 0.1, 0.9]
    frame = pd.DataFrame({"prompt": ["half", "none", "low", "high"], "d": values})
    explorer = analysis.explore_pairs(np.zeros((4, 3, 8, 8), np.uint8), frame)
    with watched(chromium) as page:
        shown_frame = shown(page, explorer, tmp_path)
        assert "low" in shown_frame.locator(".side").inner_text()
        shown_frame.get_by_role("button", name="turn around").click()
        assert "high" in shown_frame.locator(".side").inner_text()


def test_the_map_answers_to_lasso_and_keys(chromium, made, tmp_path):
    with watched(chromium) as page:
        frame = shown(page, made["map"], tmp_path)
        place = frame.get_by_role("application").bounding_box()
        page.mouse.move(place["x"] + 9, place["y"] - 9)  # a line that began elsewhere is none
        page.mouse.down()
        page.mouse.move(place["x"] + 9, place["y"] + 9)
        page.mouse.up()
        frame.get_by_role("application").click(button="right")
        frame.get_by_text("40 prompts, 0 selected").wait_for()
        corners = [(2, 2), (555, 2), (555, 435), (2, 435), (2, 200), (3, 100), (4, 50)]
        page.mouse.move(place["x"] + 2, place["y"] + 2)
        page.mouse.down()
        for x, y in corners:
            page.mouse.move(place["x"] + x, place["y"] + y, steps=3)
        page.mouse.up()
        frame.get_by_text("40 prompts, 40 selected").wait_for()
        frame.get_by_role("button", name="clear").click()
        frame.get_by_label("search in prompts").fill("cat")
        frame.get_by_role("button", name="select found").click()
        frame.get_by_text("34 of 40 prompts, 34 selected").wait_for()
        frame.get_by_label("coloured by").select_option("split")
        assert "train" in frame.locator(".rsd").inner_text()
        frame.get_by_role("application").focus()
        before = frame.locator(".side").inner_text()
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
            page.keyboard.press(key)
            if frame.locator(".side").inner_text() != before:
                return
        raise AssertionError("no key moves")


def test_swap_and_dakl_answer_to_their_sliders(chromium, made, tmp_path):
    with watched(chromium) as page:
        frame = shown(page, made["swap"], tmp_path)
        sliders = frame.get_by_role("slider")
        for number in range(3):
            sliders.nth(number).focus()
            page.keyboard.press("ArrowRight")
        text = frame.locator(".rsd").inner_text()
        assert "b, from step 2" in text
        assert EVIL[1] in text
        frame = shown(page, made["dakl"], tmp_path)
        sliders = frame.get_by_role("slider")
        sliders.nth(2).focus()
        page.keyboard.press("Home")
        assert "cosine 0.0000" in frame.locator(".rsd").inner_text()


@pytest.mark.parametrize("name", ["readers", "pairs", "map", "swap", "dakl"])
def test_narrow_and_dark(chromium, made, tmp_path, name):
    with watched(chromium, width=360, color_scheme="dark") as page:
        frame = shown(page, made[name], tmp_path)
        wide = frame.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
        box = frame.locator(".rsd")
        style = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
        light = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in box.evaluate(style)]
        assert light[0] > light[1] + 300


def test_explorers_are_of_one_kind(made):
    assert all(isinstance(explorer, Explorer) for explorer in made.values())
