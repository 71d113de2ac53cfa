"""featureinterp llm list | test"""

from __future__ import annotations

import typer

from featureinterp.cli.screen import Screen, put

app = typer.Typer(
    help="Endpoints of language models, by the names that the configuration file gives them.",
    no_args_is_help=True,
)
_JSON = typer.Option(False, "--json", help="Print as JSON.")


@app.command("list")
def list_endpoints(as_json: bool = _JSON) -> None:
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


@app.command()
def test(name: str, as_json: bool = _JSON) -> None:
    """Ask an endpoint a few small things: whether it is there, what it can do, and what a call costs.

    The table comes in any case; the exit code is 1 when the endpoint did not answer, or not all.

    Example: featureinterp llm test paid
    """
    import anyio

    from featureinterp.llm.config import load_config
    from featureinterp.llm.probe import probe

    config = load_config()
    endpoint = config.endpoint(name)
    found = anyio.run(lambda: probe(endpoint, config.price(endpoint)))
    screen = Screen(as_json=as_json)
    if as_json:
        screen.result(found.to_json())
    else:
        for what, value in found.lines():
            put(f"{what:<20}{value}")
    if found.problem is not None:
        raise typer.Exit(1)
