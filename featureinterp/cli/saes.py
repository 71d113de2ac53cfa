"""featureinterp saes list | show | fetch"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from featureinterp.cli.options import AsJson
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import add

app = typer.Typer(
    help="Published SAEs by name: what they are, where they lie, and fetching them.", no_args_is_help=True
)


def list_saes(
    beginning: Annotated[
        str,
        typer.Argument(
            metavar="BEGINNING", help="Only names that begin like this, such as py_16k or gscope."
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the SAEs that can be named, with model, width, architecture, and codes per token where known.

    Example: featureinterp saes list py_4k
    """
    from featureinterp import api

    screen = Screen(as_json=as_json)
    rows = [about for about in api.saes() if about["name"].startswith(beginning)]
    if as_json:
        screen.result({"saes": rows})
        return
    screen.table([_row(r) for r in rows], ("name", "width", "architecture", "L0", "model", ""))
    put(
        "Also: gscope_layerN_WIDTH_l0_N on other layers, saelens:RELEASE/ID, and folders. NAME@REVISION "
        "pins a revision."
    )


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of 'saes list', or a folder.")],
    as_json: AsJson = False,
) -> None:
    """Say what a name stands for, without asking the network.

    Example: featureinterp saes show py_4k_btopk_s0 --json
    """
    from featureinterp import api

    about = api.sae_info(name)
    if as_json:
        Screen(as_json=True).result(about)
        return
    for key, value in about.items():
        if value is not None:
            put(f"{key:14} " + ("yes" if value is True else "no" if value is False else str(value)))


def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Names of 'saes list'.")],
    as_json: AsJson = False,
) -> None:
    """Fetch SAEs into the model hub's cache and check that they are what their names say.

    Example: featureinterp saes fetch py_4k_btopk_s0 gscope_16k_l0_82
    """
    from featureinterp import api

    screen = Screen(as_json=as_json)
    for name in names:
        api.sae_info(name)
    with screen.live():
        for name in names:
            loaded = api.fetch_sae(name, steps=screen.step)
            screen.say(f"{name}: {loaded.n_features:,} features at {loaded.hook} of {loaded.model}")
    if as_json:
        screen.result({"fetched": names})


def _row(about: dict[str, Any]) -> tuple[str, ...]:
    l0 = about["measured_l0"] or about["l0"]
    return (
        about["name"],
        f"{about['d_sae']:,}",
        about["architecture"],
        "" if l0 is None else f"{l0:.0f}",
        about["model"].rsplit("/", 1)[-1],
        "cached" if about["cached"] else "",
    )


add(app, "list", list_saes)
add(app, "show", show)
add(app, "fetch", fetch)
