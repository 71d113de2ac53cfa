"""featureinterp llm list | test"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from featureinterp.cli.endpoint import LlmOptions
from featureinterp.cli.options import AsJson
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import add

app = typer.Typer(
    help="Endpoints of language models, by the names that the configuration file gives them.",
    no_args_is_help=True,
)


def list_endpoints(as_json: AsJson = False) -> None:
    """List the endpoints of the configuration file and what was found out about them.

    Example: featureinterp llm list
    """
    from featureinterp.llm.config import load_config
    from featureinterp.llm.probe import recall

    config = load_config()
    screen = Screen(as_json=as_json)
    found = {name: recall(endpoint) for name, endpoint in config.endpoints.items()}
    if as_json:
        rows = {
            name: {
                "base_url": e.base_url,
                "model": e.model,
                "api_key_env": e.api_key_env,
                "probed": f.to_json() if (f := found[name]) else None,
            }
            for name, e in config.endpoints.items()
        }
        screen.result({"config": str(config.path), "endpoints": rows})
        return
    if config.endpoints:
        table = [
            (n, e.model, e.base_url or "embedded", f.summary if (f := found[n]) else "not tested")
            for n, e in config.endpoints.items()
        ]
        screen.table(table, ("name", "model", "address", "can"))
    else:
        put("no endpoints yet: docs/jobs.md says how to add one")
    put(f"Configuration: {config.path}")


def test(
    asked: LlmOptions,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Endpoint by its name in the configuration file, as --llm."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask an endpoint a few small things: whether it is there, what it can do, and what a call costs.

    The table comes in any case; the exit code is 1 when the endpoint did not answer, or not all.

    Example: featureinterp llm test paid
    """
    import anyio

    from featureinterp.errors import InputError
    from featureinterp.llm.config import load_config
    from featureinterp.llm.probe import probe

    if name is not None and asked.llm is not None:
        raise InputError(f"an endpoint is named twice, {name} and {asked.llm}: give one of them")
    meant = replace(asked, llm=name or asked.llm).endpoint()
    if meant is None:
        raise InputError("there is no endpoint to ask: give its name, or --base-url and --llm-model")
    config = load_config()
    endpoint = config.endpoint(meant) if isinstance(meant, str) else meant
    found = anyio.run(lambda: probe(endpoint, config.price(endpoint)))
    screen = Screen(as_json=as_json)
    if as_json:
        screen.result(found.to_json())
    else:
        for what, value in found.lines():
            put(f"{what:<20}{value}")
    if found.problem is not None:
        raise typer.Exit(1)


add(app, "list", list_endpoints)
add(app, "test", test)
