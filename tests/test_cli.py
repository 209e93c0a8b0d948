"""The command line and make: every failure is one line and a code, checked before it costs time."""

import os
import subprocess
import sys

import nbformat
import pytest
from conftest import REPOSITORY, rsd

from rsdlib import cli
from rsdlib.errors import ConfigError, NotebookError


def toy_notebook(folder, *cells):
    """Write a notebook with one parameter and the given code cells."""
    parameters = nbformat.v4.new_code_cell(
        'profile: str = "smoke"  # size\nepochs: int = 1  # passes\nlr: float = 0.1  # rate'
    )
    parameters.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    path = folder / "toy.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize(
    ("cell", "code", "words"),
    [
        ("raise ValueError('broken on purpose')", 1, "ValueError: broken on purpose"),
        ("import sys; sys.exit(0)", 1, "left before its end"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 138, "the kernel died"),
    ],
)
def test_failures_exit_with_one_clear_line(tmp_path, cell, code, words):
    path = toy_notebook(tmp_path, cell, "after = 1")
    done = rsd("run", path, "--output", tmp_path / "out.ipynb", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rsd:")]
    assert len(lines) == 1
    assert words in lines[0]


STAND_IN = """#!/bin/bash
# Stands for `rsd run NUMBER ...`: notes when it began and ended; 01 and 03 wait for each other.
number=$2
touch "./$number.begun"
beside=$( [ "$number" = 01 ] && echo 03; [ "$number" = 03 ] && echo 01 )
while [ -n "$beside" ] && [ ! -e "$beside.begun" ]; do sleep 0.02; done
[ "$number" != "$FAILS" ] || { echo "rsd: $number failed"; exit 1; }
echo "$OMP_NUM_THREADS $*" > "./$number.done"
"""
NUMBERS = [f"{number:02}" for number in range(11)]


@pytest.fixture
def house(tmp_path):
    """Return a checkout with the project's Makefile and a stand-in for ``rsd``."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/rsd").write_text(STAND_IN)
    (tmp_path / ".venv/bin/rsd").chmod(0o755)
    (tmp_path / ".venv/.ready").touch()
    return tmp_path


def make(house, *arguments, goals=("notebooks",), **environment):
    command = ["make", *goals, "-j2", "JOBS=2", "CORES=4", "PROFILE=smoke", *arguments]
    environment = {
        name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"
    } | environment
    return subprocess.run(command, cwd=house, capture_output=True, text=True, env=environment)


def test_make_runs_side_by_side_what_does_not_wait(house):
    """05 reads 01's runs, 09 those of all; two at a time, each in its share of the cores."""
    done = make(house, "ARGUMENTS_05=-p seeds 3")
    assert done.returncode == 0, done.stdout + done.stderr
    times = {
        n: [(house / f"{n}.{end}").stat().st_mtime_ns for end in ("begun", "done")] for n in NUMBERS
    }
    for number, before in READS.items():
        assert times[number][0] >= max(times[earlier][1] for earlier in before)
    assert (house / "05.done").read_text() == "2 run 05 -p profile smoke -p seeds 3\n"


READS = {"01": ["00"], "05": ["01"], "06": ["01", "02", "03", "04"], "07": ["04"], "08": ["03"]}
READS |= {"09": NUMBERS[:9], "10": ["01"]}


def test_publish_alone_writes_the_figures_and_the_tables(house):
    """`reproduce` names no folder; what `publish` trains, it trains three times."""
    done = make(house, goals=("publish",))
    assert done.returncode == 0, done.stdout + done.stderr
    for number in set(NUMBERS) - {"10"}:  # 10 is for folders of real pictures
        assert "-p profile mini -p figures figures" in (house / f"{number}.done").read_text()
    for number in ("01", "02", "03", "04", "05", "06", "07", "08"):
        assert "-p seeds 3" in (house / f"{number}.done").read_text()
    assert "-p study long" in (house / "07.done").read_text()
    assert "-p sweep true" in (house / "01.done").read_text()
    assert "tables --figures figures --write README.md" in (house / "--figures.done").read_text()
    assert "-p figures" not in (house / "10.done").read_text()
    assert make(house, "REAL=a/b", "UNSHOWN=c", goals=("publish-real",)).returncode == 0
    assert "-p source c -p figures figures -p shown false" in (house / "10.done").read_text()
    for path in house.glob("*.done"):
        path.unlink()
    assert make(house, goals=("reproduce",)).returncode == 0
    assert not any("-p figures" in (house / f"{number}.done").read_text() for number in NUMBERS)


def test_make_stops_after_a_failure(house):
    done = make(house, FAILS="00")
    assert done.returncode == 2
    assert "00 | rsd: 00 failed" in done.stdout
    assert not list(house.glob("*.done"))


def test_reproduce_runs_in_order_and_stops_after_a_failure(tmp_path):
    (tmp_path / "notebooks").mkdir()
    cells = {"00_a": "pass", "01_b": "raise ValueError('broken on purpose')", "09_e": "pass"}
    for name, cell in cells.items():
        toy_notebook(tmp_path, cell).rename(tmp_path / "notebooks" / f"{name}.ipynb")
    done = rsd("reproduce", "--profile", "smoke", cwd=tmp_path)
    assert done.returncode == 1
    assert "[2/3] 01_b" in done.stdout
    assert "09_e" not in done.stdout
    assert "01_b failed in cell" in done.stderr.splitlines()[-1]
    assert rsd("reproduce", "--profile", "smoke", "--from", "09", cwd=tmp_path).returncode == 0


def test_a_path_means_that_very_file(project, tmp_path):
    """Also where an edited copy is called like one of the project's notebooks."""
    mine = toy_notebook(tmp_path, "pass").rename(tmp_path / "01_train_vit.ipynb")
    assert cli.find_notebook(str(mine)) == mine
    assert cli.find_notebook("01").parent.name == "notebooks"
    (tmp_path / "notes.ipynb").write_text("not JSON")
    with pytest.raises(ConfigError, match="is not a notebook"):
        cli.run_notebook(tmp_path / "notes.ipynb", {})


def test_slow_cell_is_stopped(tmp_path):
    path = toy_notebook(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(NotebookError, match="longer than 1 s"):
        cli.run_notebook(path, {}, tmp_path / "out.ipynb", timeout=1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epohcs": "3"}, "no parameter 'epohcs'. Did you mean 'epochs'"),
        ({"epochs": "three"}, "'three' is not of type int"),
        ({"epochs": "2.5"}, "not of type int"),
        ({"lr": "fast"}, "not of type float"),
    ],
)
def test_wrong_parameters_stop_before_the_kernel_starts(tmp_path, parameters, message):
    path = toy_notebook(tmp_path, "pass")
    with pytest.raises(ConfigError, match=message):
        cli.run_notebook(path, parameters, tmp_path / "out.ipynb")
    assert not (tmp_path / "out.ipynb").exists()


def test_right_parameters_get_their_types(tmp_path):
    path = toy_notebook(tmp_path, "pass")
    assert cli.check_parameters(path, {"epochs": "3", "lr": "1", "profile": "3"}) == {
        "epochs": 3,
        "lr": 1.0,
        "profile": "3",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "01_train_vti"), 2, "Did you mean '01_train_vit'"),
        (("run", "01", "-p", "epohcs", "3"), 2, "Did you mean 'epochs'"),
        (("run", "01", "-p", "profile", "miny"), 2, "Did you mean 'mini'"),
        (
            ("run", "00", "-p", "profile", "smoke", "-p", "source", "no/such/folder"),
            3,
            "there is no folder",
        ),
        (
            ("run", "01", "-p", "profile", "smoke", "-p", "weight", "-1"),
            2,
            "weight = -1.0 is refused",
        ),
        (("predict",), 2, "no image"),
        (("predict", "missing.png"), 2, "no file missing.png"),
        (("reproduce", "--from", "77"), 2, "no notebook '77'"),
    ],
)
def test_usage_errors_are_one_line(project, tmp_path, arguments, code, words):
    done = rsd(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rsd:")]
    assert len(lines) == 1
    assert words in lines[0]


def test_predict_without_a_run_says_what_to_do(tmp_path):
    image = tmp_path / "x.png"
    from PIL import Image

    Image.new("RGB", (8, 8)).save(image)
    done = rsd("predict", image, cwd=tmp_path)
    assert done.returncode == 3
    assert "Run: rsd run 01_train_vit" in done.stderr


def test_who_reads_on_no_longer_gets_no_traceback(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            cli.main(["models", "list"])
    assert ended.value.code == 141
