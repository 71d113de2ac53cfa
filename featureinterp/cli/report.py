"""featureinterp report"""

from __future__ import annotations

from pathlib import Path

import typer

from featureinterp.cli.screen import Screen, put


def report(
    folder: Path = typer.Argument(..., help="Folder that 'explain' or 'demo' wrote (RUN/explain)."),
    out: Path = typer.Option(None, help="HTML file; FOLDER/report.html when not given."),
    as_json: bool = typer.Option(False, "--json", help="Print as JSON."),
) -> None:
    """Draw the report of a finished job again.

    Example: featureinterp report RUN/explain --out features.html
    """
    from featureinterp import api

    path = api.report(folder, out)
    if as_json:
        Screen(as_json=True).result({"report": str(path)})
    else:
        put(f"Report: {path}")
