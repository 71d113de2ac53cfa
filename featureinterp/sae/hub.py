"""Published SAEs from the model hub, by its own client: its cache, offline mode, mirrors (``HF_ENDPOINT``)
and tokens work as usual.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from featureinterp.errors import (
    ChecksumError,
    DownloadError,
    FeatureInterpError,
    InputError,
    UnknownNameError,
)
from featureinterp.files import parse_json
from featureinterp.sae.layouts.untrusted import read_json
from featureinterp.sae.names import RESULTS_REPOSITORY, SaeSpec, interpretability_results

EVALUATION = "eval_results.json"
_log = logging.getLogger("featureinterp")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"[0-9A-Za-z_][0-9A-Za-z._-]{0,99}")
"""Names of a list that may become part of a path."""
_MAX_LISTED = 12
_MOST_ENTRIES = 1000
MOST_CODES = 1 << 24
"""Codes per token that an evaluation file can be believed to say."""


@dataclass(frozen=True, slots=True)
class SaeFiles:
    """Where a published SAE's files lie. ``config`` None: it has none."""

    weights: Path
    config: Path | None


def cached(spec: SaeSpec) -> SaeFiles | None:
    """The files, when the cache holds all of them."""
    from huggingface_hub import try_to_load_from_cache

    found = [
        try_to_load_from_cache(spec.repository, file, revision=spec.revision)
        for file in (spec.file, spec.config_file)
        if file
    ]
    paths = [Path(f) for f in found if isinstance(f, str)]
    return SaeFiles(paths[0], paths[1] if spec.config_file else None) if len(paths) == len(found) else None


def measured_l0(spec: SaeSpec) -> float | None:
    """Codes per token as the SAE's evaluation file says, when the cache holds it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        spec.repository, str(Path(spec.file).parent / EVALUATION), revision=spec.revision
    )
    if not isinstance(found, str):
        return None
    try:
        value = read_json(Path(found)).get("l0")
    except FeatureInterpError:
        return None
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST_CODES
        else None
    )


def fetch(spec: SaeSpec, steps: Callable[[str, int, int], None] = lambda *_: None) -> SaeFiles:
    """The files of an SAE, fetched when the cache lacks them and compared with the SHA-256 that the hub
    declares.

    Raises ``UnknownNameError`` when the hub has no such file, ``ChecksumError`` when it is another one than
    declared (it is then taken out of the cache), and ``DownloadError`` when it could not be had.
    """
    try:
        config = _file(spec, spec.config_file) if spec.config_file else None
    except UnknownNameError:
        other = _renumbered(spec)
        if other is None or other.config_file is None:
            raise
        spec, config = other, _file(other, other.config_file)
    weights = _file(spec, spec.file, lambda done, total: steps(f"fetch {spec.name}", done, total))
    if spec.config_file:
        try:
            _file(spec, str(Path(spec.file).parent / EVALUATION))
        except (UnknownNameError, DownloadError):
            _log.info("%s has no %s, so its codes per token are not known", spec.name, EVALUATION)
    return SaeFiles(weights, config)


def fetch_results(name: str) -> Any:
    """SAEBench's published interpretability evaluation of an SAE. Raises what :func:`fetch` raises, and
    ``UnknownNameError`` where there is none.
    """
    path = _download(RESULTS_REPOSITORY, interpretability_results(name), "main", name)
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DownloadError(
            f"the published results of {name!r} are not JSON ({error}): leave --use-saebench-examples out"
        ) from error


def _file(spec: SaeSpec, file: str, progress: Callable[[int, int], None] = lambda *_: None) -> Path:
    return _download(spec.repository, file, spec.revision, spec.name, progress, lambda: _others(spec, file))


def _download(
    repository: str,
    file: str,
    revision: str,
    name: str,
    progress: Callable[[int, int], None] = lambda *_: None,
    others: Callable[[], str] = str,
) -> Path:
    from huggingface_hub import errors, hf_hub_download

    where = f"{repository}/{file}" + ("" if revision == "main" else f" at {revision}")
    try:
        path = Path(hf_hub_download(repository, file, revision=revision, tqdm_class=_bar(progress)))
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repository} is only open to those who accepted its terms: accept them on the hub and set "
            "HF_TOKEN"
        ) from error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
    ) as error:
        raise UnknownNameError(f"the hub has no {where} for the SAE {name!r}{others()}") from error
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{where} is not in the cache and the hub cannot be reached: check the network, HF_ENDPOINT "
            "and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # the client's own errors, those of its HTTP library, and a body that was cut
        if isinstance(error, MemoryError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(
            f"{where} could not be fetched ({reason[:200]}): the same command tries again"
        ) from error
    _check(path, where)
    return path


def _bar(progress: Callable[[int, int], None]) -> Any:
    """A progress bar for the hub's client that draws nothing and tells ``progress``."""
    from tqdm.std import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            progress(int(self.n), int(self.total or self.n))
            return drawn

    return Bar


def _check(path: Path, where: str) -> None:
    """A large file's place in the hub's cache is named by the SHA-256 that the hub declares."""
    blob = path.resolve()
    if not _SHA256.fullmatch(blob.name):
        return
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise ChecksumError(
            f"{where} has SHA-256 {digest.hexdigest()} where the hub declares {blob.name}: it was removed "
            "from the cache; fetch it again"
        )


def _others(spec: SaeSpec, file: str) -> str:
    """What lies beside a file that is missing, where it helps."""
    if spec.layout != "gemma-scope":
        return ""
    folder = str(Path(file).parent.parent)
    names = sorted(
        _folders(spec, folder),
        key=lambda n: int(n.rsplit("_", 1)[-1]) if n.rsplit("_", 1)[-1].isdecimal() else 0,
    )
    return f"; {folder} has {', '.join(names[:_MAX_LISTED])}" if names else ""


def _folders(spec: SaeSpec, folder: str) -> list[str]:
    """Names of the folders in a folder of the repository; none when the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFolder

    try:
        tree = HfApi().list_repo_tree(spec.repository, folder, revision=spec.revision)
        entries = islice(tree, _MOST_ENTRIES)
        names = [entry.path.rsplit("/", 1)[-1] for entry in entries if isinstance(entry, RepoFolder)]
        return [name for name in dict.fromkeys(names) if _FOLDER.fullmatch(name)]
    except Exception as error:  # a list is a help, never a reason to fail otherwise
        _log.debug("%s cannot be listed: %s", folder, error)
        return []


def _renumbered(spec: SaeSpec) -> SaeSpec | None:
    """The trainer that stands at the name's place when those of the folder are sorted by their
    configuration's k, for folders that are numbered otherwise; None when there is none."""
    folder = str(Path(spec.file).parent.parent)
    by_k = []
    for name in _folders(spec, folder):
        config = f"{folder}/{name}/config.json"
        try:
            trainer = read_json(_file(spec, config)).get("trainer")
        except InputError:
            continue
        k = trainer.get("k") if isinstance(trainer, dict) else None
        if type(k) is int:
            by_k.append((k, name))
    by_k.sort()
    if spec.trainer is None or spec.trainer >= len(by_k):
        return None
    k, name = by_k[spec.trainer]
    _log.warning(
        "%s: %s is missing; taking %s, the one with k = %s", spec.name, Path(spec.file).parent.name, name, k
    )
    return replace(spec, file=f"{folder}/{name}/ae.pt", config_file=f"{folder}/{name}/config.json")
