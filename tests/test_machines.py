"""What file systems and systems other than this one's lack, by stand-ins: said once, and on."""

import ast
import concurrent.futures
import errno
import fcntl
import importlib
import json
import ntpath
import os
import sys
from pathlib import PureWindowsPath

import filelock
import nbformat
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_cli import toy_notebook
from test_house import FOLDERS, NOTEBOOKS, code_of

from rsdlib import cli, data, files, runtime, training
from rsdlib.data import fetch
from rsdlib.errors import DeviceError, RunBusyError
from rsdlib.training import runs

LACKING = [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM]
TROUBLE = [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS]


def named(numbers):
    return pytest.mark.parametrize("number", numbers, ids=errno.errorcode.get)


def refusal(number):
    """Return a call that a file system answers with an error."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


# --- file systems ---------------------------------------------------------------------------------


HOLDS = {"run": runs.locked, "fetch": fetch._alone}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@named([*LACKING, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_once_and_used(
    tmp_path, monkeypatch, capsys, hold, number
):
    monkeypatch.setattr(fcntl, "flock", refusal(number))
    held = 0
    for _ in range(2):
        with hold(tmp_path / "here"):
            held += 1
    assert held == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert f"the file system of {tmp_path / 'here'} lacks a call" in said[0]
    assert os.strerror(number) in said[0]


def test_a_lock_that_its_library_does_not_have_here_is_none(tmp_path, monkeypatch, capsys):
    def acquire(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with runs.locked(tmp_path / "a run"):
        pass
    assert f"the file system of {tmp_path / 'a run'} lacks a call" in capsys.readouterr().out


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@named(TROUBLE)
def test_trouble_with_a_lock_is_neither_busy_nor_passed_over(tmp_path, monkeypatch, hold, number):
    monkeypatch.setattr(fcntl, "flock", refusal(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught, hold(tmp_path):
        pass
    assert caught.value.errno == number


@pytest.mark.parametrize(("hold", "name"), [(runs.locked, ".lock"), (fetch._alone, ".fetch.lock")])
def test_only_a_held_lock_is_busy(tmp_path, hold, name):
    with (
        filelock.FileLock(tmp_path / name),
        pytest.raises(RunBusyError, match="another process"),
        hold(tmp_path),
    ):
        pass


@named(LACKING)
def test_what_cannot_be_flushed_is_written_and_named_once(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(os, "fsync", refusal(number))
    for value in (1, 2):
        files.write_json(tmp_path / "here" / "x.json", value)
    assert files.read_json(tmp_path / "here" / "x.json") == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert f"the file system of {tmp_path / 'here'} lacks a call" in said[0]


@named(TROUBLE)
def test_trouble_with_flushing_leaves_the_old_file(tmp_path, monkeypatch, number):
    files.write_json(tmp_path / "x.json", 1)
    monkeypatch.setattr(os, "fsync", refusal(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        files.write_json(tmp_path / "x.json", 2)
    assert files.read_json(tmp_path / "x.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_is_flushed_is_open_for_writing_and_no_folder(tmp_path, monkeypatch, capsys):
    """As on Windows, where other handles are refused and folders cannot be opened."""
    flushed, plain = [], os.open

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)

    def opened(path, *how, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, *how, **more)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", opened)
    files.write_text(tmp_path / "x", "y")
    assert (tmp_path / "x").read_bytes() == b"y"
    assert len(flushed) == 1
    assert capsys.readouterr().out == ""


@named([errno.EPERM, errno.ENOSYS, errno.EROFS])
def test_modes_and_times_that_cannot_be_set_do_not_matter(tmp_path, monkeypatch, number):
    for call in ("chmod", "fchmod", "utime"):
        monkeypatch.setattr(os, call, refusal(number))
    files.write_text(tmp_path / "a run" / "x", "y")
    files.save_arrays(tmp_path / "a run" / "z", {"a": np.ones(2)})
    with runs.locked(tmp_path / "a run"):
        assert (tmp_path / "a run" / "x").read_text() == "y"


@named([errno.ENODEV, errno.EINVAL, errno.ENOSYS])
def test_arrays_that_cannot_be_mapped_are_read(tmp_path, monkeypatch, capsys, number):
    rows = np.arange(24, dtype=np.float16).reshape(4, 3, 2)
    files.save_rows(tmp_path / "mapped.npy", rows)
    monkeypatch.setattr("mmap.mmap", refusal(number))
    path = tmp_path / "rows.npy"
    files.save_row_batches(path, rows.shape, rows.dtype, [rows[:3], rows[3:]])
    assert path.read_bytes() == (tmp_path / "mapped.npy").read_bytes()
    for verify in (True, False):
        stored = files.open_rows(path, verify=verify)
        np.testing.assert_array_equal(stored, rows)
        assert not stored.flags.writeable
    assert "read into memory" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(files.CacheError, match="damaged"):
        files.open_rows(path)


def test_too_little_memory_to_map_is_trouble(tmp_path, monkeypatch):
    files.save_rows(tmp_path / "rows.npy", np.arange(3))
    monkeypatch.setattr("mmap.mmap", refusal(errno.ENOMEM))
    with pytest.raises(OSError, match="memory"):
        files.open_rows(tmp_path / "rows.npy")


def test_a_leftover_that_is_open_elsewhere_stays(tmp_path, monkeypatch):
    (tmp_path / ".x.tmp").touch()
    monkeypatch.setattr("pathlib.Path.unlink", refusal(errno.EACCES))
    files.remove_leftovers(tmp_path)


@pytest.mark.parametrize("letter", ["x", "é", "像", "🐈"])
def test_names_may_be_as_long_as_file_systems_have_them(tmp_path, letter):
    name = letter * (250 // len(letter.encode()))
    files.write_json(tmp_path / f"{name}.json", 1)
    assert [path.stem for path in tmp_path.iterdir()] == [name]


def test_shards_of_a_folder_with_a_long_name_have_short_ones(tmp_path):
    from PIL import Image

    folder = tmp_path / ("像" * 80)
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    extraction = importlib.import_module("rsdlib.data.extract")
    extraction.make_shards(folder, ["a.png"], [extraction.pixels(8)], tmp_path / "out")
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("像像像") and len(name.encode()) < 255 for name in names)


# --- Windows and macOS ----------------------------------------------------------------------------

PACKAGE_AND_DATA = [path for path in FOLDERS if path not in ("tests", "benchmarks")]
OURS = [path for folder in PACKAGE_AND_DATA for path in (REPOSITORY / folder).rglob("*.py")]
UNIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios"}
UNIX_NAMES = {"os.fork", "os.getuid", "os.geteuid", "os.getpgid", "os.killpg", "os.setsid"}
UNIX_NAMES |= {"os.mkfifo", "os.sched_getaffinity", "os.statvfs", "os.uname", "os.chown"}
UNIX_NAMES |= {"signal.SIGKILL", "signal.SIGALRM", "signal.alarm", "signal.pthread_kill"}


@pytest.mark.parametrize("path", [*OURS, *NOTEBOOKS], ids=lambda path: path.stem)
def test_nothing_needs_unix_and_every_text_names_its_encoding(path):
    for node in (node for tree in code_of(path) for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            assert not UNIX_MODULES & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in UNIX_MODULES
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in UNIX_NAMES
        elif isinstance(node, ast.Call):
            assert says_its_encoding(node), ast.unparse(node)


def says_its_encoding(call):
    """Tell whether a call that opens a text, or a pipe of one, says in which encoding."""
    how = {keyword.arg: keyword.value for keyword in call.keywords}
    name, arguments = ast.unparse(call.func), [ast.unparse(argument) for argument in call.args]
    if "text" in how or "universal_newlines" in how:
        return False
    method = name.rpartition(".")[2]
    if method in ("read_text", "write_text"):
        return "encoding" in how or name in ("write_text", "files.write_text")
    modes = arguments[1:2] if name == "open" else arguments[:1] if method == "open" else ["'b'"]
    mode = (modes or [ast.unparse(how["mode"]) if "mode" in how else ""])[0].strip("'")
    is_mode = mode and set(mode) <= set("rwxabt+")
    return "encoding" in how or "b" in mode or not (is_mode or name == "open")


def test_texts_are_the_same_bytes_on_every_system():
    tree = ast.parse((REPOSITORY / "rsdlib/files.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    writes = [node for node in calls if ast.unparse(node.func).endswith(".write_text")]
    assert len(writes) == 1
    assert {"newline", "encoding"} <= {keyword.arg for keyword in writes[0].keywords}
    assert "eol=lf" in (REPOSITORY / ".gitattributes").read_text(encoding="utf-8")


def test_paths_go_out_with_slashes_on_windows(monkeypatch):
    monkeypatch.setenv("RSD_ROOT", "C:\\house")
    with monkeypatch.context() as patched:
        patched.setattr(files, "Path", PureWindowsPath)
        patched.setattr(os, "path", ntpath)
        told = [files.relative(f"C:\\{path}") for path in ("house\\data\\x.zip", "else\\y")]
    assert told == ["data/x.zip", "C:/else/y"]


def test_a_pool_has_no_more_processes_than_windows_can_wait_for(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="61"):  # the library's own limit
        concurrent.futures.ProcessPoolExecutor(62)
    with data.executor(100) as pool:
        assert pool._max_workers == 61
    monkeypatch.undo()
    with data.executor(100) as pool:
        assert pool._max_workers == 100


def test_windows_names_what_it_does_not_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(DeviceError, match="Windows does not train in several processes"):
        training.launch(tmp_path, 2)


@pytest.fixture
def apple(monkeypatch):
    """Pretend an Apple GPU; torch here cannot use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    chosen = runtime._apple_or_cpu
    chosen.cache_clear()
    yield monkeypatch
    chosen.cache_clear()


def test_an_apple_gpu_without_the_operations_is_left_out_and_said_so_once(apple, capsys):
    assert [runtime.device("auto").type for _ in range(2)] == ["cpu", "cpu"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("using the CPU: the Apple GPU cannot do it all (")


def test_what_an_apple_gpu_may_lack_is_tried(apple, capsys):
    assert runtime._apple_or_cpu("cpu") == "cpu"  # all run where they exist
    assert capsys.readouterr().out == ""
    runtime._apple_or_cpu.cache_clear()

    def missing(*_, **__):
        raise NotImplementedError("aten::_aa is not implemented for the MPS device\nfile it")

    apple.setattr(torch.nn.functional, "interpolate", missing)
    assert runtime._apple_or_cpu("cpu") == "cpu"
    assert "(aten::_aa is not implemented for the MPS device)" in capsys.readouterr().out


def test_an_apple_gpu_with_the_operations_is_taken_in_its_own_precision(apple):
    apple.setattr(runtime, "_apple_or_cpu", lambda: "mps")
    mps = runtime.device("auto")
    assert mps.type == "mps"
    assert runtime.precision("auto", mps) == "fp32"
    assert runtime.exact(mps) == torch.float32
    assert runtime.exact(torch.device("cpu")) == torch.float64


# --- the kernel -----------------------------------------------------------------------------------


def test_the_kernel_is_this_interpreter_whatever_else_is_called_python3(tmp_path, monkeypatch):
    spec = {"argv": [sys.executable, "-c", "raise SystemExit(3)"], "display_name": "foreign"}
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps({**spec, "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = toy_notebook(tmp_path, "import sys; print(sys.executable)")
    output = cli.run_notebook(path, {}, tmp_path / "out.ipynb")
    printed = nbformat.read(output, as_version=4).cells[-1].outputs[0]["text"]
    assert printed.strip() == sys.executable
