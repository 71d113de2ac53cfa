"""featureinterp serve"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from featureinterp.cli.screen import Screen


def serve(
    runs: Path = typer.Option(..., help="Folder whose run folders may be explained."),
    jobs: Path = typer.Option(
        Path("featureinterp-jobs"), help="Folder for the jobs, the service's only state."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to bind; others than loopback need a token."),
    port: int = typer.Option(8765, help="Port to bind."),
    token_env: str = typer.Option(
        None, help="Name of the variable with the token that every request must carry."
    ),
    endpoint: list[str] = typer.Option(
        [], help="An endpoint of the configuration file that requests may name; several times for several."
    ),
    simulator_model: list[str] = typer.Option(
        ["qwen2.5-coder-1.5b-instruct"], help="A local simulator that requests may name."
    ),
    queue: int = typer.Option(100, help="How many jobs may wait."),
    parallel: int = typer.Option(1, help="How many jobs run at once."),
    min_free_mb: int = typer.Option(
        100, help="With less room on the disk, in MB, no job is taken on or started."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the address as JSON."),
) -> None:
    """Serve jobs over HTTP. Jobs go on when the service ends; starting it again finds them.

    Example: featureinterp serve --runs RUNS --endpoint paid
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
    for name in endpoint:
        config.endpoint(name)
    if queue < 1 or parallel < 1:
        raise InputError("at least one job must be able to wait, and to run")
    if min_free_mb < 0:
        raise InputError(f"{min_free_mb} MB are no room: give 0 or more")
    rules = Rules(
        jobs, runs, tuple(endpoint), tuple(simulator_model), token, queue, parallel, min_free_mb * 1_000_000
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
