"""featureinterp verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featureinterp.cli.options import AsJson
from featureinterp.cli.screen import Screen, put


def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A run, a job's folder, activations, or any folder above them."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Check all that a folder holds against its checksums, and whether its parts belong together. Nothing is
    changed.

    Exit code 1 when a part is damaged. Parts of earlier versions that carry no checksums are named.

    Example: featureinterp verify RUN
    """
    from featureinterp.api.stored import verify as check
    from featureinterp.stored.whole import DAMAGED, GOOD, UNCHECKED

    found = check(folder)
    if as_json:
        Screen(as_json=True).result(found.to_json())
    else:
        for part in found.of(DAMAGED):
            put(f"damaged: {part.why}")
        for part in found.of(UNCHECKED):
            put(f"no checksums: {part.part} ({part.why})")
        n_bytes = sum(p.n_bytes for p in found.found)
        counts = [
            f"{len(found.of(GOOD)):,} parts are what was written",
            f"{len(found.of(DAMAGED)):,} damaged",
        ]
        put(f"{', '.join(counts)}, {len(found.of(UNCHECKED)):,} without checksums; {n_bytes:,} bytes read")
    if not found.good:
        raise typer.Exit(1)
