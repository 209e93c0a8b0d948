"""Warm processes begin, fail and are killed as ordinary ones do."""

import os
import signal
import subprocess
import sys
import time

import pytest
import warm
from conftest import REPOSITORY

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no server")
SCRIPT = """
import os, sys, time
print(sys.argv[1:], os.getcwd(), os.environ["ASKED"], __name__, "timm" in sys.modules)
print("to stderr", file=sys.stderr)
do = {"fails": lambda: 1 / 0, "says": lambda: sys.exit("refused"), "ends": lambda: sys.exit(7)}
do |= {"dies": lambda: os.kill(os.getpid(), 9), "works": print}
do |= {"waits": lambda: (print("waiting", os.getpid(), flush=True), time.sleep(60))}
sys.stdout.flush()
do[sys.argv[1]]()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


def both(script, *arguments, cwd):
    """Return how a warm and a cold process end: codes and lines."""
    ends = []
    for command in (warm.COMMAND, [sys.executable]):
        how = {"cwd": cwd, "env": {**os.environ, "ASKED": "ü"}, "text": True}
        done = subprocess.run([*command, script, *arguments], capture_output=True, **how)
        ends.append((done.returncode, done.stdout, done.stderr.splitlines()[-1]))
    return ends


@linux
@pytest.mark.parametrize("how", ["works", "fails", "says", "ends", "dies"])
def test_a_warm_process_ends_like_a_cold_one(script, tmp_path, how):
    (code, lines, last), cold = both(script, how, "an argument", cwd=tmp_path)
    assert lines.replace("True", "False") == cold[1]
    assert "True" in lines, "it began cold"
    assert (code, last) == (cold[0], cold[2])


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signals_reach_the_copy(script, tmp_path, number):
    environment = {**os.environ, "ASKED": ""}
    command = [*warm.COMMAND, script, "waits"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environment, **how) as caller:
        caller.stdout.readline()
        copy = int(caller.stdout.readline().split()[1])
        caller.send_signal(number)
        assert caller.wait(10) == -number
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{copy}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_settings_of_the_interpreter_begin_cold(script, tmp_path):
    environment = {**os.environ, "ASKED": "", "PYTHONHASHSEED": "5"}
    command = [*warm.COMMAND, script, "works"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "False" in done.stdout


def test_make_lets_processes_keep_what_they_compiled():
    """Set in the environment, it would cost each process ten seconds of compiling."""
    makefile = "include Makefile\nshow:\n\t@echo [$$PYTHONDONTWRITEBYTECODE]\n"
    how = {"cwd": REPOSITORY, "input": makefile, "capture_output": True, "text": True}
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "--no-print-directory", "-f", "-", "show"]
    done = subprocess.run(command, env=environment, check=True, **how)
    assert done.stdout.strip() == "[]"
