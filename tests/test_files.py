"""Files written whole or not at all, checked when read, found from anywhere."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from rsdlib import files
from rsdlib.errors import CacheError, ConfigError

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3),
    "empty": np.zeros((0, 3), np.uint8),
    "scalar": np.array(3),
    "half": np.ones(4, np.float16),
}


def flip(path, at, bit):
    """Change one bit of a file."""
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1 << bit
    path.write_bytes(damaged)


def in_processes(work, count=4):
    """Run `work` in several processes at once; raise what one of them raises."""

    def report(queue):
        try:
            work()
            queue.put(True)
        except Exception as error:
            queue.put(error)

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=report, args=(queue,)) for _ in range(count)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [True] * count


# --- places ---------------------------------------------------------------------------------------


def test_project_folder_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.delenv("RSD_ROOT")
    monkeypatch.chdir(tmp_path)
    assert (files.root() / "rsdlib" / "files.py").is_file()
    monkeypatch.setenv("RSD_ROOT", str(tmp_path))
    assert files.root() == tmp_path
    assert files.cache_dir().is_relative_to(tmp_path)


def test_project_folder_that_is_nowhere_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("RSD_ROOT")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site-packages" / "files.py"))
    with pytest.raises(ConfigError, match="Set RSD_ROOT"):
        files.root()


def test_paths_go_out_relative_to_the_project_and_come_back(monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    inside = tmp_path / "data" / "x"
    assert files.relative(inside) == os.path.join("data", "x")
    assert files.resolve_path(files.relative(inside)) == inside
    assert files.relative("/elsewhere") == "/elsewhere"
    assert files.resolve_path("/elsewhere/../x").as_posix() == "/x"


def test_path_that_exists_from_here_wins_over_the_projects(monkeypatch, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert files.resolve_path("x") == tmp_path / "x"
    (here / "x").touch()
    assert files.resolve_path("x") == here / "x"


def test_links_stay_where_they_are_linked_in(tmp_path):
    disk = tmp_path.parent / f"{tmp_path.name} disk"
    disk.mkdir()
    (tmp_path / "data").symlink_to(disk)
    assert files.relative(tmp_path / "data" / "x") == os.path.join("data", "x")


# --- keys -----------------------------------------------------------------------------------------


def test_digest_does_not_depend_on_order_or_hash_seed():
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1})
    code = "from rsdlib import files; print(files.digest({'x': ['ü', 1.5]}))"
    digests = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout.strip())
    assert digests == {files.digest({"x": ["ü", 1.5]})}


def test_checksum_changes_with_name_type_shape_and_bytes_and_not_with_strides():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    others = [
        {"b": array},
        {"a": array.astype(np.int64)},
        {"a": array.view(np.uint32)},
        {"a": array.reshape(3, 2)},
        {"a": array.T},
        {"a": array, "empty": array[:0]},
    ]
    sums = [files.checksum(arrays) for arrays in [{"a": array}, *others]]
    assert len(set(sums)) == len(sums)
    assert files.checksum({"a": np.asfortranarray(array)}) == sums[0]


# --- whole files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_failing_write_leaves_the_old_file_and_no_leftover(tmp_path, monkeypatch, fails):
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if fails == "write":
        monkeypatch.setattr("pathlib.Path.write_text", full)
    else:
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"new": 1})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    files.write_text(tmp_path / "ours", "")
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["ours"] == modes["plain"]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    for name in ("a", "b.tmp", ".lock"):
        (tmp_path / name).touch()
    with files.atomic_path(tmp_path / "a") as temporary:
        left = temporary.with_stem(f"{temporary.stem}-killed")  # as a writer killed here leaves it
    left.touch()
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a", "b.tmp"]


def test_json_refuses_nan_and_names_damage(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x", {"a": float("nan")})
    (tmp_path / "x").write_text('{"a": ')
    with pytest.raises(CacheError, match="x cannot be read"):
        files.read_json(tmp_path / "x")


def test_parquet_is_written_whole(tmp_path):
    frame = pd.DataFrame({"a": [1, 2]})
    files.write_parquet(tmp_path / "x.parquet", frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "x.parquet"), frame)


# --- named arrays ---------------------------------------------------------------------------------


def test_arrays_come_back_with_shape_type_and_meta(tmp_path):
    files.save_arrays(tmp_path / "x", ARRAYS, {"made": ["from", 1]})
    arrays, meta = files.load_arrays(tmp_path / "x")
    assert meta == {"made": ["from", 1]}
    assert arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(arrays[name], value)


def test_arrays_are_in_memory_and_outlive_their_file(tmp_path):
    path = tmp_path / "x"
    files.save_arrays(path, ARRAYS)
    arrays, _ = files.load_arrays(path)
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(arrays["a"], ARRAYS["a"])


def test_equal_contents_are_equal_bytes(tmp_path):
    for name in "ab":
        files.save_arrays(tmp_path / name, ARRAYS, {"x": 1, "y": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_flipped_bit_of_named_arrays_is_noticed(tmp_path):
    path = tmp_path / "x"
    files.save_arrays(path, {"a": np.arange(40.0), "b": np.arange(5)}, {"k": 1})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(len(whole), size=200):
        path.write_bytes(whole)
        flip(path, at, rng.integers(8))
        try:
            arrays, meta = files.load_arrays(path)
        except CacheError:
            continue
        unchanged = meta == {"k": 1} and arrays.keys() == {"a", "b"}
        assert not unchanged, f"a flip at byte {at} went unnoticed"


@pytest.mark.parametrize("keep", [0, 5, 50, -1])
def test_cut_named_arrays_are_noticed(tmp_path, keep):
    files.save_arrays(tmp_path / "x", ARRAYS)
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:keep])
    with pytest.raises(CacheError, match="damaged"):
        files.load_arrays(tmp_path / "x")


def test_missing_and_foreign_arrays_are_named(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(CacheError, match="there is no file x"):
        files.load_arrays(tmp_path / "x")
    save_file({"a": np.ones(3)}, tmp_path / "x")
    with pytest.raises(CacheError, match="x is damaged"):
        files.load_arrays(tmp_path / "x")


def test_header_that_claims_terabytes_allocates_nothing(tmp_path):
    entry = {"dtype": "F64", "shape": [10**11], "data_offsets": [0, 8 * 10**11]}
    stated = json.dumps({"sha256": "", "meta": {}})
    header = json.dumps({"a": entry, "__metadata__": {"rsdlib": stated}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CacheError, match="damaged"):
        files.load_arrays(tmp_path / "x")


def test_processes_sharing_named_arrays_see_no_torn_file(tmp_path):
    def work():
        for _ in range(30):
            files.save_arrays(tmp_path / "x", {"a": np.arange(5000)})
            assert files.load_arrays(tmp_path / "x")[0]["a"].sum() == 12497500

    in_processes(work)


# --- rows -----------------------------------------------------------------------------------------

ROWS = np.random.default_rng(0).integers(0, 256, (7, 3, 2, 2), dtype=np.uint8)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS[:0],
        ROWS.transpose(2, 0, 1, 3),
        ROWS.astype(np.float16),
        np.arange(5),
        np.float64(2),
    ],
    ids=["images", "empty", "strided", "half", "flat", "scalar"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_rows_come_back_with_shape_and_type_and_can_not_be_written_to(tmp_path, rows, verify):
    files.save_rows(tmp_path / "x.npy", rows)
    stored = files.open_rows(tmp_path / "x.npy", verify=verify)
    assert stored.dtype == rows.dtype
    np.testing.assert_array_equal(stored, rows)
    assert not stored.flags.writeable


def test_rows_are_a_plain_npy_file_to_others(tmp_path):
    files.save_rows(tmp_path / "x.npy", ROWS)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", allow_pickle=False), ROWS)


def test_rows_are_mapped_and_not_read(tmp_path):
    """A sparse file of 64 GiB opens at once, since only the size is looked at."""
    path, count = tmp_path / "x.npy", 2**36
    with path.open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + count + 32)
    rows = files.open_rows(path, verify=False)
    assert rows.shape == (count,)
    assert rows[-1] == 0


def test_every_flipped_bit_of_rows_is_noticed(tmp_path):
    """Each bit of magic, header and checksum, and some of the array's."""
    path = tmp_path / "x.npy"
    files.save_rows(path, ROWS)
    whole = path.read_bytes()
    start, end = len(whole) - 32 - ROWS.nbytes, len(whole) - 32
    array = np.random.default_rng(0).integers(start, end, 20).tolist()
    for at in [*range(start), *array, *range(end, len(whole))]:
        for bit in range(8):
            path.write_bytes(whole)
            flip(path, at, bit)
            try:
                rows = files.open_rows(path)
            except CacheError:
                continue
            # Padding and quotes of the header may change and mean the same.
            assert at < start, f"a flip at byte {at} went unnoticed"
            assert rows.dtype == ROWS.dtype
            np.testing.assert_array_equal(rows, ROWS)


@pytest.mark.parametrize("keep", [0, 5, 100, 130, -33, -32, -1])
def test_cut_rows_are_noticed_without_reading_them(tmp_path, keep):
    path = tmp_path / "x.npy"
    files.save_rows(path, ROWS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match=r"x\.npy is damaged"):
        files.open_rows(path, verify=False)


def test_foreign_files_are_no_rows(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, ROWS)  # without a checksum
    with pytest.raises(CacheError, match="its size is not that of its array"):
        files.open_rows(path)
    np.savez(tmp_path / "zip.npz", ROWS)
    path.write_bytes((tmp_path / "zip.npz").read_bytes())
    with pytest.raises(CacheError, match="damaged"):
        files.open_rows(path)
    path.write_bytes(b"PK\x03\x04 is how a zip file begins")
    with pytest.raises(CacheError, match="damaged"):
        files.open_rows(path)


def test_rows_of_objects_are_neither_written_nor_read(tmp_path):
    path = tmp_path / "x.npy"
    with pytest.raises(ValueError, match="allow_pickle"):
        files.save_rows(path, np.array([{}], object))
    assert not list(tmp_path.iterdir())
    with path.open("wb") as stream:  # what a stranger may hand over
        np.lib.format.write_array(stream, np.array([{}], object))
    with pytest.raises(CacheError, match="damaged"):
        files.open_rows(path)


def test_rows_are_made_once_and_again_when_damaged(tmp_path):
    path, made = tmp_path / "x.npy", []

    def make():
        made.append(1)
        return ROWS

    for _ in range(2):
        np.testing.assert_array_equal(files.cached_rows(path, make), ROWS)
    assert len(made) == 1
    flip(path, -40, 0)
    np.testing.assert_array_equal(files.cached_rows(path, make), ROWS)
    np.testing.assert_array_equal(files.open_rows(path), ROWS)
    assert len(made) == 2


def test_too_many_open_files_are_no_damage(tmp_path):
    """Fault 10: the machine's refusal passed for damage, and whole files were made again."""
    path = tmp_path / "x.npy"
    files.save_rows(path, ROWS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2, hard))
    opened = []

    def open_until_refused():
        for _ in range(1000):
            opened.append(files.cached_rows(path, lambda: pytest.fail("it was made again")))

    try:
        with pytest.raises(OSError, match="Too many open files"):
            open_until_refused()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(files.open_rows(path), ROWS)


def test_processes_sharing_rows_see_no_torn_file(tmp_path):
    def work():
        for _ in range(30):
            files.save_rows(tmp_path / "x.npy", np.arange(5000))
            assert files.open_rows(tmp_path / "x.npy").sum() == 12497500

    in_processes(work)
