"""The paper's tables from stored results."""

import dataclasses

import pytest
from conftest import REPOSITORY

from rsdlib import files
from rsdlib.analysis import tables
from rsdlib.analysis.metrics import Comparison, Estimate
from rsdlib.errors import CacheError


def estimate(mean, **more):
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": 50, **more}


def write(folder, name, **results):
    files.write_json(folder / f"{name}.json", results)


@pytest.fixture
def stored(tmp_path):
    """Write results as the notebooks do: every score is the paper's own, halved."""

    def rows(table, score="cosine", **more):
        return [
            {"method": name, score: estimate(value / 2), **more}
            for name, value in tables.PAPER[table].items()
        ]

    four = {row["method"]: row for row in rows("table 4")}
    for name in ("vit", "swin", "unet"):
        number = {"vit": "01", "swin": "02", "unet": "04"}[name]
        write(tmp_path, f"{number}_{name}", table=[four[name]])
    write(tmp_path, "03_clip", table=[four["clip"], four["CLIP + k-NN"]])
    write(tmp_path, "05_curriculum", **{"table 2": rows("table 2")})
    three = [{**row, "method": f"ours {i}"} for i, row in enumerate(rows("table 3"))]
    ensembles = {"table 3": three, "table 5": rows("table 5"), "fitted weights": []}
    write(tmp_path, "06_ensemble_dakl", **ensembles)
    blip = estimate(tables.PAPER["table 4"]["BLIP"] / 2)
    write(tmp_path, "08_captioning", **{"table 1": rows("table 1", "RefCLIPScore", MiniLM=blip)})
    return tmp_path


def change(folder, name, **results):
    """Write a file of stored results again, with some of them replaced."""
    write(folder, name, **{**files.read_json(folder / f"{name}.json"), **results})


def test_ours_stand_beside_the_papers(stored):
    collected = tables.collect(stored)
    assert list(collected) == list(tables.PAPER)
    for table, rows in collected.items():
        assert len(rows) == len(tables.PAPER[table])
        assert all(row["score"]["mean"] == pytest.approx(row["paper"] / 2) for row in rows), table
        assert {row["gain"] for row in rows} == {None}


def test_method_without_a_number_in_the_paper_has_none():
    assert tables.beside("table 2", ["none", "ours, equal steps"]) == {"none": 0.6526}
    assert tables.beside("table 3", ["off", "r = 3"]) == {}, "by position only where all are there"


def test_fitted_weights_of_all_models_close_table_5(stored):
    fitted = [{"method": f"{name}, fitted", "cosine": estimate(0.5)} for name in ("CU", "CUSV")]
    change(stored, "06_ensemble_dakl", **{"fitted weights": fitted})
    last = tables.collect(stored)["table 5"][-1]
    assert (last["method"], last["paper"]) == ("CUSV, fitted", None)


TEST = {"difference": {"mean": 0.02, "low": 0.01, "high": 0.03, "n": 50}, "p": 0.001}


def test_gains_say_over_what(stored):
    """By themselves; in results of an earlier version by the row's best member, or their names."""
    vit = files.read_json(stored / "01_vit.json")["table"][0]
    longer = {"method": "vit + MLC + CL", "cosine": estimate(0.6), "gain over a k-NN": TEST}
    longer |= {"gain over mean embedding": TEST, "gain over vit": {**TEST, "p": 0.2}}
    change(stored, "01_vit", table=[{**vit, "gain over mean embedding": TEST}, longer])
    five = files.read_json(stored / "06_ensemble_dakl.json")["table 5"]
    five[4] |= {"best member": "clip", "gain over it": TEST}
    change(stored, "06_ensemble_dakl", **{"table 5": five})
    one = files.read_json(stored / "08_captioning.json")["table 1"]
    one[2]["gain in RefCLIPScore"] = {"over": "BLIP", **TEST}
    change(stored, "08_captioning", **{"table 1": one})
    collected = tables.collect(stored)
    shown = {row["method"]: row["gain"] for rows in collected.values() for row in rows}
    over = {method: gain.over for method, gain in shown.items() if gain}
    expected = {"vit": "mean embedding", "vit + MLC + CL": "vit", "CU": "clip"}
    assert over == {**expected, "BLIP + MLC": "BLIP"}
    assert shown["vit + MLC + CL"] == Comparison(Estimate(0.02, 0.01, 0.03, 50), 0.2, "vit")
    assert [gain.over for gain in tables.gains(longer)] == ["a k-NN", "mean embedding", "vit"]
    assert collected["table 4"][-1]["paper"] == tables.PAPER["table 5"]["V"]
    line = "| +0.0200 [+0.0100, +0.0300] over vit, p = 0.2 | one training | 0.6550 |"
    assert line in tables.markdown(collected)
    for p, text in ((1 / 10001, "p = 0.0001"), (1e-60, "p < 0.0001"), (0.0, "p < 0.0001")):
        assert str(Comparison(Estimate(0.02, 0.01, 0.03, 50), p, "vit")).endswith(f"vit, {text}")


def test_a_gain_is_stored_and_read_again():
    """As a dict, under any name."""
    gain = Comparison(Estimate(0.02, 0.01, 0.03, 50, trainings=3), 0.001, "none")
    row = {"method": "ours", "cosine": estimate(0.5), "whatever": dataclasses.asdict(gain)}
    assert tables.gains(row) == [gain]


def test_tables_say_how_many_trainings_stand_behind_them_and_what_they_hold(stored):
    two = files.read_json(stored / "05_curriculum.json")["table 2"]
    facts = (("none", 3, 0.1), ("LeRaC", 3, 0.7), ("CBS", 1, 0), ("ours", 3, 0.25))
    for row, (name, trainings, share) in zip(two, facts, strict=True):
        assert row["method"] == name
        row["cosine"] |= {"trainings": trainings, "of_trainings": share}
    for row, gain, share in ((two[1], 0.005, 0.5), (two[3], 0.02, 0.9)):
        difference = estimate(gain, trainings=3, of_trainings=share)
        row["gain over none"] = {"difference": difference, "p": 0.1}
    two[3]["steps"] = 1200
    change(stored, "05_curriculum", **{"table 2": two})
    collected = tables.collect(stored)
    text = tables.markdown(collected)
    assert text.count("| method | trainings |") == 4
    assert text.count("| method | steps | trainings |") == 1
    assert "| CBS |  | 1 | 0.3127 [0.3027, 0.3227] |  |  | 0.6254 |" in text
    assert "| ours | 1200 | 3 | 0.3272 [0.3172, 0.3372] | +0.0200" in text
    assert "p = 0.1 | better | 0.6544 |" in text
    hold = (
        "The trainings hold 10% to 70% of the means' variance, 50% to 90% of the gains' variance."
    )
    assert text.count("The trainings hold") == text.count(f"\n\n{hold}\n\n") == 1


def test_ensembles_are_the_single_scores_of_the_framework():
    assert tables.SINGLE["clip + MLC + CL"] == tables.PAPER["table 5"]["C"]


def test_the_stored_results_fill_the_readme():
    """A fresh clone has all five tables and those of real pictures; the README shows them."""
    readme, figures = (REPOSITORY / "README.md").read_text(encoding="utf-8"), REPOSITORY / "figures"
    assert tables.insert(readme, "tables", tables.markdown(tables.collect(figures))) == readme
    assert tables.insert(readme, "real pictures", tables.real_pictures(figures)) == readme


def test_missing_results_are_named(stored):
    (stored / "05_curriculum.json").unlink()
    with pytest.raises(CacheError, match=r"no 05_curriculum\.json.* rsd run 05"):
        tables.collect(stored)


def test_tables_go_between_their_marks_and_nowhere_else(stored):
    collected = tables.markdown(tables.collect(stored))
    begin, end = (mark.format("tables") for mark in (tables.BEGIN, tables.END))
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    once = tables.insert(text, "tables", collected)
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert once.count("| method |") == 5
    assert "| CBS | 1 | 0.3127 [0.3027, 0.3227] |  |  | 0.6254 |" in once
    assert tables.insert(once, "tables", collected) == once
    with pytest.raises(CacheError, match="no place for tables"):
        tables.insert("nothing", "tables", collected)


def test_real_pictures_are_shown_by_folder(stored):
    assert tables.real_pictures(stored) == ""
    ranks = {"median_rank": 2.0, "candidates": 40, "recall@1": 0.4}
    gain = {"difference": estimate(0.1, trainings=3), "p": 0.01}
    rows = [
        {"method": "mean embedding", "cosine": estimate(0.4), **ranks},
        {
            "method": "lite",
            "cosine": estimate(0.5, trainings=3),
            "gain over mean embedding": gain,
            **ranks,
        },
    ]
    part = {"cosine": 0.5, "gain over constant": "+0.1", "median rank": 3, "of": 50, "first": 0.3}
    splits = {"split 0": part, "all": part, "somebody": part}
    write(stored, "10_wild", table=rows, splits=splits, turns=5)
    text = tables.real_pictures(stored)
    assert "**`wild`**" in text
    assert "| lite | 3 | 0.5000 [0.4900, 0.5100] | +0.1000 [+0.0900, +0.1100] over mean" in text
    assert "p = 0.01 | better | 2 of 40 | 40% |" in text
    assert "| 5 splits, all |  | 0.5000 | +0.1 |  | 3 of 50 | 30% |" in text
    assert "somebody" in text
    assert "split 0" not in text
