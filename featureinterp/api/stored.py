"""Whether what is on disk is what was written, and whether its parts belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featureinterp.errors import FeatureInterpError, IncompatibleError
from featureinterp.stored.sums import read_marker
from featureinterp.stored.whole import DAMAGED, GOOD, UNCHECKED, Found, verify_files, version_of


@dataclass(frozen=True)
class Verified:
    """``found``: every part. ``good``: nothing is damaged (parts without checksums are not known to be)."""

    folder: str
    found: tuple[Found, ...]

    @property
    def good(self) -> bool:
        """Whether no part is damaged."""
        return not self.of(DAMAGED)

    def of(self, state: str) -> list[Found]:
        """The parts in a state."""
        return [f for f in self.found if f.state == state]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        counts = {state: len(self.of(state)) for state in (GOOD, DAMAGED, UNCHECKED)}
        parts = [f.to_json() for f in self.found]
        return {
            "folder": self.folder,
            "good": self.good,
            "counts": counts,
            "n_bytes": sum(f.n_bytes for f in self.found),
            "parts": parts,
        }


def verify(folder: str | Path, *, on_part: Callable[[Found], None] = lambda _: None) -> Verified:
    """Reads everything that a folder holds and compares it with its checksums; says which parts do not belong
    together.

    ``on_part`` is called with every part as it is through. Nothing is changed. Raises ``StorageError`` when
    there is no folder.
    """
    from featureinterp.training.loop import CHECKPOINT, LOG, check_checkpoint, check_log

    found = []
    tables = {"journal.sqlite": _journal, "replies.sqlite": _replies}
    for part in verify_files(Path(folder), tables, {CHECKPOINT: check_checkpoint, LOG: check_log}):
        found.append(part)
        on_part(part)
    if all(f.state != DAMAGED for f in found):
        for part in _together(Path(folder)):
            found.append(part)
            on_part(part)
    return Verified(str(folder), tuple(found))


def _journal(path: Path) -> int:
    from featureinterp.jobs.journal import READS, Journal

    if version_of(path) in READS:
        return 1
    with Journal(path) as journal:
        return journal.check()


def _replies(path: Path) -> int:
    from contextlib import closing

    from featureinterp.llm.cached import READS, ReplyStore

    if version_of(path) in READS:
        return 1
    with closing(ReplyStore(path)) as replies:
        return replies.check()


def _together(folder: Path) -> Iterator[Found]:
    """Parts that do not belong to the parts beside them, or contradict themselves."""
    for path in sorted(folder.rglob("job.json")):
        try:
            _job(path.parent)
        except FeatureInterpError as error:
            yield Found(str(path), DAMAGED, str(error))
    places = sorted({p.parent.parent for p in folder.rglob("windows/windows.json")})
    for place in places:
        for check in (_codes, _activations):
            try:
                check(place)
            except FeatureInterpError as error:
                yield Found(str(place), DAMAGED, str(error))


def _job(folder: Path) -> None:
    from featureinterp.jobs.journal import VERSION, Journal

    path, journal = folder / "job.json", folder / "journal.sqlite"
    if not journal.exists() or version_of(journal) != VERSION:
        return
    key = read_marker(path, "run the same job again").value.get("key")
    with Journal(journal) as opened:
        jobs = opened.jobs()
    if jobs and key not in list(jobs):
        raise IncompatibleError(
            f"{path} and {journal} do not belong together: put back the one that was there"
        )


def _codes(run: Path) -> None:
    from featureinterp.codes.dense import check_dense
    from featureinterp.codes.store import MARKER, CodesStore
    from featureinterp.corpus.windows import WindowTable
    from featureinterp.reports.probing import check_study
    from featureinterp.sampling.files import check_records
    from featureinterp.sampling.similar import check_embeddings

    if not (run / "codes" / MARKER).exists():
        check_embeddings(run / "embeddings", WindowTable.open(run / "windows"))
        return
    store = CodesStore.open(run)
    check_embeddings(run / "embeddings", store.windows)
    check_dense(run, store)
    check_records(run, store.fingerprint)
    check_study(run / "probe", store.fingerprint)


def _activations(out: Path) -> None:
    from featureinterp.training.extract import Extracted
    from featureinterp.training.store import METADATA

    if any((out / name / METADATA).exists() for name in ("train", "test")):
        Extracted.open(out)
