"""What a job has left in its folder, as pages and tables."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from featureinterp.api.runs import open_run
from featureinterp.domain.result import FeatureResult

if TYPE_CHECKING:
    from featureinterp.jobs.status import JobStatus
    from featureinterp.probing.agreement import Agreement


def labels_of(run: Path, results: Sequence[FeatureResult]) -> dict[int, list[Agreement]]:
    """The concepts that a run's explained features were annotated with, where it was probed."""
    from featureinterp.probing.agreement import agreements
    from featureinterp.reports.probing import read_annotations

    if not (run / "probe").is_dir():
        return {}
    store = open_run(run)
    annotations, positions = read_annotations(run / "probe", store.fingerprint)
    return agreements(results, annotations, positions, store.windows.length)


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draws the report again from the results that an explain job left in ``folder``, with the concepts of
    ``probe`` where the run has them; returns the file."""
    from featureinterp.claims import owned
    from featureinterp.jobs.spec import job_of
    from featureinterp.reports.render import read_results, write_report

    results, about = read_results(Path(folder))
    run = job_of(Path(folder)).run if (Path(folder) / "job.json").exists() else None
    labels = labels_of(run, results) if run and (run / "codes").is_dir() else {}
    page = Path(out) if out else Path(folder) / "report.html"
    with nullcontext() if out else owned(Path(folder), "report"):
        return write_report(page, results, about, labels)


def status(folder: str | Path) -> JobStatus:
    """How far the job in a folder is, from its journal, also while it runs."""
    from featureinterp.jobs.status import job_status

    return job_status(Path(folder))


def export(folder: str | Path, *, to: str = "parquet", out: str | Path | None = None) -> tuple[Path, int]:
    """Writes the results of a job as a table, one row per feature; returns the file and how many rows it has.

    ``to``: ``parquet``, ``csv`` or ``jsonl``. Raises ``InputError`` for another format and when there is no
    job.
    """
    from featureinterp.claims import TABLE, claim, owned
    from featureinterp.jobs.status import job_folder
    from featureinterp.reports.export import export_results

    place = job_folder(Path(folder))
    if out:
        return export_results(place, to, Path(out))
    with owned(place, "export"):
        claim(place, TABLE, {}, earlier=dict)
        return export_results(place, to)
