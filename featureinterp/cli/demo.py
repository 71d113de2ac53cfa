"""featureinterp demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from featureinterp.cli.options import (
    AsJson,
    Features,
    MaxTokens,
    NTest,
    OutFolder,
    Replace,
    RetryFailed,
    Seed,
    Simulator,
    random_or_named,
)
from featureinterp.cli.screen import Screen, end, one_line, plain, put
from featureinterp.cli.verb import Else

MOST_ROWS = 50


def demo(
    features: Features = "random:5",
    seed: Seed = 0,
    max_tokens: Annotated[MaxTokens, Else("planned to this machine's speed")] = None,
    n_test: Annotated[NTest, Else("planned to this machine's speed")] = None,
    simulator: Simulator = "token-wise",
    out: OutFolder = Path("featureinterp-demo"),
    retry_failed: RetryFailed = False,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Explain features of the embedded model live, score the explanations, and write a report.

    Fetches the embedded parts (1.3 GB, once) into the user's cache. Features are drawn at random among those
    that fire in at least 15 windows. What is valid in --out is used again.

    Example: featureinterp demo --features random:20 --seed 1
    """
    from featureinterp.errors import InputError

    screen = Screen(as_json=as_json)
    n = random_or_named(features, screen)
    if not isinstance(n, int):
        raise InputError(f"the demo draws its features at random: write random:5, not {features!r}")
    screen.say(
        "featureinterp demo: SmolLM2-135M, its SAE, and State of the Union addresses, explained by "
        "Qwen2.5-Coder-1.5B on this machine"
    )
    screen.machine()
    from featureinterp import api

    def tell(lines: list[str]) -> None:
        for line in lines:
            screen.say(one_line(line))

    with screen.live():
        results = api.demo(
            out=out,
            features=n,
            seed=seed,
            max_tokens=max_tokens,
            n_test=n_test,
            simulator=simulator,
            retry_failed=retry_failed,
            replace=replace,
            on_plan=lambda plan: screen.say(plan.text),
            on_chosen=tell,
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
