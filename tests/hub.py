"""A model hub on the loopback: as much of its HTTP interface as downloads need, over folders."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(repositories):
    """Serve folders by repository id; yields the address and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(path)
            parts = path.split("/")
            if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in repositories:
                listed = self.tree if parts[4:5] == ["tree"] else self.describe
                return listed("/".join(parts[2:4]), body)
            if len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[:2]) in repositories:
                file = repositories["/".join(parts[:2])].joinpath(*parts[4:])
                if file.is_file():
                    return self.send(200, file.read_bytes(), body, "application/octet-stream")
            return self.send(
                404,
                b'{"error": "Repository not found"}',
                body,
                headers={"X-Error-Code": "RepoNotFound"},
            )

        def describe(self, name, body):
            folder = repositories[name]
            files = [
                str(path.relative_to(folder))
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]
            told = {
                "id": name,
                "modelId": name,
                "sha": COMMIT,
                "siblings": [{"rfilename": file} for file in files],
            }
            self.send(200, json.dumps(told).encode(), body)

        def tree(self, name, body):
            folder = repositories[name]
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            told = [
                {
                    "type": "file",
                    "path": path.relative_to(folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
            self.send(200, json.dumps(told).encode(), body)

        def send(self, status, data, body, kind="application/json", headers=None):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
