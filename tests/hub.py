"""A model hub on the loopback: as much of its HTTP interface as downloads need, over folders.

It counts what it sends, and does on demand what goes wrong between a hub and its users.
"""

import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = {".zip", ".parquet", ".safetensors", ".bin"}  # what the hub keeps under LFS


@dataclass
class Fault:
    """What goes wrong with one answer.

    Attributes
    ----------
    status : int
        Answered in place of the file.
    headers : dict
        Sent along.
    cut : int
        Bytes of the body after which the connection ends.
    then : callable
        Called when that many bytes were sent.
    change : callable
        Maps the body that is sent; the checksums told are those of the true one.
    page : bytes
        A web page that comes in place of the answer.
    """

    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut: int | None = None
    then: object = None
    change: object = None
    page: bytes | None = None


@dataclass
class Sent:
    """One body, or the part of it from `start` to `stop`, that was sent."""

    path: str
    start: int
    stop: int
    size: int


@contextlib.contextmanager
def serve(repositories, fault=None, sent=None):
    """Serve folders by repository id; yields the address and the paths that were asked for.

    Parameters
    ----------
    repositories : dict of str to Path
        Datasets have ids such as ``datasets/owner/name``.
    fault : callable, optional
        Maps the method and the path of a request to a `Fault`, or to None.
    sent : list, optional
        Gets a `Sent` for each file's body.
    """
    asked = []

    class Handler(_Handler):
        pass

    Handler.repositories, Handler.asked = repositories, asked
    Handler.fault, Handler.sent = staticmethod(fault or (lambda method, path: None)), sent
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that hang up are what this is for
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(path)
        self.wrong = self.fault(self.command, path) or Fault()
        length = int(self.headers.get("Content-Length", 0))
        form = parse_qs(self.rfile.read(length).decode())
        if self.wrong.status:
            return self.tell({"error": "on purpose"}, self.wrong.status, self.wrong.headers)
        if self.wrong.page is not None:
            self.head(200, "text/html", len(self.wrong.page), {})
            return self.wfile.write(b"" if self.command == "HEAD" else self.wrong.page)
        for name, folder in self.repositories.items():
            api = f"api/{name if name.startswith('datasets/') else f'models/{name}'}"
            rest = path.removeprefix(f"{api}/").split("/", 1)
            if path == api or rest[0] in ("tree", "revision", "paths-info"):
                revision = rest[1].split("/")[0] if path != api else "main"
                return self.describe(name, folder, rest[0], commit(revision), form.get("paths"))
            if path.startswith(f"{name}/resolve/"):
                revision, _, file = path.removeprefix(f"{name}/resolve/").partition("/")
                if (folder / file).is_file():
                    return self.file(path, folder / file, commit(revision))
                return self.tell({}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.tell({}, 404, {"X-Error-Code": "RepoNotFound"})

    def describe(self, name, folder, what, revision, wanted):
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = {path.relative_to(folder).as_posix(): path for path in paths}
        if what == "tree":
            return self.tell([entry(path, file) for file, path in names.items()])
        if what == "paths-info":
            return self.tell([entry(names[file], file) for file in wanted if file in names])
        siblings = [{"rfilename": file} for file in names]
        self.tell({"id": name, "modelId": name, "sha": revision, "siblings": siblings})

    def file(self, path, file, revision):
        told = {"ETag": f'"{blob(file)}"', "X-Repo-Commit": revision}
        if file.suffix in LARGE:
            told |= {"X-Linked-ETag": told["ETag"], "X-Linked-Size": str(file.stat().st_size)}
        body = file.read_bytes()
        body = self.wrong.change(body) if self.wrong.change else body
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted:
            told["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.head(206 if wanted else 200, "application/octet-stream", len(body) - start, told)
        if self.command == "HEAD":
            return
        cut = len(body) if self.wrong.cut is None else max(start, self.wrong.cut)
        stop = start
        with contextlib.suppress(ConnectionError):
            while stop < cut:
                step = min(2**16, cut - stop)
                self.wfile.write(body[stop : stop + step])
                stop += step
        if self.sent is not None:
            self.sent.append(Sent(path, start, stop, len(body)))
        if self.wrong.then:
            self.wrong.then()
        if cut < len(body):
            self.close_connection = True

    def tell(self, value, status=200, headers=None):
        data = json.dumps(value).encode()
        self.head(status, "application/json", len(data), headers or {})
        if self.command != "HEAD":
            self.wfile.write(data)

    def head(self, status, kind, length, headers):
        self.send_response(status)
        told = {"Content-Type": kind, "Content-Length": str(length), **headers}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


def commit(revision):
    """Return the commit that a revision means: itself if it is one."""
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else COMMIT


_blobs = {}


def blob(path):
    """Return what the hub names a file's content by: SHA-256 under LFS, else git's SHA-1."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _blobs:
        body = Path(path).read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        _blobs[key] = hashlib.sha256(body).hexdigest() if path.suffix in LARGE else git
    return _blobs[key]


def entry(path, file):
    """Return what the hub's listings tell of a file."""
    told = {"type": "file", "path": file, "size": path.stat().st_size, "oid": blob(path)}
    if path.suffix in LARGE:
        told["lfs"] = {"oid": blob(path), "size": told["size"], "pointerSize": 134}
    return told
