"""featureinterp serve"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from featureinterp.cli.options import AsJson
from featureinterp.cli.screen import Screen
from featureinterp.cli.verb import Former


def serve(
    runs: Annotated[Path, typer.Option(help="Folder whose run folders may be explained.")],
    jobs: Annotated[Path, typer.Option(help="Folder for the jobs, the service's only state.")] = Path(
        "featureinterp-jobs"
    ),
    host: Annotated[
        str, typer.Option(help="Address to bind; others than loopback need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind.")] = 8765,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            help="Name of the environment variable with the token that every request must carry.",
        ),
    ] = None,
    allow_llm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An endpoint of the configuration file that requests may name; several times for several.",
        ),
        Former("--endpoint"),
    ] = None,
    allow_simulator_model: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="A model of simulators on this machine that requests may name; several times for several.",
        ),
        Former("--simulator-model"),
    ] = ["qwen2.5-coder-1.5b-instruct"],  # noqa: B006 (typer copies it)
    queue: Annotated[int, typer.Option(help="Jobs that may wait.")] = 100,
    parallel: Annotated[int, typer.Option(help="Jobs that run at once.")] = 1,
    min_free_mb: Annotated[
        int, typer.Option(help="With less room on the disk, in MB, no job is taken on or started.")
    ] = 100,
    as_json: AsJson = False,
) -> None:
    """Serve jobs over HTTP. Jobs go on when the service ends; starting it again finds them.

    Example: featureinterp serve --runs RUNS --allow-llm paid
    """
    from featureinterp.errors import InputError

    try:
        import uvicorn

        from featureinterp.server.app import Rules, make_app
        from featureinterp.server.connections import allowed_connections, bounded
        from featureinterp.server.folder import JobsFolder
        from featureinterp.server.gate import check_binding
    except ImportError as error:
        raise InputError(
            f"the service needs the package {error.name}: pip install 'featureinterp[server]'"
        ) from error
    from featureinterp.claims import owned
    from featureinterp.llm.config import load_config

    token = os.environ.get(token_env, "") if token_env else None
    if token == "":
        raise InputError(
            f"the environment variable {token_env} with the token is not set: set it, or leave --token-env "
            "out"
        )
    check_binding(host, token)
    if not runs.is_dir():
        raise InputError(f"there is no folder {runs}: give the one that holds the run folders")
    config = load_config()
    for name in allow_llm or ():
        config.endpoint(name)
    if queue < 1 or parallel < 1:
        raise InputError("at least one job must be able to wait, and to run")
    if min_free_mb < 0:
        raise InputError(f"{min_free_mb} MB are no room: give 0 or more")
    rules = Rules(
        jobs,
        runs,
        tuple(allow_llm or ()),
        tuple(allow_simulator_model),
        token,
        queue,
        parallel,
        min_free_mb * 1_000_000,
    )
    with owned(jobs, "featureinterp serve"):
        JobsFolder(jobs).tidy()
        app = make_app(rules)
        url = f"http://{host}:{port}"
        if as_json:
            Screen(as_json=True).result({"url": url, "jobs": str(jobs), "runs": str(runs)})
            sys.stdout.flush()
        else:
            typer.echo(f"featureinterp: {url}")
        uvicorn.run(
            app,
            host=host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=2,
            http=bounded(allowed_connections()),
            ws="none",
            backlog=128,
        )
