"""Features with their texts and activations on disk, so that few are in memory however many there are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from featureinterp.domain.record import Window
from featureinterp.domain.score import Failure
from featureinterp.falsification.sensitivity import Example, FeatureSensitivity
from featureinterp.falsification.writing import Call
from featureinterp.files import explained_storage

_WINDOWS = ("samples", "originals")


class StoredFeatures(Sequence[FeatureSensitivity]):
    """Features in the order in which they were added, each read when it is asked for. They lie in a file
    without a name in ``folder`` (the system's own for None), which is gone with this object."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        with explained_storage(self._folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with this object)
        self._starts: list[int] = []
        self._places: dict[int, int] = {}

    def add(self, feature: FeatureSensitivity) -> None:
        """Writes one at the end."""
        with explained_storage(self._folder):
            self._places[feature.feature] = len(self._starts)
            self._starts.append(self._file.seek(0, 2))
            self._file.write(json.dumps(_plain(feature)).encode() + b"\n")

    def of(self, feature: int) -> FeatureSensitivity:
        """The one with that index. Raises ``KeyError`` when it was not added."""
        return self[self._places[feature]]

    @property
    def indices(self) -> Set[int]:
        """Those that were added."""
        return self._places.keys()

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> FeatureSensitivity: ...
    @overload
    def __getitem__(self, index: slice) -> list[FeatureSensitivity]: ...
    def __getitem__(self, index: int | slice) -> FeatureSensitivity | list[FeatureSensitivity]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with explained_storage(self._folder):
            self._file.seek(self._starts[index])
            return _feature(json.loads(self._file.readline()))

    def __iter__(self) -> Iterator[FeatureSensitivity]:
        return (self[i] for i in range(len(self)))


def _plain(feature: FeatureSensitivity) -> dict[str, Any]:
    """A feature as JSON that :func:`_feature` reads back to an equal value."""
    out = {f.name: getattr(feature, f.name) for f in fields(feature)}
    out["examples"] = [asdict(e) for e in feature.examples]
    out["calls"] = [asdict(c) for c in feature.calls]
    out["failure"] = feature.failure and asdict(feature.failure)
    for name in _WINDOWS:
        out[name] = [
            [w.row, w.document, w.token_ids.tolist(), w.pieces, w.activations.tolist()] for w in out[name]
        ]
    return out


def _feature(value: Mapping[str, Any]) -> FeatureSensitivity:
    out = dict(value)
    out["examples"] = tuple(Example(**{**e, "tokens": tuple(e["tokens"])}) for e in out["examples"])
    out["calls"] = tuple(Call(**{**c, "texts": tuple(c["texts"])}) for c in out["calls"])
    out["failure"] = out["failure"] and Failure(**out["failure"])
    for name in _WINDOWS:
        out[name] = tuple(
            Window(row, document, np.array(ids, np.int32), tuple(pieces), np.array(activations, np.float32))
            for row, document, ids, pieces, activations in out[name]
        )
    for name in ("texts", "control"):
        out[name] = tuple(out[name])
    return FeatureSensitivity(**out)
