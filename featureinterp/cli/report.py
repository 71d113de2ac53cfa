"""featureinterp report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featureinterp.cli.options import AsJson, Out
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import Else


def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder that 'explain' or 'demo' wrote, such as RUN/explain."),
    ],
    out: Annotated[Out, Else("FOLDER/report.html")] = None,
    as_json: AsJson = False,
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
