"""The results of a job as a sequence that holds one feature in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from featureinterp.domain.result import FeatureResult
from featureinterp.errors import InputError
from featureinterp.jobs.journal import Journal


class KeptResults(Sequence[FeatureResult]):
    """Results in a journal, in the order of ``features``: those that ``job`` (its key) is through with. They
    are read when they are asked for.
    """

    def __init__(self, path: Path, job: str, features: Sequence[int]) -> None:
        self.path, self.job = path, job
        with Journal(path) as journal:
            finished = journal.finished(job)
        self.indices = [f for f in features if f in finished]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> FeatureResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[FeatureResult]: ...
    def __getitem__(self, index: int | slice) -> FeatureResult | list[FeatureResult]:
        if isinstance(index, slice):
            return list(self._read(self.indices[index]))
        return next(self._read([self.indices[index]]))

    def __iter__(self) -> Iterator[FeatureResult]:
        return self._read(self.indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # what is compared by value and may change has none

    def _read(self, indices: Sequence[int]) -> Iterator[FeatureResult]:
        if not indices:
            return
        if not self.path.exists():
            raise InputError(f"the journal {self.path} is gone, and the results with it: run the job again")
        with Journal(self.path) as journal:
            yield from journal.features(self.job, indices)
