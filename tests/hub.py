"""A small model hub: an HTTP server with the routes and headers that the hub's own client uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """``files``: (repository, path) → bytes. ``cut``: paths whose body ends early once, in the middle of a
    connection; ``short``: paths whose body is shorter than declared; ``broken``: paths answered with 503;
    ``lies``: paths whose declared hash is another one. ``requests``: (method, path) of everything that was
    asked."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.cut: set[str] = set()
        self.short: set[str] = set()
        self.broken: set[str] = set()
        self.lies: set[str] = set()
        self.revisions = {"main", COMMIT}
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def add(self, repository: str, path: str, body: bytes) -> None:
        self.files[repository, path] = body


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves on a free loopback port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(self.path.split("?")[0])
            hub.requests.append((self.command, path))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self.api("/".join(parts[2:4]), parts[4:])
            if len(parts) < 5 or parts[2] != "resolve":
                return self.refuse(404, "EntryNotFound")
            repository, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            if not any(r == repository for r, _ in hub.files):
                return self.refuse(404, "RepoNotFound")
            if revision not in hub.revisions:
                return self.refuse(404, "RevisionNotFound")
            content = hub.files.get((repository, file))
            if content is None:
                return self.refuse(404, "EntryNotFound")
            if file in hub.broken:
                return self.refuse(503, "")
            digest = hashlib.sha256(content + (b"!" if file in hub.lies else b"")).hexdigest()
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            whole = content[: len(content) // 2] if file in hub.short else content[first:]
            cut = body and file in hub.cut
            if cut:
                hub.cut.discard(file)
            sent = whole[: len(whole) // 2] if cut else whole
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(whole)))
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Linked-ETag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(sent)
                self.close_connection = self.close_connection or cut
            return None

        def api(self, repository: str, rest: list[str]) -> None:
            if not any(r == repository for r, _ in hub.files):
                return self.refuse(404, "RepoNotFound")
            if not rest or rest[0] != "tree":
                return self.json({"id": repository, "sha": COMMIT, "siblings": []})
            folder = "/".join(rest[2:])
            below = {
                p[len(folder) + 1 :] for r, p in hub.files if r == repository and p.startswith(f"{folder}/")
            }
            entries = [
                {"type": "directory", "path": f"{folder}/{name}", "oid": "0" * 40}
                for name in sorted({b.split("/")[0] for b in below if "/" in b})
            ]
            return self.json(entries) if entries else self.refuse(404, "EntryNotFound")

        def json(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
