"""featureinterp demo"""

from __future__ import annotations

from pathlib import Path

import typer

from featureinterp.cli.options import RETRY_FAILED
from featureinterp.cli.screen import Screen, end, one_line, plain, put

MOST_ROWS = 50


def demo(
    features: int = typer.Option(5, help="How many features to explain."),
    seed: int = typer.Option(0, help="Which random features."),
    max_tokens: int = typer.Option(
        None, help="Tokens of the corpus to collect; planned to this machine's speed when not given."
    ),
    n_test: int = typer.Option(
        None, help="Test windows of each kind; planned to this machine's speed when not given."
    ),
    simulator: str = typer.Option("token-wise", help="token-wise, all-at-once or lexical."),
    out: Path = typer.Option(
        Path("featureinterp-demo"), help="Folder for everything that is made; what is valid in it is reused."
    ),
    retry_failed: bool = RETRY_FAILED,
    replace: bool = typer.Option(
        False, "--replace", help="Delete what another request left in --out; replies stay."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Explain features of the embedded model live, score the explanations, and write a report.

    Fetches the embedded parts (1.3 GB, once) into the user's cache.

    Example: featureinterp demo --features 20 --seed 1
    """
    screen = Screen(as_json=as_json)
    screen.say(
        "featureinterp demo: SmolLM2-135M, its SAE, and State of the Union addresses, explained by "
        "Qwen2.5-Coder-1.5B on this machine"
    )
    screen.machine()
    from featureinterp import api

    choice = {
        "features": features,
        "seed": seed,
        "max_tokens": max_tokens,
        "n_test": n_test,
        "simulator": simulator,
    }
    with screen.live():
        results = api.demo(
            out=out,
            **choice,
            retry_failed=retry_failed,
            replace=replace,
            on_plan=lambda plan: screen.say(plan.text),
            on_chosen=lambda lines: [screen.say(one_line(line)) for line in lines],
            on_event=screen.event,
            steps=screen.step,
        )
    finish(screen, results)


def finish(screen: Screen, results: object) -> None:
    """Prints what a job found and where it lies, and sets the exit code: 1 when something failed or has
    gaps.
    """
    from featureinterp import api

    assert isinstance(results, api.Results)
    if screen.as_json:
        screen.result(results.to_json())
    elif results:
        rows = []
        for r in results[:MOST_ROWS]:
            score, floor = r.score("correlation"), r.baseline_score("correlation")
            interval = (
                f"{score.interval.low:.2f} to {score.interval.high:.2f}" if score and score.interval else ""
            )
            rows.append(
                (
                    str(r.feature),
                    one_line(r.explanation.text, 60)
                    if r.explanation
                    else "none: " + one_line(r.failures[0].message if r.failures else "", 50),
                    plain(score.value if score else None),
                    interval,
                    plain(score.null if score else None),
                    plain(floor.value if floor else None),
                )
            )
        screen.table(rows, ("feature", "explanation", "r", "95 % interval", "null", "top tokens"))
        if len(results) > MOST_ROWS:
            put(
                f"… and {len(results) - MOST_ROWS:,} more: 'featureinterp export {results.folder}' writes "
                "all of them as a table"
            )
        put(f"Report: {(results.folder / 'report.html').resolve()}")
    end(screen, results)
