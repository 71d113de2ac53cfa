"""What the verbs return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from featureinterp.domain.result import FeatureResult
from featureinterp.errors import JobStoppedError
from featureinterp.jobs.plan import Outcome

if TYPE_CHECKING:
    from featureinterp.falsification.sensitivity import FeatureSensitivity
    from featureinterp.probing.study import Study


@dataclass(frozen=True)
class Results(Sequence[FeatureResult]):
    """The results of a job and where they lie; read from its journal when they are asked for. Draws itself as
    a table in a notebook.
    """

    features: Sequence[FeatureResult]
    folder: Path
    about: dict[str, Any]
    outcome: Outcome | None = None

    @property
    def stopped(self) -> JobStoppedError | None:
        """Why the job ended before it was through; None when it is through."""
        return self.outcome.stopped if self.outcome else None

    @overload
    def __getitem__(self, index: int) -> FeatureResult: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FeatureResult]: ...
    def __getitem__(self, index: int | slice) -> FeatureResult | Sequence[FeatureResult]:
        return self.features[index]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def n_failures(self) -> int:
        """Stages that failed, over all features."""
        return sum(len(r.failures) for r in self.features)

    @property
    def n_features(self) -> int:
        """Features of the job, those included that it did not get to."""
        return len(self) + len(self.outcome.left if self.outcome else ())

    @property
    def n_failed(self) -> int:
        """Features with a stage that failed."""
        return sum(s == "failed" for s in self._status)

    @property
    def n_partial(self) -> int:
        """Features with gaps: some of their requests failed, and the rest is there."""
        return sum(s == "partial" for s in self._status)

    @property
    def _status(self) -> Sequence[str]:
        return tuple(self.outcome.status.values()) if self.outcome else ()

    def rows(self) -> Iterator[dict[str, Any]]:
        """One entry per feature for programs, without windows."""
        for r in self.features:
            row = r.to_json()
            row.pop("windows")
            yield row

    def summary(self) -> dict[str, Any]:
        """All of :meth:`to_json` but the features."""
        counts = {"n_failures": self.n_failures, "n_failed": self.n_failed, "n_partial": self.n_partial}
        return {"folder": str(self.folder), **counts}

    def to_json(self) -> dict[str, Any]:
        """A summary for programs: one entry per feature, without windows."""
        return {**self.summary(), "features": list(self.rows())}

    def _repr_html_(self) -> str:
        from featureinterp.reports.table import results_table

        return results_table(self.features)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The sensitivity of one SAE's features. ``summary``: what ``summary.json`` in ``folder`` holds.
    ``features``: each read from disk when it is asked for. ``stopped``: why the job ended early.
    ``n_partial``: features with fewer texts than were asked for."""

    sae: str
    folder: Path
    summary: dict[str, Any]
    features: Sequence[FeatureSensitivity]
    stopped: JobStoppedError | None = None
    n_partial: int = 0


@dataclass(frozen=True, eq=False)
class Probe:
    """What labels say about a run's features. ``folder`` holds tables, plots and the ``page``. ``labels``:
    how many spans there were, and how many met no token of the run. Draws itself as a table in a notebook."""

    study: Study
    folder: Path
    page: Path
    n_spans: int
    n_outside: int

    def _repr_html_(self) -> str:
        from featureinterp.reports.probing import study_table

        return study_table(self.study)
