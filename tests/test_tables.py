"""The paper's tables from stored results."""

import pytest
from conftest import REPOSITORY

from rsdlib import runtime, tables
from rsdlib.errors import CacheError


def estimate(mean):
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}


@pytest.fixture
def stored(tmp_path):
    """Write results as the notebooks do: every score is the paper's own, halved."""

    def rows(table, score="cosine", **more):
        return [{"method": name, score: estimate(value / 2), **more} for name, value in tables.PAPER[table].items()]

    four = {row["method"]: row for row in rows("table 4")}
    for name, methods in {"01_vit": ["vit"], "02_swin": ["swin"], "03_clip": ["clip", "CLIP + k-NN"], "04_unet": ["unet"]}.items():
        runtime.write_json(tmp_path / f"{name}.json", {"table": [four[method] for method in methods]})
    runtime.write_json(tmp_path / "05_curriculum.json", {"table 2": rows("table 2")})
    three = [{**row, "method": f"ours {i}"} for i, row in enumerate(rows("table 3"))]
    runtime.write_json(tmp_path / "06_ensemble_dakl.json", {"table 3": three, "table 5": rows("table 5"), "fitted weights": []})
    captions = rows("table 1", "RefCLIPScore", MiniLM=estimate(tables.PAPER["table 4"]["BLIP"] / 2))
    runtime.write_json(tmp_path / "08_captioning.json", {"table 1": captions})
    return tmp_path


def test_ours_stand_beside_the_papers(stored):
    found = tables.collect(stored)
    assert list(found) == list(tables.PAPER)
    for table, rows in found.items():
        assert len(rows) == len(tables.PAPER[table])
        assert all(row["score"]["mean"] == pytest.approx(row["paper"] / 2) for row in rows), table


def test_method_without_a_number_in_the_paper_has_none():
    assert tables.beside("table 2", ["none", "ours, equal steps"]) == {"none": 0.6526}
    assert tables.beside("table 3", ["off", "r = 3"]) == {}, "by position only where all are there"


def test_fitted_weights_of_all_models_close_table_5(stored):
    path, fitted = (
        stored / "06_ensemble_dakl.json",
        [{"method": f"{name}, fitted", "cosine": estimate(0.5)} for name in ("CU", "CUSV")],
    )
    runtime.write_json(path, {**runtime.read_json(path), "fitted weights": fitted})
    last = tables.collect(stored)["table 5"][-1]
    assert (last["method"], last["paper"]) == ("CUSV, fitted", None)


def test_gains_say_over_what(stored):
    test = {"difference": {"mean": 0.02, "low": 0.01, "high": 0.03}, "p": 0.001}
    path = stored / "01_vit.json"
    vit = runtime.read_json(path)["table"][0]
    better = {"method": "vit + MLC + CL", "cosine": estimate(0.6), "gain over mean embedding": test, "gain over vit": test}
    runtime.write_json(path, {"table": [{**vit, "gain over mean embedding": test}, better]})
    five = runtime.read_json(stored / "06_ensemble_dakl.json")
    five["table 5"][4] |= {"best member": "clip", "gain over it": test}
    runtime.write_json(stored / "06_ensemble_dakl.json", five)
    found = tables.collect(stored)
    over = {row["method"]: row["gain"]["over"] for row in found["table 4"] + found["table 5"] if row["gain"]}
    assert over == {"vit": "mean embedding", "vit + MLC + CL": "vit", "CU": "clip"}
    assert found["table 4"][-1]["paper"] == tables.PAPER["table 5"]["V"]
    assert "| +0.0200 [+0.0100, +0.0300] over vit, p = 0.001 | 0.6550 |" in tables.markdown(found)


def test_ensembles_are_the_single_scores_of_the_framework():
    assert tables.SINGLE["clip + MLC + CL"] == tables.PAPER["table 5"]["C"]


def test_the_stored_results_fill_the_readme():
    """A fresh clone has all five tables, and the README shows them."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert tables.insert(readme, tables.collect(REPOSITORY / "figures")) == readme


def test_missing_results_are_named(stored):
    (stored / "05_curriculum.json").unlink()
    with pytest.raises(CacheError, match=r"no 05_curriculum\.json.* rsd reproduce --only 05"):
        tables.collect(stored)


def test_tables_go_between_their_marks_and_nowhere_else(stored):
    found = tables.collect(stored)
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    once = tables.insert(text, found)
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert once.count("| method |") == 5
    assert "| CBS | 0.3127 [0.3027, 0.3227] |  | 0.6254 |" in once
    assert tables.insert(once, found) == once
    with pytest.raises(CacheError, match="no place for tables"):
        tables.insert("nothing", found)
