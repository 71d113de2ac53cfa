"""Which windows are like a feature's top windows: sentence embeddings in an exact faiss index."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featureinterp.corpus.windows import WindowTable
from featureinterp.errors import DamagedStoreError, IncompatibleError, UnknownNameError
from featureinterp.files import explained_storage
from featureinterp.stored.arrays import mapped
from featureinterp.stored.sums import SummedFile, Sums, block_for, read_marker, write_marker

EMBEDDED = "all-minilm-l6-v2"
MAX_QUERIES = 400
FIRST_DEPTH = 256
BATCH, BATCH_ON_GPU = 64, 512
"""Texts that are embedded at once; fewer where they do not fit."""


class SentenceEmbedder:
    """A sentence-transformers model by the name of the embedded part, a hub name or a folder; on the GPU when
    there is one, unless ``device`` says otherwise."""

    def __init__(self, name: str = EMBEDDED, *, device: str | None = None) -> None:
        self.name = name
        self._device = device
        self._model: Any = None

    @property
    def fingerprint(self) -> str:
        """Changes with the name; an embedded name stands for files whose hashes are checked."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:16]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Normalised embeddings, float32 ``[text, d]``."""
        if self._model is None:
            self._model = self._load()
        from featureinterp.machine.accelerator import fit_of, on_gpu

        device, fit = self._model.device, fit_of(self._model, "embedding texts")
        wanted = BATCH_ON_GPU if on_gpu(device) else BATCH
        options = {"normalize_embeddings": True, "show_progress_bar": False, "convert_to_numpy": True}
        while True:
            size = fit.rows(1, wanted)
            try:
                vectors = self._model.encode(list(texts), batch_size=size, **options)
            except RuntimeError as error:
                fit.less(min(size, len(texts)), 1, error, device)
                continue
            return np.ascontiguousarray(vectors, np.float32)

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer

        from featureinterp.assets import fetch
        from featureinterp.quiet import quiet_transformers

        source = str(fetch(EMBEDDED).folder) if self.name == EMBEDDED else self.name
        try:
            with quiet_transformers():
                return SentenceTransformer(source, device=self._device)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UnknownNameError(
                f"the embedder {self.name!r} cannot be loaded ({reason}): give {EMBEDDED!r} or a "
                "sentence-transformers model"
            ) from error


def window_embeddings(
    windows: WindowTable,
    embedder: Any,
    folder: Path,
    *,
    chunk: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Embeddings of all windows, float32 ``[n, d]``, memory-mapped from ``folder``; computed once and reused
    after that. A JSON file beside them names windows and embedder, and holds their checksums.

    Raises ``DamagedStoreError`` where they are not what was written, and ``IncompatibleError`` when they are
    of other windows.
    """
    path = folder / f"{windows.fingerprint[:16]}-{embedder.fingerprint}.npy"
    if not path.exists():
        half, named = (
            path.with_suffix(".part"),
            {"windows": windows.fingerprint, "embedder": embedder.fingerprint},
        )
        with explained_storage(path):
            folder.mkdir(parents=True, exist_ok=True)
            with half.open("wb") as file:
                out, width, done = SummedFile(file, Sums(block_for(len(windows) * 4096))), 0, 0
                for texts in _chunks(windows.texts(), chunk):
                    vectors = embedder.embed(texts)
                    if not done:
                        width = vectors.shape[1]
                        out.write(_header(len(windows), width))
                    out.write(memoryview(vectors).cast("B"))
                    done += len(texts)
                    if progress:
                        progress(done, len(windows))
            write_marker(_marker(path), {**named, "n": len(windows), "width": width}, {path.name: out.sums})
            half.replace(path)
    return _opened(path, windows, embedder.fingerprint)


def _marker(path: Path) -> Path:
    return path.with_suffix(".json")


def _header(n: int, width: int) -> bytes:
    """What comes before the numbers in a ``.npy`` file."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (n, width)})
    return out.getvalue()


def _opened(path: Path, windows: WindowTable, embedder: str) -> np.ndarray:
    remedy = f"delete {path} and run the same command again, which embeds the windows anew"
    n, files = len(windows), None
    if _marker(path).exists():
        marker = read_marker(
            _marker(path), f"delete {_marker(path)} and {path}, and run the same command again"
        )
        files = marker.files
        if (marker.value.get("windows"), marker.value.get("embedder")) != (windows.fingerprint, embedder):
            raise IncompatibleError(
                f"{path} holds embeddings of other windows, or by another embedder, than its name says: "
                f"{remedy}"
            )
    begin = len(_header(n, 1))
    with explained_storage(path), path.open("rb") as file:
        width, rest = divmod(os.fstat(file.fileno()).st_size - begin, 4 * max(1, n))
        good = rest == 0 and width > 0 and file.read(begin) == _header(n, width)
    if not good:
        raise DamagedStoreError(
            f"{path} is damaged: it has not float32 numbers of each of {n:,} windows; {remedy}"
        )
    return mapped(path, np.float32, (n, width), files, _marker(path).name, remedy, _normalised, begin)


def check_embeddings(folder: Path, windows: WindowTable) -> None:
    """Raises ``IncompatibleError`` for embeddings in ``folder`` whose marker names other windows than their
    name does, and ``DamagedStoreError`` for those that do not fit the windows. Those of other windows, by
    their name, are let alone."""
    for path in sorted(folder.glob(f"{windows.fingerprint[:16]}-*.npy")):
        _opened(path, windows, path.stem.partition("-")[2])


def _normalised(values: np.ndarray) -> bool:
    """Whether no number is larger than one of a vector of length 1 can be."""
    return bool((np.abs(values) < 1.001).all())


def _chunks(items: Iterator[str], size: int) -> Iterator[list[str]]:
    part: list[str] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


class SimilarWindows:
    """Ranks all windows by mean cosine similarity to a set of query windows, exactly.

    The mean of cosines to normalised vectors is the inner product with their mean, so a feature costs one
    search.
    """

    def __init__(self, embeddings: np.ndarray) -> None:
        import faiss

        self.embeddings = embeddings
        self._index = faiss.IndexFlatIP(embeddings.shape[1])
        self._index.add(np.ascontiguousarray(embeddings))

    def query(self, rows: np.ndarray) -> np.ndarray:
        """The query vector for a feature's strongest windows ``rows`` (at most 400 of them are used): float32
        ``[d]``.
        """
        rows = np.sort(rows[:MAX_QUERIES])
        centre: np.ndarray = np.asarray(self.embeddings[rows], np.float32).mean(0)
        return centre

    def search(self, queries: np.ndarray, depth: int = FIRST_DEPTH) -> np.ndarray:
        """Rows of the ``depth`` most similar windows for each query ``[feature, d]``: int64 ``[feature,
        depth]``, best first.
        """
        return self._index.search(np.ascontiguousarray(queries, np.float32), min(depth, self._index.ntotal))[
            1
        ]

    def ranking(self, query: np.ndarray, known: np.ndarray) -> Iterator[int]:
        """All rows by similarity, each once, starting from the ones already ``known``; the search is widened
        only when those run out. Rows of equal similarity may come in any order."""
        seen: set[int] = set()
        while True:
            for row in known.tolist():
                if row not in seen:
                    seen.add(row)
                    yield row
            if len(known) >= self._index.ntotal:
                return
            known = self.search(query[None], len(known) * 4)[0]
