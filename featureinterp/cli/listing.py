"""featureinterp list"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from featureinterp.cli.options import AsJson
from featureinterp.cli.screen import Screen, put

KINDS = "explainers, simulators, scorers, stages, windows, embedders, formats, layouts"


def list_parts(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help=f"{KINDS}; all of them when not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what a name can stand for, with one line each, also from other installed packages.

    Example: featureinterp list simulators
    """
    from featureinterp.registry import REGISTRIES, registry

    found = {k: registry(k).listed() for k in ([kind] if kind else REGISTRIES)}
    screen = Screen(as_json=as_json)
    if as_json:
        screen.result({k: [_row(part) for part in parts] for k, parts in found.items()})
        return
    for k, parts in found.items():
        rows = [(p.name, p.trouble or p.says, "" if p.source == "featureinterp" else p.source) for p in parts]
        if not kind:
            put(f"{k}:")
        screen.table(rows, ("name", "what it is", "from"))
    put("docs/adding.md says how a package of your own adds one.")


def _row(part: Any) -> dict[str, str | None]:
    return {"name": part.name, "says": part.says, "source": part.source, "trouble": part.trouble}
