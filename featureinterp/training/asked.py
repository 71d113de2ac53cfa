"""What extractions are of: as they are asked for, as a complete one says it itself, and of merged parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featureinterp.claims import EXTRACTION, asked_in
from featureinterp.codes.collect import mask_of, windows_request
from featureinterp.corpus.text import Corpus
from featureinterp.corpus.windows import MARKER, WindowPolicy
from featureinterp.errors import IncompatibleError
from featureinterp.stored.sums import read_marker
from featureinterp.subject.load import Subject
from featureinterp.training.store import METADATA, TEST, TRAIN, read_metadata, remedy_for

if TYPE_CHECKING:
    from featureinterp.training.extract import ExtractSettings

DTYPE_OPTION = {"dtype": "--dtype {} (subject.dtype of a recipe)"}
"""What goes on in the dtype of an extraction that is there."""

SOURCE = dict.fromkeys(("source.model.name", "source.model.fingerprint", "source.model.dtype"), str)
SOURCE |= {"source.hook": str}
"""What must be known of activations to train on them or to judge by them."""
WHOLE: dict[str, type] = {**SOURCE, "source.tokenizer": str, "source.corpus.windows": str, "hook": str}
WHOLE |= {"split": dict, "key": str, "part.number": int, "part.of": int}
WHOLE |= dict.fromkeys(("counts.n_tokens", "counts.n_first", "counts.n_sinks"), int)
"""What an extraction writes down."""


def request_of(
    subject: Subject, hook: str, corpus: Corpus, policy: WindowPolicy, settings: ExtractSettings
) -> dict[str, Any]:
    """All that an extraction depends on, for :func:`featureinterp.claims.claim`."""
    return {
        **windows_request(corpus, subject, policy),
        "hook": hook,
        "settings": asdict(settings),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "model": subject.fingerprint,
        "mask": mask_of(subject),
    }


def recorded_request(folder: Path, shard_rows: int | None = None) -> dict[str, Any] | None:
    """The request of a complete extraction by what its stores and windows say; None when they do not say it
    all. ``shard_rows``: as it was asked for, which they do not know.
    """
    stores = [read_metadata(folder / name) for name in (TRAIN, TEST) if (folder / name / METADATA).exists()]
    marker = folder / "windows" / MARKER
    if not stores or not marker.exists():
        return None
    windows, meta = read_marker(marker, remedy_for(folder)).value, stores[0]
    try:
        source, split, part = meta["source"], meta["split"], meta["part"]
        settings = {
            "held_out": split["held_out"],
            "dtype": meta["dtype"],
            "shuffle": meta["order"] == "shuffled",
            "shard_rows": shard_rows,
            "only_held_out": not (folder / TRAIN).exists(),
            "part": part["number"],
            "parts": part["of"],
            "seed": split["seed"],
        }
        wanted = [TRAIN, TEST] if split["held_out"] and not settings["only_held_out"] else stores[:1]
        if len(stores) != len(wanted):
            return None
        return {
            "corpus": windows["content"],
            "window": windows["policy"],
            "tokenizer": source["tokenizer"],
            "hook": source["hook"],
            "settings": settings,
            "dtype": source["model"]["dtype"],
            "model": source["model"]["fingerprint"],
            "mask": source["mask"],
        }
    except (KeyError, TypeError):  # of an earlier version
        return None


def merged_request(folders: list[Path]) -> dict[str, Any] | None:
    """The request that the parts of several workers answer together: that of a part, for the whole. None when
    the first part does not say what it is of.
    """
    first = asked_in(folders[0], EXTRACTION) or recorded_request(folders[0])
    if first is None or "settings" not in first:
        return None
    return {**first, "settings": {**first["settings"], "part": 0, "parts": 1}}


def source_of(folder: Path) -> dict[str, Any]:
    """Which model, hook and corpus the rows of a complete store are of. Raises ``IncompatibleError`` for a
    store that does not say it.
    """
    meta = read_metadata(folder)
    check_said(meta, folder, SOURCE)
    found: dict[str, Any] = meta["source"]
    return found


def check_said(meta: Mapping[str, Any], folder: Path, places: Mapping[str, type]) -> None:
    """Raises ``IncompatibleError`` when a store's metadata lack one of these places, or hold another type
    there.
    """
    for place, kind in places.items():
        value: Any = meta
        for name in place.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, kind):
            raise IncompatibleError(
                f"{folder} does not say what its activations are (its {METADATA} has no {place}; an earlier "
                "version or another program wrote it): extract them again into another folder"
            )
